//! Twitch chat: our own connection, `twitch-irc` for the grammar (see `docs/adr`).
//!
//! ```text
//! connection ──bytes──▶ lines ──▶ wire (grammar) ──▶ normalize ──drafts──▶ the door
//!     └─ joins: which channel to ask for next          └─ text: emotes, badges, roles
//! ```
//! [`replay`] feeds captured lines through the same path.

mod connection;
mod dial;
mod joins;
pub mod lines;
pub mod metrics;
pub mod normalize;
pub mod replay;
pub mod settings;
pub mod status;
mod text;
mod wire;

pub use connection::Twitch;
pub use metrics::TwitchMetrics;
pub use normalize::{Normalizer, Reading, SharedChatMode};
pub use replay::ReplayDoor;
pub use settings::{TwitchArgs, TwitchConfig};
pub use status::TwitchStatus;
