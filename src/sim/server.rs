//! The sockets: accepts, and carries bytes between a socket, its [`Session`] and its queue.
//!
//! Input is bounded by [`MAX_LINE_BYTES`], output by the queue. A client that does not read what it asked for is not
//! listened to either, since its answers wait for room.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval_at, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::hub::{Hub, Peer, reaches};
use super::session::{Policy, Reply, Session};

/// A client's line may be so long.
const MAX_LINE_BYTES: usize = 8 * 1024;
/// A client that has been silent for so many PINGs is gone.
const MAX_UNANSWERED_PINGS: u32 = 3;
/// How long a closing connection may take to read what is queued for it.
const FINISH_WITHIN: Duration = Duration::from_secs(1);

/// What every connection is served with.
pub(super) struct Service {
    pub(super) hub: Arc<Hub>,
    pub(super) policy: Policy,
    pub(super) tls: Option<TlsAcceptor>,
    pub(super) ping_every: Duration,
}

/// Accepts until `stop`, then lets every connection finish.
pub(super) async fn serve(listener: TcpListener, service: Arc<Service>, mut stop: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = reaches(&mut stop, |&stop| stop) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(connection(socket, Arc::clone(&service)));
                }
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    // Out of descriptors: the next accept would fail at once as well.
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    for peer in service.hub.members("") {
        peer.queue.finish(Instant::now() + FINISH_WITHIN);
    }
    // A connection whose task had not run yet is not in the register: it gets as long as the others.
    let all = async { while connections.join_next().await.is_some() {} };
    if timeout(FINISH_WITHIN * 2, all).await.is_err() {
        connections.shutdown().await;
    }
}

async fn connection(socket: TcpStream, service: Arc<Service>) {
    let Some(peer) = service.hub.enter() else { return };
    let ended = tokio::select! {
        () = peer.queue.closed() => Ok(()),
        ended = talk(socket, &peer, &service) => ended,
    };
    service.hub.leave(&peer);
    if let Err(error) = ended {
        tracing::debug!(connection = peer.id, %error, "connection ended");
    }
}

async fn talk(socket: TcpStream, peer: &Arc<Peer>, service: &Service) -> io::Result<()> {
    socket.set_nodelay(true)?;
    match &service.tls {
        None => carry(socket, peer, service).await,
        Some(tls) => {
            let handshake = timeout(Duration::from_secs(10), tls.accept(socket));
            carry(handshake.await.map_err(io::Error::from)??, peer, service).await
        }
    }
}

async fn carry<S>(stream: S, peer: &Arc<Peer>, service: &Service) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let (mut reader, mut writer) = split(stream);
    tokio::select! {
        read = read(&mut reader, peer, service) => return read,
        written = write(&mut writer, peer) => written?,
    }
    // Bytes left unread would make the close a reset, and a reset can destroy our last words on their way.
    let mut rest = [0; 1024];
    let linger = async { while reader.read(&mut rest).await.is_ok_and(|read| read > 0) {} };
    if timeout(FINISH_WITHIN, linger).await.is_err() {
        tracing::debug!(connection = peer.id, "the client did not close its side");
    }
    Ok(())
}

async fn write(writer: impl AsyncWrite + Unpin, peer: &Peer) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(64 * 1024, writer);
    while let Some(chunk) = peer.queue.next().await {
        writer.write_all(&chunk).await?;
        while let Some(chunk) = peer.queue.try_next() {
            writer.write_all(&chunk).await?;
        }
        writer.flush().await?;
    }
    writer.shutdown().await
}

/// Answers the client's lines. Returns only on an error; an end in good order is left to the writer.
async fn read(mut reader: impl AsyncRead + Unpin, peer: &Arc<Peer>, service: &Service) -> io::Result<()> {
    let mut session = Session::default();
    let mut buffer = BytesMut::with_capacity(1024);
    let mut unanswered = 0;
    let mut pings = interval_at(Instant::now() + service.ping_every, service.ping_every);
    loop {
        tokio::select! {
            read = reader.read_buf(&mut buffer) => {
                unanswered = 0;
                if read? == 0 || !answer_lines(&mut buffer, &mut session, peer, service).await? {
                    break;
                }
            }
            _ = pings.tick() => {
                unanswered += 1;
                if unanswered > MAX_UNANSWERED_PINGS {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                // With a full queue the client has plenty to read: no need for a PING.
                peer.queue.push(&Bytes::from_static(b"PING :tmi.twitch.tv\r\n"), Some(Duration::ZERO)).await;
            }
        }
    }
    peer.queue.finish(Instant::now() + FINISH_WITHIN);
    std::future::pending().await
}

/// Takes the whole lines out of `buffer`; false when the connection is to end.
async fn answer_lines(
    buffer: &mut BytesMut,
    session: &mut Session,
    peer: &Arc<Peer>,
    service: &Service,
) -> io::Result<bool> {
    loop {
        let end = memchr::memchr(b'\n', buffer);
        if end.unwrap_or(buffer.len()) > MAX_LINE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
        }
        let Some(end) = end else { return Ok(true) };
        let reply = session.answer(&String::from_utf8_lossy(&buffer[..end]), &service.policy);
        buffer.advance(end + 1);
        peer.tags.store(session.tags, Ordering::Relaxed);
        peer.commands.store(session.commands, Ordering::Relaxed);
        if !act(reply, peer, &service.hub).await {
            return Ok(false);
        }
    }
}

async fn act(reply: Reply, peer: &Arc<Peer>, hub: &Hub) -> bool {
    for channel in &reply.parted {
        hub.part(peer, channel);
    }
    if !reply.text.is_empty() {
        peer.queue.push(&Bytes::from(reply.text), None).await;
    }
    // Only now, so that a channel's first message cannot overtake the answer to its JOIN.
    for channel in &reply.joined {
        hub.join(peer, channel);
    }
    !reply.close
}
