//! One connection: carries bytes between its socket, its [`Session`] and its queue.
//!
//! Input is bounded by [`MAX_LINE_BYTES`], output by the queue. A client that does not read what it asked for is not
//! listened to either, since its answers wait for room. One that begins with an HTTP request speaks IRC in the frames
//! of a WebSocket.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, split};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};

use super::guests;
use super::hub::Peer;
use super::server::Service;
use super::session::{Reply, Session};
use super::websocket;

/// A client's line may be so long.
const MAX_LINE_BYTES: usize = 8 * 1024;
/// A client that has been silent for so many PINGs is gone.
const MAX_UNANSWERED_PINGS: u32 = 3;
/// How long a closing connection may take to read what is queued for it.
pub(super) const FINISH_WITHIN: Duration = Duration::from_secs(1);
/// A half-open connection is let go of after so long.
const HALF_OPEN_FOR: Duration = Duration::from_mins(10);
/// A slowed connection is written to so often.
const SLOW_TICKS_PER_SECOND: u64 = 10;
/// What the reader may have for the writer beside the queue.
const ORDERS: usize = 8;

/// What the reader tells the writer.
enum Order {
    /// Send this as it is; from here on everything goes in frames.
    Upgrade(Bytes),
    /// Send this as it is.
    Frame(Bytes),
}

/// What the client's bytes are.
enum Framing {
    /// Not known before the first four bytes.
    Unknown,
    Lines,
    WebSocket,
}

/// Serves until one side ends it.
pub(super) async fn carry<S>(stream: S, peer: &Arc<Peer>, service: &Service) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let (mut reader, mut writer) = split(stream);
    let (orders, inbox) = mpsc::channel(ORDERS);
    let reading = Reader { peer, service, orders, session: Session::default(), framing: Framing::Unknown };
    tokio::select! {
        () = peer.half_open() => {
            sleep(HALF_OPEN_FOR).await;
            return Ok(());
        }
        read = reading.run(&mut reader) => return read,
        written = write(&mut writer, peer, inbox) => written?,
    }
    // Bytes left unread would make the close a reset, and a reset can destroy our last words on their way.
    let mut rest = [0; 1024];
    let linger = async { while reader.read(&mut rest).await.is_ok_and(|read| read > 0) {} };
    if timeout(FINISH_WITHIN, linger).await.is_err() {
        tracing::debug!(connection = peer.id, "the client did not close its side");
    }
    Ok(())
}

async fn write(
    writer: impl AsyncWrite + Unpin,
    peer: &Peer,
    mut orders: mpsc::Receiver<Order>,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(64 * 1024, writer);
    let mut framed = false;
    loop {
        let chunk = tokio::select! {
            // In this order: what comes after an upgrade has to go in frames.
            biased;
            Some(order) = orders.recv() => {
                let (Order::Upgrade(bytes) | Order::Frame(bytes)) = &order;
                writer.write_all(bytes).await?;
                framed |= matches!(order, Order::Upgrade(_));
                writer.flush().await?;
                continue;
            }
            chunk = peer.queue.next() => chunk,
        };
        let mut chunk = chunk;
        let Some(_) = chunk else { break };
        while let Some(bytes) = chunk {
            let bytes = if framed { websocket::frame(websocket::TEXT, &bytes) } else { bytes };
            send(&mut writer, &bytes, peer).await?;
            chunk = peer.queue.try_next();
        }
        writer.flush().await?;
    }
    if framed {
        writer.write_all(&websocket::frame(websocket::CLOSE, b"")).await?;
    }
    writer.shutdown().await
}

/// Writes at once, or as slowly as the connection is told to be; that may change on the way.
async fn send(mut writer: impl AsyncWrite + Unpin, mut bytes: &[u8], peer: &Peer) -> io::Result<()> {
    while !bytes.is_empty() {
        let per_second = peer.slow.load(Ordering::Relaxed);
        if per_second == 0 {
            return writer.write_all(bytes).await;
        }
        let share = usize::try_from((per_second / SLOW_TICKS_PER_SECOND).max(1)).unwrap_or(usize::MAX);
        let (now, later) = bytes.split_at(share.min(bytes.len()));
        writer.write_all(now).await?;
        writer.flush().await?;
        sleep(Duration::from_secs_f64(now.len() as f64 / per_second as f64)).await;
        bytes = later;
    }
    Ok(())
}

/// Takes in what the client says and answers it.
struct Reader<'a> {
    peer: &'a Arc<Peer>,
    service: &'a Service,
    orders: mpsc::Sender<Order>,
    session: Session,
    framing: Framing,
}

