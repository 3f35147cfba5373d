//! Every code under which Inlet says that something went wrong: in the log (`errorCode`), in answers of the operator's
//! HTTP, in dead letters, in the audit. One closed list, so that each can be looked up and counted.
//!
//! A new code is a row here; its doc comment is what it means, the text behind it what to do. `docs/errors.md` is made
//! from this.

use crate::label;
use crate::telemetry::metrics::Label as _;

/// An error that knows its code.
pub trait Coded {
    /// The code under which it is counted and answered.
    fn code(&self) -> ErrorCode;
}

macro_rules! codes {
    ($($(#[doc = $meaning:literal])+ $variant:ident => $text:literal, $status:expr, $help:literal;)+) => {
        label! {
            /// Every code.
            pub enum ErrorCode { $($(#[doc = $meaning])+ $variant => $text,)+ }
        }

        impl ErrorCode {
            /// What it means.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($meaning),+).trim_ascii_start(),)+ }
            }

            /// What to do about it.
            pub fn help(self) -> &'static str {
                match self { $(Self::$variant => $help,)+ }
            }

            /// The HTTP status of an answer that carries it; `None` for one that is never answered.
            pub fn status(self) -> Option<u16> {
                match self { $(Self::$variant => $status,)+ }
            }

            /// The code of this text.
            pub fn of_text(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|code| code.as_str() == text)
            }
        }
    };
}

codes! {
    /// The request makes no sense.
    BadRequest => "bad_request", Some(400), "Read the message: it says which part of the request.";
    /// The token is missing or wrong.
    Unauthorized => "unauthorized", Some(401),
        "Send `Authorization: Bearer` with ADMIN_TOKEN or ADMIN_TOKEN_NEXT. Many of these: somebody guesses.";
    /// No token is set, and the request is not from this machine.
    LoopbackOnly => "loopback_only", Some(403), "Set ADMIN_TOKEN to use this from elsewhere.";
    /// A page of another site asks, and it is not listed.
    OriginNotAllowed => "origin_not_allowed", Some(403), "List the page's origin in STREAM_ORIGINS.";
    /// There is nothing of that name.
    NotFound => "not_found", Some(404), "Check the address; of a user or a channel, the id.";
    /// The path does not take this method.
    MethodNotAllowed => "method_not_allowed", Some(405), "Use another method.";
    /// The request's body did not come in time.
    RequestTimeout => "request_timeout", Some(408), "Send it again; look at the network if it goes on.";
    /// It does not fit what is there already, or somebody else changed it at the same time.
    Conflict => "conflict", Some(409), "Look at what is there now, then do it again.";
    /// The request's body is larger than is taken.
    BodyTooLarge => "body_too_large", Some(413), "Send less at a time.";
    /// All places for readers are taken.
    TooManyClients => "too_many_clients", Some(503), "Raise STREAM_MAX_CLIENTS, or close readers.";
    /// The bus is away, or acknowledges nothing. Events wait in the outbox.
    BusUnavailable => "bus_unavailable", Some(503),
        "Look at NATS and the way to it; `parts.bus` in /healthz says why. Nothing is lost while the outbox has room.";
    /// The store of users and documents is away, or does not answer in time. Events flow on without their users.
    StoreUnavailable => "store_unavailable", Some(503),
        "Look at Firestore and the way to it; `parts.store` in /healthz says more. Counts catch up by themselves.";
    /// The store answers, and refuses: a permission, a missing database, a document too large.
    StoreRefused => "store_refused", Some(502),
        "Read the store's own code and words beside it in the log; check the service account's role and the database.";
    /// The service is shutting down.
    ShuttingDown => "shutting_down", Some(503), "Ask again: the next instance answers.";
    /// The audit record of an operator's act cannot be written, so the act was not done.
    AuditUnavailable => "audit_unavailable", Some(503), "Look at the store; then do it again.";
    /// Something in Inlet itself.
    Internal => "internal", Some(500), "Report it, with the log lines of its request id.";

    /// An operator's act was done (or failed), but that could not be added to its audit record, which stays `begun`.
    AuditIncomplete => "audit_incomplete", None, "Look at the store; the log line names the record and the outcome.";

    /// The bus answers, but has no stream that can be used.
    BusUnfit => "bus_unfit", None, "Read the reason in the log: a stream that overlaps, or without a duplicate window.";
    /// The stream keeps too little for every event to be counted after a crash.
    StreamUnsafe => "stream_unsafe", None, "Give the stream limits retention and a longer max age.";
    /// The stream was deleted, and has been created again; what it held is lost.
    StreamRecreated => "stream_recreated", None, "Find out who deletes streams.";
    /// The embedded stream cannot be written.
    StreamUnwritable => "stream_unwritable", None, "Look at the disk of DATA_DIR: space, permissions, health.";
    /// A row of the embedded stream is not what was written, and is passed over.
    StreamDamaged => "stream_damaged", None, "Check the disk of DATA_DIR; those events are lost.";
    /// The stream cannot be searched for late events, and none is sent until it can.
    LookBackFailed => "look_back_failed", None, "Read the bus's words in the log; permissions on the stream, most likely.";

    /// `DATA_DIR` lies in memory: what is in the outbox is lost with this machine.
    OutboxInMemory => "outbox_in_memory", None, "Mount a disk for DATA_DIR, or accept it (the README says what survives).";
    /// The outbox is full: nothing more is taken off the door.
    OutboxFull => "outbox_full", None, "Bring the bus back, or raise OUTBOX_MAX_BYTES.";
    /// The outbox cannot be written: events stay in memory.
    OutboxUnwritable => "outbox_unwritable", None, "Look at the disk of DATA_DIR: space, permissions, health.";
    /// Part of the outbox is not what was written; its events are lost, or the file was set aside.
    OutboxTorn => "outbox_torn", None, "Check the disk of DATA_DIR; a file that was set aside lies beside it.";
    /// The door is full: events are refused and lost until the bus takes them again.
    DoorFull => "door_full", None, "Bring the bus back; then raise INTAKE_MAX_EVENTS or OUTBOX_MAX_BYTES.";

    /// The stream cannot be counted: it may not be read, or another instance publishes to another subject.
    StreamUncountable => "stream_uncountable", None, "Read the reason in the log; counts stand still until it is mended.";
    /// Events are not counted yet; they will be, after the store is back or at the next start.
    CountsDeferred => "counts_deferred", None, "Nothing, if it is rare; else look at the store's speed.";
    /// Events are gone from the stream, or given up, before they were counted.
    CountsLost => "counts_lost", None, "Let the stream keep messages for longer: NATS_STREAM_MAX_AGE, NATS_STREAM_MAX_BYTES; or mend the user's document that the log names.";
    /// A stored value has the wrong shape, and is taken for absent.
    BadStoredValue => "bad_stored_value", None, "Mend the fields that the log names; somebody wrote them by hand.";

    /// No channels are set, so no chat is read.
    NoChannels => "no_channels", None, "Set TWITCH_CHANNELS, or run `inlet channel add`.";
    /// Twitch refuses the login, or the bot's token.
    LoginFailed => "login_failed", None,
        "Run `inlet login`, or set TWITCH_BOT_ACCESS_TOKEN anew; check that it belongs to TWITCH_BOT_USERNAME.";
    /// Twitch's OAuth does not answer, or fails: the bot's token can be neither validated nor refreshed.
    OAuthUnavailable => "oauth_unavailable", None, "Nothing, if it passes: the token stays in use, and it is asked again.";
    /// Twitch does not know the application, or its secret is wrong or missing: the bot's token cannot be refreshed.
    ClientRefused => "client_refused", None, "Correct TWITCH_CLIENT_ID and TWITCH_CLIENT_SECRET.";
    /// The bot's token does not allow reading chat.
    ScopeMissing => "scope_missing", None, "Run `inlet login`.";
    /// What is stored as the bot's token is none.
    TokenUnusable => "token_unusable", None, "Run `inlet login`, or write the token document anew.";
    /// Twitch's API does not tell which logins the channels' rooms have now.
    ApiUnavailable => "api_unavailable", None,
        "Nothing, if it passes; until then a channel that was renamed may be missed. Look at TWITCH_API_URL.";
    /// A wanted login answers as another room: its channel was renamed, and somebody else has the name now.
    ChannelChanged => "channel_changed", None, "Nothing; if it is wanted as well, remove it and add it again.";
    /// Twitch cannot be reached.
    ConnectFailed => "connect_failed", None, "Look at the network; it is tried again by itself.";
    /// A connection to Twitch failed.
    ConnectionFailed => "connection_failed", None, "Nothing, if it is rare; it is made again by itself.";
    /// Twitch closed a connection.
    ConnectionClosed => "connection_closed", None, "Nothing, if it is rare; it is made again by itself.";
    /// Twitch did not answer.
    NoAnswer => "no_answer", None, "Look at the network; it is tried again by itself.";
    /// More channels than Twitch lets an account join.
    TooManyChannels => "too_many_channels", None, "Take fewer channels, or a verified account.";
    /// Twitch refuses a channel, or put us out of it.
    ChannelRefused => "channel_refused", None, "See /_debug/twitch: the bot is banned there, or the channel is suspended.";
    /// What was said while a channel was not heard could not be fetched.
    GapUnhealed => "gap_unhealed", None, "Look at TWITCH_BACKFILL_URL; the gap stays in the stream as an event.";
    /// A line that is no good; more of its kind are only counted.
    BadLine => "bad_line", None, "Nothing, if it is rare; its bytes are in a dead letter.";
    /// A note in `DATA_DIR` cannot be read or written: of when each channel was last heard, of who is kept out, or of who
    /// holds the folder.
    NoteUnusable => "note_unusable", None,
        "Look at the disk of DATA_DIR; the next gap may be told too long, a start without the store keeps nobody out.";

    /// Dead letter: a line longer than a source reads.
    LineTooLong => "line_too_long", None, "Read the dead letter.";
    /// Dead letter: bytes that are no line of the platform's grammar.
    Unparsable => "unparsable", None, "Read the dead letter; many of them: the platform changed.";
    /// Dead letter: a line of a known kind that lacks what makes it one.
    NotNormalizable => "not_normalizable", None, "Read the dead letter; many of them: the platform changed.";
    /// Dead letter: larger than the bus takes.
    TooLarge => "too_large", None, "Raise the bus's max_payload.";
    /// Dead letter: the bus does not take its subject.
    BadSubject => "bad_subject", None, "Check PUBLISH_SUBJECT and BUS_PREFIX.";
    /// Dead letter: the bus refused it, each time it was tried.
    Refused => "refused", None, "Read the bus's words in the dead letter.";
    /// The bus does not even take the dead letter; the event exists in the log alone.
    Undeliverable => "undeliverable", None, "Read the bus's words in the log; the event is lost.";

    /// A token is so short that it can be guessed.
    WeakToken => "weak_token", None, "Choose 32 random bytes: `openssl rand -base64 32`.";
    /// Connections to the operator's HTTP cannot be taken.
    AcceptFailed => "accept_failed", None, "Raise the limit of open files (`ulimit -n`).";
    /// The demo's temporary folder could not be removed.
    LeftBehind => "left_behind", None, "Remove it; the log line names it.";
    /// A part of the service ended that should not have; the service shuts down.
    PartEnded => "part_ended", None, "Report it, with the panic's line before it.";
    /// A panic.
    Panic => "panic", None, "Report it, with its location.";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_is_one_word_of_its_own_with_a_meaning_and_a_help() {
        let texts: BTreeSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(texts.len(), ErrorCode::ALL.len());
        for code in ErrorCode::ALL {
            let text = code.as_str();
            assert!(text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{text}");
            assert!(code.meaning().ends_with('.') && code.help().ends_with('.'), "{text}");
            assert!(code.status().is_none_or(|status| (400..600).contains(&status)), "{text}");
            assert_eq!(ErrorCode::of_text(text), Some(*code));
        }
        assert_eq!(ErrorCode::of_text("no such code"), None);
    }
}
