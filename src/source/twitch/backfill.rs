//! What a history service knows of a time that was missed. It speaks the recent-messages API: a channel's newest lines
//! between two times, as they stood on the wire, the oldest first.
//!
//! They go through the same normaliser and the same door as live ones, and wait there as a replay does: ids make it
//! harmless to fetch a line twice. A service that hangs, fails or answers nonsense costs a gap its healing, nothing
//! else: every call has a time-out, every answer a limit, every gap an end.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant as StdInstant};

use jiff::Timestamp;
use reqwest::Client;
use reqwest::redirect::Policy;
use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;
use tokio::time::{Instant, sleep};

use super::gap::Gap;
use super::lines::Lines;
use super::normalize::{Normalizer, Reading, TakenIn};
use super::wire;
use crate::clock::Clock;
use crate::envelope::draft::{Content, Healed};
use crate::envelope::{Draft, Origin, Receipt};
use crate::errors::ErrorCode;
use crate::pipeline::{Intake, Patience};
use crate::retry::Backoff;
use crate::secret::without_user_info;
use crate::telemetry::logs::with_causes;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For one answer, from the request to its last byte.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Lines asked for at a time: what the service gives at most.
const PAGE_LINES: usize = 800;
/// Longest code of an error that is repeated.
const LONGEST_CODE: usize = 64;
/// Twitch's longest lines, a page of them, and their escapes.
const LARGEST_PAGE: usize = 8 << 20;
/// Requests for one gap that bring something.
const MOST_PAGES: usize = 64;
/// The service's clock and ours differ, and so do the ways of a line to them: so much is asked for on either side.
const MARGIN: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// A gap is told unhealed after so long, counted anew whenever the service answers.
const PATIENCE: Duration = Duration::from_mins(1);

/// The base of a history service's address. Its user-info is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct BackfillUrl(String);

impl BackfillUrl {
    /// Checks an address.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{:?} is no address such as https://host", without_user_info(text));
        let url = reqwest::Url::parse(text).map_err(|_| wrong())?;
        let is_base = url.has_host() && url.query().is_none() && url.fragment().is_none();
        if !is_base || !matches!(url.scheme(), "http" | "https") {
            return Err(wrong());
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }

    /// Whether it is reached over TLS.
    pub fn is_tls(&self) -> bool {
        self.0.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"))
    }
}

impl fmt::Debug for BackfillUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_user_info(&self.0))
    }
}

impl Serialize for BackfillUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&without_user_info(&self.0))
    }
}