impl Reader<'_> {
    /// Returns only on an error; an end in good order is left to the writer.
    async fn run(mut self, mut reader: impl AsyncRead + Unpin) -> io::Result<()> {
        let (mut bytes, mut lines) = (BytesMut::with_capacity(1024), BytesMut::new());
        let mut unanswered = 0;
        let every = self.service.ping_every;
        let mut pings = interval_at(Instant::now() + every, every);
        // After a silence one PING is due, not all that were left out.
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                read = reader.read_buf(&mut bytes) => {
                    unanswered = 0;
                    let goes_on = read? > 0 && self.unpack(&mut bytes, &mut lines).await?;
                    if !self.answer_lines(&mut lines).await? || !goes_on {
                        break;
                    }
                }
                _ = pings.tick(), if self.peer.speaks() => {
                    unanswered += 1;
                    if unanswered > MAX_UNANSWERED_PINGS {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    // With a full queue the client has plenty to read: no need for a PING.
                    let ping = Bytes::from_static(b"PING :tmi.twitch.tv\r\n");
                    self.peer.queue.push(&ping, Some(Duration::ZERO)).await;
                }
            }
        }
        self.peer.queue.finish(Instant::now() + FINISH_WITHIN);
        std::future::pending().await
    }

    /// Moves what is whole from `bytes` to `lines`; false when the client has closed.
    async fn unpack(&mut self, bytes: &mut BytesMut, lines: &mut BytesMut) -> io::Result<bool> {
        if let Framing::Unknown = self.framing {
            self.framing = match &bytes[..bytes.len().min(4)] {
                b"GET " => {
                    let Some(request) = http_request(bytes)? else { return Ok(true) };
                    if !self.upgrade(&request).await {
                        return Ok(false);
                    }
                    Framing::WebSocket
                }
                start if start.len() < 4 && b"GET ".starts_with(start) => return Ok(true),
                _ => Framing::Lines,
            };
        }
        if let Framing::Lines = self.framing {
            lines.extend_from_slice(bytes);
            bytes.clear();
            return Ok(true);
        }
        let bad = |websocket::NoFrame| io::Error::new(io::ErrorKind::InvalidData, "no WebSocket frame");
        while let Some(frame) = websocket::next_frame(bytes, MAX_LINE_BYTES).map_err(bad)? {
            match frame.opcode {
                websocket::CLOSE => return Ok(false),
                websocket::PING if self.peer.speaks() => {
                    self.order(Order::Frame(websocket::frame(websocket::PONG, &frame.payload))).await;
                }
                websocket::PING | websocket::PONG => {}
                _ => {
                    lines.extend_from_slice(&frame.payload);
                    // Clients leave out the line's end: the message is one.
                    lines.extend_from_slice(if frame.is_last { b"\n" } else { b"" });
                    if lines.len() > 2 * MAX_LINE_BYTES && !self.answer_lines(lines).await? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Answers an HTTP request; false when it asks for no WebSocket.
    async fn upgrade(&self, request: &str) -> bool {
        let answer = websocket::handshake(request);
        if let Some(answer) = answer {
            self.order(Order::Upgrade(answer.into())).await;
            return true;
        }
        let refusal = "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n";
        self.order(Order::Frame(Bytes::from_static(refusal.as_bytes()))).await;
        false
    }

    async fn order(&self, order: Order) {
        if self.orders.send(order).await.is_err() {
            tracing::debug!(connection = self.peer.id, "nothing is written any more");
        }
    }

    /// Takes the whole lines out of `buffer`; false when the connection is to end.
    async fn answer_lines(&mut self, buffer: &mut BytesMut) -> io::Result<bool> {
        loop {
            let end = memchr::memchr(b'\n', buffer);
            if end.unwrap_or(buffer.len()) > MAX_LINE_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
            }
            let Some(end) = end else { return Ok(true) };
            let line = buffer.split_to(end);
            buffer.advance(1);
            // A silent connection does not do what it is told, or it would be in channels without a word.
            if self.peer.speaks() && !self.answer(&String::from_utf8_lossy(&line)).await {
                return Ok(false);
            }
        }
    }

    async fn answer(&mut self, line: &str) -> bool {
        let delivery = &self.service.delivery;
        let (peer, hub, session) = (self.peer, &delivery.hub, &mut self.session);
        for channel in peer.take_put_out() {
            session.was_put_out(&channel);
        }
        let reply = session.answer(line, hub, Instant::now());
        peer.tags.store(session.tags, Ordering::Relaxed);
        peer.commands.store(session.commands, Ordering::Relaxed);
        peer.membership.store(session.membership, Ordering::Relaxed);
        peer.joins.store(session.joins, Ordering::Relaxed);
        let login = session.login.as_deref();
        if let Some(login) = login.filter(|_| peer.login().is_none()) {
            peer.set_login(login);
        }
        let Reply { text, joined, parted, said, close } = reply;
        for channel in &parted {
            hub.part(peer, channel);
        }
        if !text.is_empty() {
            peer.queue.push(&Bytes::from(text), None).await;
        }
        // Only now, so that a channel's first message cannot overtake the answer to its JOIN.
        for channel in &joined {
            hub.join(peer, channel);
        }
        guests::tell(peer, "PART", &parted, hub).await;
        guests::tell(peer, "JOIN", &joined, hub).await;
        if let (Some(said), Some(login)) = (&said, login) {
            guests::say(peer, login, said, delivery).await;
        }
        !close
    }
}

/// The whole request at the start of `bytes`, taken out; `None`: it goes on.
fn http_request(bytes: &mut BytesMut) -> io::Result<Option<String>> {
    let end = bytes.windows(4).position(|end| end == b"\r\n\r\n");
    match end {
        Some(end) => Ok(Some(String::from_utf8_lossy(&bytes.split_to(end + 4)).into_owned())),
        None if bytes.len() > MAX_LINE_BYTES => Err(io::ErrorKind::InvalidData.into()),
        None => Ok(None),
    }
}
