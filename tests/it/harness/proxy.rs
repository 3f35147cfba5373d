//! A TCP proxy between the service and something it depends on: it passes, cuts, hangs or delays, over real sockets,
//! and changes its mind at run time for the connections that stand as well as for new ones.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use inlet::tasks::Tasks;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What is read at a time, and what a delay applies to.
const CHUNK_BYTES: usize = 16 * 1024;
/// A client that dials again and again while nobody answers must not take every descriptor of the test.
const MOST_CONNECTIONS: usize = 512;

/// What happens to what comes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It arrives.
    Pass,
    /// Connections are closed, new ones at once.
    Cut,
    /// Connections are taken; nothing is read, nothing is answered, nothing is closed.
    Hang,
    /// Each chunk arrives so much later, either way.
    Delay(Duration),
}

/// A proxy on a free port. Dropping it closes everything.
pub struct Proxy {
    addr: SocketAddr,
    mode: watch::Sender<Mode>,
    _tasks: Tasks,
}

impl Proxy {
    /// Listens, and passes on to `target`, which may come later.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (mode, follow) = watch::channel(Mode::Pass);
        let mut tasks = Tasks::new();
        tasks.spawn("proxy", listen(listener, target, follow));
        Self { addr, mode, _tasks: tasks }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on, for all connections.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn listen(listener: TcpListener, target: SocketAddr, mode: watch::Receiver<Mode>) {
    let mut connections = Tasks::new();
    while let Ok((client, _)) = listener.accept().await {
        connections.forget_finished();
        if *mode.borrow() != Mode::Cut && connections.len() < MOST_CONNECTIONS {
            let until_cut = cut(mode.clone());
            connections.spawn("proxied connection", unless(until_cut, carry(client, target, mode.clone())));
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

async fn cut(mut mode: watch::Receiver<Mode>) {
    // Without a sender the proxy is gone, and its tasks with it.
    let _gone = mode.wait_for(|mode| *mode == Mode::Cut).await.is_err();
}

async fn carry(client: TcpStream, target: SocketAddr, mut mode: watch::Receiver<Mode>) {
    let Some(_) = flowing(&mut mode).await else { return };
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(pump(from_client, to_server, mode.clone()), pump(from_server, to_client, mode));
}

/// One direction to its end. A half-closed connection stays one: the other direction goes on.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut mode: watch::Receiver<Mode>) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let Some(mode_now) = flowing(&mut mode).await else { return };
        let read = tokio::select! {
            biased;
            Ok(()) = mode.changed() => continue,
            read = from.read(&mut chunk) => read,
        };
        let Ok(count @ 1..) = read else { return };
        if let Mode::Delay(span) = mode_now {
            tokio::time::sleep(span).await;
        }
        let Some(_) = flowing(&mut mode).await else { return };
        if to.write_all(&chunk[..count]).await.is_err() {
            return;
        }
    }
}

/// Waits while everything hangs; the mode that ends it, or none once the proxy is gone.
async fn flowing(mode: &mut watch::Receiver<Mode>) -> Option<Mode> {
    mode.wait_for(|mode| *mode != Mode::Hang).await.ok().map(|mode| *mode)
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
    proxy.set(Mode::Delay(Duration::from_millis(100)));
    let start = std::time::Instant::now();
    says_back(&mut stream, b"slowly").await;
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
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
