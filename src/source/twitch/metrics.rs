//! What the Twitch source counts besides events.

use prometheus::{IntCounter, IntGauge, Registry};

use crate::label;
use crate::telemetry::metrics::{Counters, Gauges, Register};

label! {
    /// What was wrong with a line.
    pub enum BadLine {
        /// Nothing in it.
        Empty => "empty",
        /// Bytes that are no UTF-8; replaced, the line went on.
        InvalidUtf8 => "invalid_utf8",
        /// Longer than is read.
        TooLong => "too_long",
        /// No line of IRC.
        Unparsable => "unparsable",
        /// A command of ours that lacks what makes it an event.
        NotNormalizable => "not_normalizable",
    }
}

label! {
    /// How a channel is.
    pub enum ChannelState {
        /// To be joined, or asked for and not confirmed.
        Wanted => "wanted",
        /// Confirmed.
        Joined => "joined",
        /// Refused, or never answered.
        Failed => "failed",
    }
}

/// The series.
pub struct TwitchMetrics {
    /// 1 while logged in on any connection.
    pub connected: IntGauge,
    /// Channels by state.
    pub channels: Gauges<ChannelState>,
    /// Connections that came to stand in the place of lost ones.
    pub reconnects: IntCounter,
    /// Lines that were not as they should be.
    pub bad_lines: Counters<BadLine>,
    /// Emotes that do not fit their text.
    pub emote_ranges_dropped: IntCounter,
}

impl TwitchMetrics {
    /// Registers the series.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let register = Register(registry);
        Ok(Self {
            connected: register.gauge("twitch_connected", "1 while a connection to Twitch is logged in")?,
            channels: register.gauges("twitch_channels", "Channels by state", "state")?,
            reconnects: register.counter(
                "twitch_reconnects_total",
                "Connections that came to stand in the place of lost ones",
            )?,
            bad_lines: register.counters(
                "twitch_bad_lines_total",
                "Lines that were not as they should be",
                "kind",
            )?,
            emote_ranges_dropped: register
                .counter("twitch_emote_ranges_dropped_total", "Emote ranges that do not fit their text")?,
        })
    }
}
