//! The sockets behind the operator's HTTP: how many there may be, and how long one may hold its place without asking
//! for anything, or without reading what it asked for.
//!
//! `axum::serve` knows no such limit: half a request, or an answer that nobody reads, would hold a socket for as long
//! as TCP likes, and enough of them every descriptor that the service has.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::{ConnectInfo, Request};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Sleep, sleep};

use crate::errors::ErrorCode;
use crate::tasks::Tasks;
use crate::telemetry::logs::{Said, with_causes};

/// The wait after a connection that could not be taken: without descriptors the next try fails at once as well.
const AFTER_REFUSAL: Duration = Duration::from_millis(500);

/// What one connection, and all of them, may use up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections at a time; the next one waits in the kernel's queue.
    pub(super) connections: usize,
    /// For the head of a request, from the end of the answer before it: an idle connection is closed then.
    pub(super) head: Duration,
    /// For the peer to take something of what is written.
    pub(super) reader: Duration,
}

/// Takes connections until `closing` becomes true, then lets the requests under way finish.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    mut closing: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = Tasks::new();
    let mut said = Said::default();
    loop {
        let taken = tokio::select! {
            taken = take(&listener, &places) => taken,
            () = closed(&mut closing) => break,
        };
        connections.forget_finished();
        match taken {
            Ok((stream, peer, place)) => {
                let connection = Connection { stream, peer, place };
                connections.spawn("http connection", connection.run(router.clone(), limits, closing.clone()));
            }
            Err(error) if is_of_the_peer(&error) => {}
            Err(error) => {
                said.failure(
                    ErrorCode::AcceptFailed,
                    &error,
                    "connections to the operator's HTTP cannot be taken",
                );
                sleep(AFTER_REFUSAL).await;
            }
        }
    }
    drop(listener);
    while connections.next_end().await.is_some() {}
}

/// A place first: who has none yet waits unaccepted.
async fn take(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, place))
}

async fn closed(closing: &mut watch::Receiver<bool>) {
    // Nobody left who could say so: closed as well.
    drop(closing.wait_for(|closing| *closing).await);
}

/// It was gone before it was taken: nothing of ours.
fn is_of_the_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    place: OwnedSemaphorePermit,
}

impl Connection {
    async fn run(self, router: Router, limits: Limits, mut closing: watch::Receiver<bool>) {
        let Self { stream, peer, place: _place } = self;
        let router = TowerToHyperService::new(router);
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            router.call(request)
        });
        let io = TokioIo::new(Impatient { stream, patience: limits.reader, stalled: None });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(limits.head);
        let mut connection = pin!(builder.serve_connection(io, service));
        let done = tokio::select! {
            done = connection.as_mut() => done,
            () = closed(&mut closing) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = done {
            tracing::debug!(error = with_causes(&error), "a connection to the operator's HTTP was ended");
        }
    }
}

/// A socket whose peer has to read: when it takes nothing for so long, writing fails.
struct Impatient {
    stream: TcpStream,
    patience: Duration,
    /// Runs while a write waits for the peer.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn in_time(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.in_time(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.in_time(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, Bytes};
    use axum::routing::get;
    use futures_util::stream;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    const REQUEST: &[u8] = b"GET /hello HTTP/1.1\r\nhost: localhost\r\n\r\n";
    const SHORT: Duration = Duration::from_millis(300);
    const LONG: Duration = Duration::from_secs(20);

    struct Server {
        address: SocketAddr,
        close: watch::Sender<bool>,
        tasks: Tasks,
    }

    async fn server(limits: Limits) -> Server {
        let endless = || async {
            let piece = Bytes::from(vec![b'x'; 64 * 1024]);
            Body::from_stream(stream::repeat(Ok::<_, std::convert::Infallible>(piece)))
        };
        let hello =
            |ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { format!("hello {}", peer.port()) };
        let router = Router::new().route("/hello", get(hello)).route("/endless", get(endless));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (close, closing) = watch::channel(false);
        let mut tasks = Tasks::new();
        tasks.spawn("server", serve(listener, router, limits, closing));
        Server { address, close, tasks }
    }

