//! A way into `JetStream`: messages out, acks back, on whatever session stands.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_nats::{HeaderMap, HeaderName, Message as NatsMessage, StatusCode, Subject, Subscriber};
use futures_util::{FutureExt as _, StreamExt as _};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};

use super::Shared;
use super::session::{Session, gone};
use crate::bus::{Ack, Message, Numbered, Refusal, Settled, TransientCause, header};

const AWAY: Refusal = Refusal::Transient(TransientCause::Away);
const LOST: Refusal = Refusal::Transient(TransientCause::Lost);

/// Our end of a lane.
pub(super) struct LaneEnd {
    shared: Arc<Shared>,
    inbox: mpsc::Receiver<Vec<Numbered>>,
    outbox: mpsc::Sender<Vec<Settled>>,
}

/// Why a lane left a session.
enum Left {
    /// The session is over; there may be another.
    Lost,
    /// The lane's other end is gone.
    Closed,
}

impl LaneEnd {
    pub(super) fn new(
        shared: Arc<Shared>,
        inbox: mpsc::Receiver<Vec<Numbered>>,
        outbox: mpsc::Sender<Vec<Settled>>,
    ) -> Self {
        Self { shared, inbox, outbox }
    }

    pub(super) async fn run(mut self) {
        let mut sessions = self.shared.session.clone();
        loop {
            let session = sessions.borrow_and_update().clone();
            let left = match session {
                // A sender that is gone says as much as its last word would.
                Some(session) if !*session.lost.borrow() && session.lost.has_changed().is_ok() => {
                    self.serve(session, &mut sessions).await
                }
                _ => tokio::select! {
                    // A session before a message: what was sent for it must not be refused.
                    biased;
                    changed = sessions.changed() => if changed.is_ok() { Left::Lost } else { Left::Closed },
                    messages = self.inbox.recv() => self.refuse(messages).await,
                },
            };
            if matches!(left, Left::Closed) {
                return;
            }
        }
    }

    async fn refuse(&mut self, messages: Option<Vec<Numbered>>) -> Left {
        let Some(messages) = messages else {
            return Left::Closed;
        };
        let numbers = messages.into_iter().map(|numbered| numbered.number);
        self.settle(numbers.map(|number| Settled { number, outcome: Err(AWAY) }).collect()).await
    }

    async fn settle(&self, settled: Vec<Settled>) -> Left {
        if settled.is_empty() || self.outbox.send(settled).await.is_ok() { Left::Lost } else { Left::Closed }
    }

    /// Works on one session until it or the lane ends.
    async fn serve(&mut self, session: Session, sessions: &mut watch::Receiver<Option<Session>>) -> Left {
        let inbox = session.client.new_inbox();
        let Ok(mut acks) = session.client.subscribe(format!("{inbox}.*")).await else {
            return Left::Lost;
        };
        let mut lost = session.lost.clone();
        let mut unsettled = BTreeSet::new();
        loop {
            let settled = tokio::select! {
                biased;
                () = gone(&mut lost) => break,
                // The stream is looked after no longer.
                () = closed(sessions) => return Left::Closed,
                ack = acks.next() => match ack {
                    Some(ack) => self.collect(ack, &mut acks, inbox.len() + 1, &mut unsettled),
                    None => break,
                },
                messages = self.inbox.recv() => match messages {
                    Some(messages) => send(&session, &inbox, messages, &mut unsettled).await,
                    None => return Left::Closed,
                },
            };
            if !settled.is_empty() && self.outbox.send(settled).await.is_err() {
                return Left::Closed;
            }
        }
        self.settle(unsettled.into_iter().map(|number| Settled { number, outcome: Err(LOST) }).collect())
            .await
    }

    /// This ack and every other one that has arrived.
    fn collect(
        &self,
        first: NatsMessage,
        acks: &mut Subscriber,
        number_at: usize,
        unsettled: &mut BTreeSet<u64>,
    ) -> Vec<Settled> {
        let mut settled = Vec::new();
        let mut next = Some(first);
        while let Some(ack) = next {
            // The number is the last token of the subject the ack came on.
            if let Some(number) = ack.subject.get(number_at..).and_then(|number| number.parse().ok()) {
                let outcome = outcome(&ack);
                if outcome == Err(Refusal::Transient(TransientCause::StreamMissing)) {
                    self.shared.stream_missed.notify_one();
                }
                unsettled.remove(&number);
                settled.push(Settled { number, outcome });
            }
            next = acks.next().now_or_never().flatten();
        }
        settled
    }
}

/// Waits until nobody keeps the connection any longer.
async fn closed(sessions: &mut watch::Receiver<Option<Session>>) {
    // It wants none; the error is the end.
    drop(sessions.wait_for(|_| false).await);
}

