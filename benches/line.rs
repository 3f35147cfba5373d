//! What one line costs on its way to an envelope: `cargo bench --bench line`.

#![allow(clippy::expect_used, missing_docs, reason = "a benchmark that cannot start must stop")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use inlet::clock::Clock;
use inlet::envelope::{Draft, Origin, SubjectTemplate};
use inlet::pipeline::Enrich;
use inlet::source::twitch::lines::Line;
use inlet::source::twitch::normalize::TakenIn;
use inlet::source::twitch::{Normalizer, Reading, SharedChatMode, TwitchMetrics};

const LINE: &[u8] = b"@badge-info=subscriber/13;badges=moderator/1,subscriber/12;client-nonce=0123456789abcdef0123456789abcdef;\
color=#AABBCC;display-name=Some_Login;emotes=25:6-10;first-msg=0;flags=;id=885196de-cb67-427a-baa8-82f9b0fcd05f;mod=1;\
returning-chatter=0;room-id=22484632;subscriber=1;tmi-sent-ts=1795000000000;turbo=0;user-id=29025231;user-type=mod \
:some_login!some_login@some_login.tmi.twitch.tv PRIVMSG #my_channel :Hello Kappa! How is everybody doing today?";

fn draft(normalizer: &Normalizer, taken_in: TakenIn) -> Option<Draft> {
    match normalizer.read(Line::Whole(Bytes::from_static(LINE)), taken_in) {
        Reading::Draft(draft) => Some(*draft),
        Reading::Protocol(_) | Reading::Empty => None,
    }
}

fn line(criterion: &mut Criterion) {
    let metrics = TwitchMetrics::new(&prometheus::Registry::new()).expect("fresh registry");
    let normalizer = Normalizer::new(Origin::Twitch, SharedChatMode::SourceOnly, Arc::new(metrics));
    let clock = Clock::system();
    let taken_in = TakenIn { at: clock.now(), instant: Instant::now() };
    let enrich =
        Enrich::new(SubjectTemplate::new("", "internal.ingress.v1").expect("a subject"), None, clock);
    let mut group = criterion.benchmark_group("line");
    group.throughput(Throughput::Elements(1));
    group.bench_function("normalize", |bencher| {
        bencher.iter(|| black_box(draft(&normalizer, taken_in)));
    });
    group.bench_function("normalize and write", |bencher| {
        bencher.iter(|| {
            let drafts = draft(&normalizer, taken_in).into_iter().collect();
            black_box(enrich.batch(drafts, 1 << 20))
        });
    });
    group.finish();
}

criterion_group!(benches, line);
criterion_main!(benches);