    impl Server {
        async fn dial(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }
    }

    /// Asks, and reads the answer up to its last word, which is the client's port.
    async fn ask(client: &mut TcpStream) {
        client.write_all(REQUEST).await.unwrap();
        let last = format!("hello {}", client.local_addr().unwrap().port());
        let mut heard = Vec::new();
        while !heard.ends_with(last.as_bytes()) {
            let count = timeout(LONG, client.read_buf(&mut heard)).await.unwrap().unwrap();
            assert!(count > 0, "closed after {:?}", String::from_utf8_lossy(&heard));
        }
    }

    /// Whether the server closes the connection; what it says before does not matter.
    async fn is_closed(client: &mut TcpStream) {
        let mut rest = Vec::new();
        // A reset is an end as well.
        drop(timeout(LONG, client.read_to_end(&mut rest)).await.unwrap());
    }

    #[tokio::test]
    async fn half_a_head_and_an_idle_connection_are_closed_after_a_while() {
        let server = server(Limits { connections: 8, head: SHORT, reader: LONG }).await;
        let mut silent = server.dial().await;
        let mut half = server.dial().await;
        half.write_all(&REQUEST[..20]).await.unwrap();
        let mut idle = server.dial().await;
        ask(&mut idle).await;
        for client in [&mut silent, &mut half, &mut idle] {
            is_closed(client).await;
        }
    }

    #[tokio::test]
    async fn bytes_that_trickle_in_do_not_stretch_the_time_for_a_head() {
        let server = server(Limits { connections: 8, head: SHORT, reader: LONG }).await;
        let (mut from_server, mut to_server) = server.dial().await.into_split();
        let mut tasks = Tasks::new();
        tasks.spawn("trickle", async move {
            while to_server.write_all(b"x").await.is_ok() {
                sleep(SHORT / 10).await;
            }
        });
        let mut rest = Vec::new();
        drop(timeout(LONG, from_server.read_to_end(&mut rest)).await.unwrap());
    }

    #[tokio::test]
    async fn who_reads_nothing_is_let_go() {
        let server = server(Limits { connections: 1, head: LONG, reader: SHORT }).await;
        let mut deaf = server.dial().await;
        deaf.write_all(b"GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        // The one place is free again: its connection is gone, though this end never closed.
        let mut next = server.dial().await;
        ask(&mut next).await;
        drop(deaf);
    }

    #[tokio::test]
    async fn who_reads_slowly_is_not() {
        let server = server(Limits { connections: 1, head: LONG, reader: SHORT * 4 }).await;
        let mut slow = server.dial().await;
        slow.write_all(b"GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let mut piece = vec![0; 4 << 20];
        for _ in 0..12 {
            timeout(LONG, slow.read_exact(&mut piece)).await.unwrap().unwrap();
            sleep(SHORT / 2).await;
        }
    }

    #[tokio::test]
    async fn those_beyond_the_limit_wait_for_a_place() {
        let server = server(Limits { connections: 2, head: LONG, reader: LONG }).await;
        let (mut first, mut second, mut third) =
            (server.dial().await, server.dial().await, server.dial().await);
        ask(&mut first).await;
        ask(&mut second).await;
        third.write_all(REQUEST).await.unwrap();
        assert!(timeout(SHORT, third.read_u8()).await.is_err(), "two are served, no third");
        drop(first);
        assert_eq!(timeout(LONG, third.read_u8()).await.unwrap().unwrap(), b'H');
    }

    #[tokio::test]
    async fn closing_ends_idle_connections_and_then_itself() {
        let mut server = server(Limits { connections: 8, head: LONG, reader: LONG }).await;
        let mut idle = server.dial().await;
        ask(&mut idle).await;
        server.close.send_replace(true);
        is_closed(&mut idle).await;
        let end = timeout(LONG, server.tasks.next_end()).await.unwrap().unwrap();
        assert_eq!((end.name, end.panicked), ("server", false));
        assert!(TcpStream::connect(server.address).await.is_err());
    }
}
