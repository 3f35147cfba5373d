//! Counters with closed label sets. The registry is a value; every series exists from the start, at 0, so a
//! dashboard never has to guess whether "no series" means "never" or "not yet".

use std::marker::PhantomData;

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// A label with a closed set of values: an enum of our own, its values as they stand in `/metrics`.
pub trait Label: Copy + 'static {
    /// Every value, in order of [`Label::index`].
    const ALL: &'static [Self];
    /// The value's text.
    fn as_str(self) -> &'static str;
    /// The value's place in [`Label::ALL`].
    fn index(self) -> usize;
}

/// Declares an enum as a [`Label`].
#[macro_export]
macro_rules! label {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$doc:meta])* $variant:ident => $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $crate::telemetry::metrics::Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];
            fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
            fn index(self) -> usize {
                self as usize
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str($crate::telemetry::metrics::Label::as_str(*self))
            }
        }
    };
}

/// Registers series under the namespace `inlet_`.
pub struct Register<'a>(pub &'a Registry);

impl Register<'_> {
    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> prometheus::Result<C> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    /// A counter without labels.
    pub fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::with_opts(Opts::new(name, help).namespace("inlet"))?)
    }

    /// A gauge without labels.
    pub fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::with_opts(Opts::new(name, help).namespace("inlet"))?)
    }

    /// A counter for each value of `L`.
    pub fn counters<L: Label>(&self, name: &str, help: &str, label: &str) -> prometheus::Result<Counters<L>> {
        let family = IntCounterVec::new(Opts::new(name, help).namespace("inlet"), &[label])?;
        let counters = L::ALL.iter().map(|value| family.with_label_values(&[value.as_str()])).collect();
        self.add(family)?;
        Ok(Counters { counters, label: PhantomData })
    }

    /// A counter for each pair of values.
    pub fn counters_by<A: Label, B: Label>(
        &self,
        name: &str,
        help: &str,
        labels: [&str; 2],
    ) -> prometheus::Result<CountersBy<A, B>> {
        let family = IntCounterVec::new(Opts::new(name, help).namespace("inlet"), &labels)?;
        let counters = A::ALL
            .iter()
            .flat_map(|a| B::ALL.iter().map(|b| family.with_label_values(&[a.as_str(), b.as_str()])))
            .collect();
        self.add(family)?;
        Ok(CountersBy { counters, labels: PhantomData })
    }

    /// A gauge for each value of `L`.
    pub fn gauges<L: Label>(&self, name: &str, help: &str, label: &str) -> prometheus::Result<Gauges<L>> {
        let family = IntGaugeVec::new(Opts::new(name, help).namespace("inlet"), &[label])?;
        let gauges = L::ALL.iter().map(|value| family.with_label_values(&[value.as_str()])).collect();
        self.add(family)?;
        Ok(Gauges { gauges, label: PhantomData })
    }

    /// A histogram of seconds with the buckets of [`LATENCY_BUCKETS`].
    pub fn latency(&self, name: &str, help: &str) -> prometheus::Result<Histogram> {
        let options = HistogramOpts::new(name, help).namespace("inlet").buckets(LATENCY_BUCKETS.to_vec());
        self.add(Histogram::with_opts(options)?)
    }

    /// A histogram of seconds for each value of `L`, in order of [`Label::index`].
    pub fn latencies<L: Label>(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> prometheus::Result<Vec<Histogram>> {
        let options = HistogramOpts::new(name, help).namespace("inlet").buckets(LATENCY_BUCKETS.to_vec());
        let family = HistogramVec::new(options, &[label])?;
        let histograms = L::ALL.iter().map(|value| family.with_label_values(&[value.as_str()])).collect();
        self.add(family)?;
        Ok(histograms)
    }
}

/// Seconds. Fine around the promised 5 ms, coarse up to the longest time-out.
pub const LATENCY_BUCKETS: &[f64] = &[
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.001_5, 0.002, 0.003, 0.004, 0.005, 0.007_5, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// Counters by one label.
pub struct Counters<L> {
    counters: Vec<IntCounter>,
    label: PhantomData<fn(L)>,
}

impl<L: Label> Counters<L> {
    /// The counter of `value`.
    pub fn of(&self, value: L) -> &IntCounter {
        &self.counters[value.index()]
    }
}

/// Counters by two labels.
pub struct CountersBy<A, B> {
    counters: Vec<IntCounter>,
    labels: PhantomData<fn(A, B)>,
}

impl<A: Label, B: Label> CountersBy<A, B> {
    /// The counter of the pair.
    pub fn of(&self, a: A, b: B) -> &IntCounter {
        &self.counters[a.index() * B::ALL.len() + b.index()]
    }

    /// The sum over the first label.
    pub fn sum_by(&self, b: B) -> u64 {
        A::ALL.iter().map(|a| self.of(*a, b).get()).sum()
    }

    /// The sum over the second label.
    pub fn sum_of(&self, a: A) -> u64 {
        B::ALL.iter().map(|b| self.of(a, *b).get()).sum()
    }
}

/// Gauges by one label.
pub struct Gauges<L> {
    gauges: Vec<IntGauge>,
    label: PhantomData<fn(L)>,
}

impl<L: Label> Gauges<L> {
    /// The gauge of `value`.
    pub fn of(&self, value: L) -> &IntGauge {
        &self.gauges[value.index()]
    }
}