async fn send(
    session: &Session,
    inbox: &str,
    messages: Vec<Numbered>,
    unsettled: &mut BTreeSet<u64>,
) -> Vec<Settled> {
    let mut refused = Vec::new();
    // Nearly always the same for all of them, and cheap to share.
    let mut last: Option<(Arc<str>, Subject)> = None;
    for Numbered { number, message } in messages {
        let reply = Subject::from([inbox, ".", number.to_string().as_str()].concat());
        let subject = match &last {
            Some((text, subject)) if Arc::ptr_eq(text, &message.subject) => subject.clone(),
            _ => Subject::from(message.subject.as_ref()),
        };
        last = Some((Arc::clone(&message.subject), subject.clone()));
        let published = session.client.publish_with_reply_and_headers(
            subject,
            reply,
            headers(&message),
            message.payload.clone(),
        );
        match published.await {
            Ok(()) => {
                unsettled.insert(number);
            }
            Err(error) => {
                let refusal = match error.kind() {
                    async_nats::PublishErrorKind::MaxPayloadExceeded => Refusal::TooLarge,
                    async_nats::PublishErrorKind::InvalidSubject => Refusal::BadSubject,
                    async_nats::PublishErrorKind::Send => AWAY,
                };
                refused.push(Settled { number, outcome: Err(refusal) });
            }
        }
    }
    refused
}

fn headers(message: &Message) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(HeaderName::from_static(header::MESSAGE_ID), message.id.to_text());
    headers.insert(HeaderName::from_static(header::TYPE), &*message.kind);
    headers.insert(HeaderName::from_static(header::TRACEPARENT), message.traceparent());
    if let Some(by_user) = &message.by_user {
        headers.insert(HeaderName::from_static(header::USER), &*by_user.key);
        headers.insert(HeaderName::from_static(header::AT), by_user.occurred_at.as_millisecond().to_string());
    }
    headers
}

/// What an ack says.
fn outcome(ack: &NatsMessage) -> Result<Ack, Refusal> {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        seq: u64,
        #[serde(default)]
        duplicate: bool,
        error: Option<Failure>,
    }
    #[derive(Deserialize)]
    struct Failure {
        #[serde(default)]
        code: u64,
        #[serde(default)]
        err_code: u64,
    }
    if ack.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(Refusal::Transient(TransientCause::StreamMissing));
    }
    match serde_json::from_slice::<Body>(&ack.payload) {
        Ok(Body { error: Some(Failure { code, err_code }), .. }) => Err(refusal(code, err_code)),
        Ok(Body { seq, duplicate, error: None }) if seq > 0 => Ok(Ack { position: seq, duplicate }),
        _ => Err(Refusal::Other(0)),
    }
}

/// What `JetStream`'s error codes mean for a message; see its `errors.json`.
fn refusal(status: u64, code: u64) -> Refusal {
    let cause = match code {
        // Message exceeds the stream's maximum; header or message exceeds a limit.
        10_054 | 10_097 => return Refusal::TooLarge,
        10_059 => TransientCause::StreamMissing,
        10_002 | 10_023 | 10_028 | 10_047 | 10_077 | 10_167 => TransientCause::Full,
        // The cluster has no leader or no peers; JetStream is off, for the account or at all; the same id is being
        // stored this moment; the stream is offline.
        10_005 | 10_008 | 10_009 | 10_039 | 10_076 | 10_118 | 10_158 | 10_194 => TransientCause::Unavailable,
        _ if status >= 500 => TransientCause::Unavailable,
        code => return Refusal::Other(code),
    };
    Refusal::Transient(cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(payload: &'static str, status: Option<StatusCode>) -> NatsMessage {
        NatsMessage {
            subject: "_INBOX.x.1".into(),
            reply: None,
            payload: payload.into(),
            headers: None,
            status,
            description: None,
            length: payload.len(),
        }
    }

    #[test]
    fn acks_are_told_apart_by_code_not_by_text() {
        let of = |payload| outcome(&ack(payload, None));
        assert_eq!(of(r#"{"stream":"S","seq":7}"#), Ok(Ack { position: 7, duplicate: false }));
        assert_eq!(
            of(r#"{"stream":"S","seq":7,"duplicate":true}"#),
            Ok(Ack { position: 7, duplicate: true })
        );
        let error = |code: u64| {
            outcome(&NatsMessage {
                payload: format!(
                    r#"{{"error":{{"code":400,"err_code":{code},"description":"x"}},"stream":"S","seq":0}}"#
                )
                .into(),
                ..ack("", None)
            })
        };
        assert_eq!(error(10_054), Err(Refusal::TooLarge));
        assert!(error(10_077).unwrap_err().is_transient() && error(10_059).unwrap_err().is_transient());
        assert_eq!(error(10_071), Err(Refusal::Other(10_071)));
        assert!(outcome(&ack("", Some(StatusCode::NO_RESPONDERS))).unwrap_err().is_transient());
        assert_eq!(of("not json"), Err(Refusal::Other(0)));
    }
}
