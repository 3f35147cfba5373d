//! A TCP proxy between the service and something it depends on: it passes, cuts, hangs, swallows, delays, throttles, or
//! spoils what comes through, over real sockets, and changes its mind at run time, for every connection or for those that
//! stand at that moment.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use inlet::tasks::Tasks;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What is read at a time, and what a delay applies to.
const CHUNK_BYTES: usize = 16 * 1024;
/// A client that dials again and again while nobody answers must not take every descriptor of the test.
const MOST_CONNECTIONS: usize = 512;
/// A throttled connection gets its bytes in so many portions a second.
const PORTIONS_PER_SECOND: u32 = 50;

/// What happens to what comes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It arrives.
    Pass,
    /// Connections are closed, new ones at once.
    Cut,
    /// Connections are taken; nothing is read, nothing is answered, nothing is closed.
    Hang,
    /// Half open: what goes this way is taken and is gone, and nobody is told.
    Swallow(Way),
    /// One byte in so many is left out.
    Drop(Way, u32),
    /// One byte in so many has a bit flipped.
    Corrupt(Way, u32),
    /// Each chunk that goes this way arrives so much later.
    Delay(Way, Duration),
    /// At most so many bytes a second, each way.
    Throttle(u32),
}

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
    Both,
}

impl Way {
    fn covers(self, way: Self) -> bool {
        self == Self::Both || self == way
    }
}

/// What applies to whom: connections are numbered as they come.
#[derive(Debug, Clone, Copy)]
struct Rules {
    /// For those up to `last_standing`.
    standing: Mode,
    last_standing: u64,
    /// For those after it.
    later: Mode,
}

impl Rules {
    fn of(&self, connection: u64) -> Mode {
        if connection <= self.last_standing { self.standing } else { self.later }
    }
}

/// A proxy on a free port. Dropping it closes everything.
pub struct Proxy {
    addr: SocketAddr,
    rules: watch::Sender<Rules>,
    record: Arc<Record>,
    _tasks: Tasks,
}

/// What came by.
#[derive(Default)]
struct Record {
    /// How many connections were accepted, and when each reached the target.
    connections: Mutex<(u64, Vec<Instant>)>,
}

impl Proxy {
    /// Listens, and passes on to `target`, which may come later.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (rules, follow) =
            watch::channel(Rules { standing: Mode::Pass, last_standing: 0, later: Mode::Pass });
        let record = Arc::new(Record::default());
        let mut tasks = Tasks::new();
        tasks.spawn("proxy", listen(listener, target, follow, Arc::clone(&record)));
        Self { addr, rules, record, _tasks: tasks }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on, for all connections.
    pub fn set(&self, mode: Mode) {
        self.rules.send_replace(Rules { standing: mode, last_standing: 0, later: mode });
    }

    /// From now on, for the connections that stand; those that come are passed.
    pub fn set_standing(&self, mode: Mode) {
        let last_standing = self.record.connections.lock().unwrap().0;
        self.rules.send_replace(Rules { standing: mode, last_standing, later: Mode::Pass });
    }

    /// When the first connection after `since` reached the target.
    pub fn first_connection_after(&self, since: Instant) -> Option<Instant> {
        self.record.connections.lock().unwrap().1.iter().copied().find(|at| *at >= since)
    }
}

/// One connection's view of the rules.
#[derive(Clone)]
struct Ruled {
    rules: watch::Receiver<Rules>,
    connection: u64,
}

impl Ruled {
    fn mode(&self) -> Mode {
        self.rules.borrow().of(self.connection)
    }

    /// Waits for a mode that suits; none once the proxy is gone.
    async fn until(&mut self, suits: impl Fn(Mode) -> bool) -> Option<Mode> {
        let connection = self.connection;
        let rules = self.rules.wait_for(|rules| suits(rules.of(connection))).await;
        rules.ok().map(|rules| rules.of(connection))
    }

    /// Waits while everything hangs.
    async fn flowing(&mut self) -> Option<Mode> {
        self.until(|mode| mode != Mode::Hang).await
    }
}

async fn listen(
    listener: TcpListener,
    target: SocketAddr,
    rules: watch::Receiver<Rules>,
    record: Arc<Record>,
) {
    let mut connections = Tasks::new();
    while let Ok((client, _)) = listener.accept().await {
        connections.forget_finished();
        let connection = {
            let mut record = record.connections.lock().unwrap();
            record.0 += 1;
            record.0
        };
        let ruled = Ruled { rules: rules.clone(), connection };
        if ruled.mode() != Mode::Cut && connections.len() < MOST_CONNECTIONS {
            let work = carry(client, target, ruled.clone(), Arc::clone(&record));
            connections.spawn("proxied connection", unless(cut(ruled), work));
        }
    }
}

