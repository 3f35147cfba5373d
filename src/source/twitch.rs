//! Twitch chat: our own connection, `twitch-irc` for the grammar (see `docs/adr`).
//!
//! ```text
//! connection ──bytes──▶ lines ──▶ wire (grammar) ──▶ normalize ──drafts──▶ the door
//!     │ ▲ one task each                                └─ text: emotes, badges, roles
//!     ▼ │
//!   fleet ── plan: which channel is where, which to ask for next ── pacer
//!     │ ╲▲── roster: which are wanted; which rooms answer to them
//!     │  credentials ── the account: its token, validated and refreshed
//!     │
//!   ledger ── since when each channel is heard, what was missed ── note, in `DATA_DIR`
//!     ▼
//!    heal ──what a history service knows (backfill), gap events──▶ the door
//! ```
//! [`replay`] feeds captured lines through the same path.

mod backfill;
mod connection;
pub mod credentials;
mod dial;
mod fleet;
mod gap;
mod heal;
mod helix;
mod known;
mod ledger;
pub mod lines;
pub mod look;
pub mod metrics;
pub mod normalize;
mod note;
mod pacer;
mod plan;
pub mod replay;
pub mod roster;
pub mod settings;
pub mod status;
mod text;
mod wire;

pub use backfill::BackfillUrl;
pub use credentials::Credentials;
pub use fleet::{SetupError, Surroundings, Twitch};
pub use metrics::TwitchMetrics;
pub use normalize::{Normalizer, Reading, SharedChatMode};
pub use replay::ReplayDoor;
pub use roster::{RoomId, Roster, Sight, Sights, Wanted, is_login};
pub use settings::{TwitchArgs, TwitchConfig};
pub use status::TwitchStatus;