/// No client for the history service could be made.
#[derive(Debug, Error)]
#[error("TWITCH_BACKFILL_URL cannot be used")]
pub struct BackfillError(#[from] reqwest::Error);

/// Why a gap was not healed.
#[derive(Debug, Error)]
enum FillError {
    #[error("no answer")]
    Away(#[source] reqwest::Error),
    #[error("answered {0}")]
    Status(reqwest::StatusCode),
    #[error("the answer is larger than {LARGEST_PAGE} bytes")]
    TooLarge,
    /// Where, not what: the library's own words quote the answer, which is chat.
    #[error("the answer is not what the API says, in line {line}, column {column}")]
    Unreadable { line: usize, column: usize },
    #[error("the service does not know the channel's history: {0}")]
    Unknown(String),
    #[error("it did not answer for others, and time is up")]
    TimeUp,
}

impl FillError {
    /// Whether another try may help.
    fn is_transient(&self) -> bool {
        match self {
            Self::Away(_) | Self::Unreadable { .. } => true,
            Self::Status(status) => status.is_server_error() || matches!(status.as_u16(), 408 | 429),
            Self::TooLarge | Self::Unknown(_) | Self::TimeUp => false,
        }
    }
}

fn unreadable(error: &serde_json::Error) -> FillError {
    FillError::Unreadable { line: error.line(), column: error.column() }
}

/// A code as the API has them, such as `channel_not_joined`; whatever else stands in its place is not repeated.
fn code_shown(code: &str) -> String {
    let is_code = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if code.len() <= LONGEST_CODE && code.chars().all(is_code) {
        code.to_owned()
    } else {
        "no code".to_owned()
    }
}

/// An answer.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow)]
    messages: Vec<Cow<'a, str>>,
    #[serde(default)]
    error_code: Option<String>,
}

/// What came of a gap so far, over all tries.
#[derive(Default)]
struct Found {
    receipt: Receipt,
    oldest: Option<Timestamp>,
    newest: Option<Timestamp>,
}

/// A history service.
pub(super) struct Backfill {
    url: BackfillUrl,
    client: Client,
    normalizer: Normalizer,
    clock: Clock,
    heard: Mutex<Heard>,
}

/// How the service answered lately.
#[derive(Debug, Clone, Copy, Default)]
struct Heard {
    /// When it last answered.
    answered: Option<Instant>,
    /// It did not since.
    is_failing: bool,
}

impl Backfill {
    pub(super) fn new(
        url: BackfillUrl,
        tls: Option<Arc<rustls::ClientConfig>>,
        normalizer: Normalizer,
        clock: Clock,
    ) -> Result<Self, BackfillError> {
        let builder = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            .redirect(Policy::none())
            .no_proxy();
        let builder = match tls {
            Some(tls) => builder.tls_backend_preconfigured((*tls).clone()),
            None => builder,
        };
        Ok(Self { url, client: builder.build()?, normalizer, clock, heard: Mutex::default() })
    }

    /// Asks for a channel's last moments, to see whether the service answers as it should; what it says is not used.
    pub(super) async fn ask(&self, channel: &str, last: Duration) -> Result<(), String> {
        let now = self.clock.now();
        let asked = async {
            let body = self.fetch(channel, now.checked_sub(last).unwrap_or(now), now).await?;
            serde_json::from_slice::<Page<'_>>(&body).map(drop).map_err(|error| unreadable(&error))
        };
        asked.await.map_err(|error| with_causes(&error))
    }

    /// Brings what the service knows of a gap to the door, and waits until it is settled. `None`: the service did not
    /// answer for the whole of it.
    pub(super) async fn heal(&self, gap: &Gap, since: Instant, intake: &Intake) -> Option<Healed> {
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut found = Found::default();
        let deadline = |heard: Heard| since.max(heard.answered.unwrap_or(since)) + PATIENCE;
        let error = loop {
            // Others waited for it in vain while this one stood in line. Where it is only we who were slow, it is asked.
            let heard = self.heard(|heard| *heard);
            if heard.is_failing && Instant::now() >= deadline(heard) {
                break FillError::TimeUp;
            }
            match self.fill(gap, &mut found, intake).await {
                Ok(()) => {
                    self.heard(|heard| *heard = Heard { answered: Some(Instant::now()), is_failing: false });
                    let messages = found.receipt.all_back().await.accepted();
                    return Some(Healed { messages, from: found.oldest, to: found.newest });
                }
                Err(error) => {
                    let wait = backoff.next_wait();
                    let is_transient = error.is_transient();
                    let heard = self.heard(|heard| {
                        heard.is_failing |= is_transient;
                        *heard
                    });
                    if !is_transient || Instant::now() + wait >= deadline(heard) {
                        break error;
                    }
                    sleep(wait).await;
                }
            }
        };
        let (error, service) = (with_causes(&error), &self.url);
        tracing::warn!(error_code = %ErrorCode::GapUnhealed, channel = gap.channel, error, service = ?service, "a gap could not be healed");
        None
    }

    fn heard<T>(&self, work: impl FnOnce(&mut Heard) -> T) -> T {
        work(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Fetches a gap from its end to its start, a page at a time.
    async fn fill(&self, gap: &Gap, found: &mut Found, intake: &Intake) -> Result<(), FillError> {
        let after = gap.from.checked_sub(MARGIN).unwrap_or(Timestamp::UNIX_EPOCH);
        let mut before = gap.to.checked_add(MARGIN).unwrap_or(gap.to);
        for _ in 0..MOST_PAGES {
            let body = self.fetch(&gap.channel, after, before).await?;
            let page: Page<'_> = serde_json::from_slice(&body).map_err(|error| unreadable(&error))?;
            let times = || page.messages.iter().filter_map(|line| received_at(line));
            let (oldest, newest) = (times().min(), times().max());
            self.offer(gap, after, &page.messages, (found, intake)).await;
            found.oldest = found.oldest.into_iter().chain(oldest).min();
            found.newest = found.newest.into_iter().chain(newest).max();
            if let Some(code) = page.error_code {
                return Err(FillError::Unknown(code_shown(&code)));
            }
            // The oldest may have neighbours of the same millisecond, so it is asked for again; nothing older: the end.
            let next = oldest.and_then(|oldest| oldest.checked_add(Duration::from_millis(1)).ok());
            match next.filter(|next| *next < before && page.messages.len() > 1) {
                Some(next) if next > after => before = next,
                _ => break,
            }
        }
        Ok(())
    }

    async fn fetch(&self, channel: &str, after: Timestamp, before: Timestamp) -> Result<Vec<u8>, FillError> {
        // The user-info is in the address; the library takes it out and makes a header of it.
        let (base, after, before) = (&self.url.0, after.as_millisecond(), before.as_millisecond());
        let url = format!(
            "{base}/api/v2/recent-messages/{channel}?limit={PAGE_LINES}&after={after}&before={before}"
        );
        let away = |error: reqwest::Error| FillError::Away(error.without_url());
        let mut response = self.client.get(url).send().await.map_err(away)?;
        if !response.status().is_success() {
            return Err(FillError::Status(response.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > LARGEST_PAGE {
                return Err(FillError::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// Brings lines to the door.
    async fn offer(
        &self,
        gap: &Gap,
        after: Timestamp,
        messages: &[Cow<'_, str>],
        (found, intake): (&Found, &Intake),
    ) {
        let taken_in = TakenIn { at: self.clock.now(), instant: StdInstant::now() };
        let mut lines = Lines::new();
        let mut drafts = Vec::new();
        for message in messages {
            lines.buffer().extend_from_slice(message.as_bytes());
            lines.buffer().extend_from_slice(b"\r\n");
            while let Some(line) = lines.next_line() {
                if let Reading::Draft(draft) = self.normalizer.read(line, taken_in)
                    && is_of(&draft, &gap.channel)
                {
                    let mut draft = *draft;
                    draft.slip = Some(found.receipt.slip());
                    // One without a time of its own was said in the gap all the same.
                    if draft.not_published_before == Timestamp::UNIX_EPOCH {
                        draft.not_published_before = after;
                    }
                    drafts.push(draft);
                }
            }
        }
        intake.offer(Origin::Backfill, drafts, Patience::Unlimited).await;
    }
}

/// Whether this is what was asked for.
fn is_of(draft: &Draft, channel: &str) -> bool {
    match &draft.content {
        Content::Event(event) => event.source.channel == channel,
        Content::Unusable { .. } => true,
    }
}

/// When the service received a line; when Twitch says it was sent, if the service does not say.
fn received_at(line: &str) -> Option<Timestamp> {
    let tags = wire::wire_tags(line);
    let of = |key: &str| {
        let value = tags.iter().find(|(name, _)| *name == key)?.1;
        Timestamp::from_millisecond(value.parse().ok()?).ok()
    };
    of("rm-received-ts").or_else(|| of("tmi-sent-ts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_and_shown_without_its_user_info() {
        let url = BackfillUrl::parse("https://user:hush@host:8443/history/").unwrap();
        assert!(url.is_tls() && url.0.ends_with("/history"));
        let shown = format!("{url:?} {}", serde_json::to_string(&url).unwrap());
        assert!(!shown.contains("hush") && shown.contains("host:8443/history"), "{shown}");
        for bad in ["host", "ftp://host", "https://", "http://u:hush@", "https://host?x=1", "https://host#x"]
        {
            let error = BackfillUrl::parse(bad).unwrap_err();
            assert!(!error.contains("hush"), "{error}");
        }
        assert!(!BackfillUrl::parse("http://127.0.0.1:1").unwrap().is_tls());
    }

    #[test]
    fn what_the_service_answers_is_not_repeated() {
        let body = br#"{"messages":"somebody's words"}"#;
        let Err(error) = serde_json::from_slice::<Page<'_>>(body) else { panic!("that is no page") };
        assert!(error.to_string().contains("words"), "the reason for all this");
        assert_eq!(
            with_causes(&unreadable(&error)),
            "the answer is not what the API says, in line 1, column 30"
        );
        assert_eq!(code_shown("channel_not_joined"), "channel_not_joined");
        for other in ["somebody's words", "a\nb", "<html>", &"x".repeat(LONGEST_CODE + 1)] {
            assert_eq!(code_shown(other), "no code");
        }
    }

    #[test]
    fn a_lines_time_is_the_services_or_twitchs() {
        let at = |line| received_at(line).map(Timestamp::as_millisecond);
        assert_eq!(at("@rm-received-ts=2;tmi-sent-ts=1 PING"), Some(2));
        assert_eq!(at("@tmi-sent-ts=1 PING"), Some(1));
        assert_eq!(at("@tmi-sent-ts=x PING"), None);
        assert_eq!(at("PING"), None);
    }
}