/// Drops `work`, and what it holds, as soon as `end` comes.
async fn unless(end: impl Future<Output = ()>, work: impl Future<Output = ()>) {
    tokio::select! {
        () = end => {}
        () = work => {}
    }
}

async fn cut(mut ruled: Ruled) {
    // Without a sender the proxy is gone, and its tasks with it.
    let _gone = ruled.until(|mode| mode == Mode::Cut).await.is_none();
}

async fn carry(client: TcpStream, target: SocketAddr, mut ruled: Ruled, record: Arc<Record>) {
    let Some(_) = ruled.flowing().await else { return };
    let Ok(server) = TcpStream::connect(target).await else { return };
    record.connections.lock().unwrap().1.push(Instant::now());
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(
        pump(from_client, to_server, ruled.clone(), Way::Up),
        pump(from_server, to_client, ruled, Way::Down)
    );
}

/// One direction to its end. A half-closed connection stays one: the other direction goes on.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut ruled: Ruled, way: Way) {
    let mut chunk = vec![0; CHUNK_BYTES];
    // The same connection is spoiled in the same places.
    let mut random = fastrand::Rng::with_seed(ruled.connection);
    loop {
        let Some(mode) = ruled.flowing().await else { return };
        let most = match mode {
            Mode::Throttle(rate) => (rate / PORTIONS_PER_SECOND).max(1) as usize,
            _ => CHUNK_BYTES,
        };
        let read = tokio::select! {
            biased;
            Ok(()) = ruled.rules.changed() => continue,
            read = from.read(&mut chunk[..most.min(CHUNK_BYTES)]) => read,
        };
        let Ok(count @ 1..) = read else { return };
        match mode {
            Mode::Delay(which, span) if which.covers(way) => tokio::time::sleep(span).await,
            Mode::Throttle(_) => tokio::time::sleep(Duration::from_secs(1) / PORTIONS_PER_SECOND).await,
            _ => {}
        }
        let Some(mode) = ruled.flowing().await else { return };
        let passed = spoiled(&chunk[..count], mode, way, &mut random);
        if to.write_all(&passed).await.is_err() {
            return;
        }
    }
}

/// What is left of a chunk that goes this way.
fn spoiled(chunk: &[u8], mode: Mode, way: Way, random: &mut fastrand::Rng) -> Vec<u8> {
    match mode {
        Mode::Swallow(which) if which.covers(way) => Vec::new(),
        Mode::Drop(which, one_in) if which.covers(way) => {
            chunk.iter().copied().filter(|_| random.u32(..one_in) != 0).collect()
        }
        Mode::Corrupt(which, one_in) if which.covers(way) => {
            let mut flip = |byte: u8| {
                let is_hit = random.u32(..one_in) == 0;
                if is_hit { byte ^ (1 << random.u32(..8)) } else { byte }
            };
            chunk.iter().map(|byte| flip(*byte)).collect()
        }
        _ => chunk.to_vec(),
    }
}

/// Longer than anything takes that is not held up.
const AT_ONCE: Duration = Duration::from_secs(5);
/// So long nothing must come.
const QUIET: Duration = Duration::from_millis(200);

/// Says back what it hears.
async fn echo() -> (SocketAddr, Tasks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut tasks = Tasks::new();
    tasks.spawn("echo", async move {
        let mut connections = Tasks::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn("echo", async move {
                let (mut from, mut to) = stream.into_split();
                drop(tokio::io::copy(&mut from, &mut to).await);
            });
        }
    });
    (addr, tasks)
}

async fn says_back(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    hears(stream, text).await;
}

async fn hears(stream: &mut TcpStream, text: &[u8]) {
    let mut heard = vec![0; text.len()];
    tokio::time::timeout(AT_ONCE, stream.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard, text);
}

async fn stays_quiet(stream: &mut TcpStream) {
    let heard = tokio::time::timeout(QUIET, stream.read(&mut [0])).await;
    assert!(heard.is_err(), "{heard:?} came through");
}

async fn is_closed(stream: &mut TcpStream) {
    let end = tokio::time::timeout(AT_ONCE, stream.read(&mut [0])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn it_passes_both_ways_and_half_closes() {
    let (target, _echo) = echo().await;
    let proxy = Proxy::to(target).await;
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    says_back(&mut stream, b"hello").await;
    let long: Vec<u8> = (0..CHUNK_BYTES * 3).map(|at| u8::try_from(at % 251).unwrap()).collect();
    says_back(&mut stream, &long).await;
    stream.write_all(b"last").await.unwrap();
    stream.shutdown().await.unwrap();
    hears(&mut stream, b"last").await;
    is_closed(&mut stream).await;
}

#[tokio::test]
async fn cut_closes_what_stands_and_what_comes_until_it_passes_again() {
    let (target, _echo) = echo().await;
    let proxy = Proxy::to(target).await;
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    says_back(&mut stream, b"hello").await;
    proxy.set(Mode::Cut);
    is_closed(&mut stream).await;
    is_closed(&mut TcpStream::connect(proxy.addr()).await.unwrap()).await;
    proxy.set(Mode::Pass);
    says_back(&mut TcpStream::connect(proxy.addr()).await.unwrap(), b"again").await;
}

#[tokio::test]
async fn hang_holds_everything_and_loses_nothing() {
    let (target, _echo) = echo().await;
    let proxy = Proxy::to(target).await;
    let mut old = TcpStream::connect(proxy.addr()).await.unwrap();
    says_back(&mut old, b"hello").await;
    proxy.set(Mode::Hang);
    let mut new = TcpStream::connect(proxy.addr()).await.unwrap();
    for stream in [&mut old, &mut new] {
        stream.write_all(b"anybody there?").await.unwrap();
        stays_quiet(stream).await;
    }
    proxy.set(Mode::Pass);
    for stream in [&mut old, &mut new] {
        hears(stream, b"anybody there?").await;
    }
    proxy.set(Mode::Hang);
    proxy.set(Mode::Cut);
    is_closed(&mut old).await;
}

#[tokio::test]
async fn delay_holds_each_chunk_back_either_way() {
    let (target, _echo) = echo().await;
    let proxy = Proxy::to(target).await;
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    says_back(&mut stream, b"hello").await;
    proxy.set(Mode::Delay(Way::Both, Duration::from_millis(100)));
    let start = std::time::Instant::now();
    says_back(&mut stream, b"slowly").await;
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
}

#[tokio::test]
async fn swallowed_is_gone_without_a_word_and_only_for_those_that_stand() {
    let (target, _echo) = echo().await;
    let proxy = Proxy::to(target).await;
    for way in [Way::Up, Way::Down, Way::Both] {
        let mut old = TcpStream::connect(proxy.addr()).await.unwrap();
        says_back(&mut old, b"hello").await;
        proxy.set_standing(Mode::Swallow(way));
        old.write_all(b"anybody there?").await.unwrap();
        stays_quiet(&mut old).await;
        says_back(&mut TcpStream::connect(proxy.addr()).await.unwrap(), b"a new one").await;
        proxy.set(Mode::Pass);
        // What was swallowed does not come back.
        says_back(&mut old, b"and now?").await;
    }
}

#[tokio::test]
async fn some_bytes_are_dropped_or_corrupted() {
    let (target, _echo) = echo().await;
    let proxy = Proxy::to(target).await;
    let said = vec![b'x'; CHUNK_BYTES];
    proxy.set(Mode::Corrupt(Way::Down, 100));
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    stream.write_all(&said).await.unwrap();
    let mut heard = vec![0; said.len()];
    tokio::time::timeout(AT_ONCE, stream.read_exact(&mut heard)).await.unwrap().unwrap();
    let wrong = heard.iter().filter(|byte| **byte != b'x').count();
    assert!((20..1_000).contains(&wrong), "{wrong} of {}", said.len());

    proxy.set(Mode::Drop(Way::Up, 100));
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    stream.write_all(&said).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut heard = Vec::new();
    tokio::time::timeout(AT_ONCE, stream.read_to_end(&mut heard)).await.unwrap().unwrap();
    let gone = said.len() - heard.len();
    assert!((20..1_000).contains(&gone), "{gone} of {}", said.len());
}

#[tokio::test]
async fn throttled_it_takes_its_time_and_all_arrives() {
    let (target, _echo) = echo().await;
    let proxy = Proxy::to(target).await;
    proxy.set(Mode::Throttle(20_000));
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    let start = Instant::now();
    says_back(&mut stream, &[7; 10_000]).await;
    assert!(start.elapsed() >= Duration::from_millis(450), "{:?}", start.elapsed());
    let later = Instant::now();
    assert!(proxy.first_connection_after(later).is_none());
    drop(TcpStream::connect(proxy.addr()).await.unwrap());
    super::eventually("another connection", || async { proxy.first_connection_after(later) }).await;
}

#[tokio::test]
async fn what_is_dropped_is_closed() {
    let (target, _echo) = echo().await;
    let proxy = Proxy::to(target).await;
    let addr = proxy.addr();
    let mut stream = TcpStream::connect(addr).await.unwrap();
    says_back(&mut stream, b"hello").await;
    drop(proxy);
    is_closed(&mut stream).await;
    super::eventually("the port is free again", || async { TcpStream::connect(addr).await.err() }).await;
}
