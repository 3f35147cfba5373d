//! The listener: accepts, and sees every connection to its end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::connection::{FINISH_WITHIN, carry};
use super::delivery::Delivery;
use super::guests;
use super::hub::{Peer, reaches};

/// What every connection is served with.
pub(super) struct Service {
    pub(super) delivery: Arc<Delivery>,
    pub(super) tls: Option<TlsAcceptor>,
    pub(super) ping_every: Duration,
}

/// Accepts until `stop`, then lets every connection finish.
pub(super) async fn serve(listener: TcpListener, service: Arc<Service>, mut stop: watch::Receiver<bool>) {
    let hub = Arc::clone(&service.delivery.hub);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = reaches(&mut stop, |&stop| stop) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) if hub.refuses_connections() => reset(&socket),
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
    for peer in hub.members("") {
        peer.queue.finish(Instant::now() + FINISH_WITHIN);
    }
    // A connection whose task had not run yet is not in the register: it gets as long as the others.
    let all = async { while connections.join_next().await.is_some() {} };
    if timeout(FINISH_WITHIN * 2, all).await.is_err() {
        connections.shutdown().await;
    }
}

/// Closes with a reset. The listener stays: its port could not be had back for certain.
fn reset(socket: &TcpStream) {
    if let Err(error) = socket.set_zero_linger() {
        tracing::debug!(%error, "closing in good order instead of with a reset");
    }
}

async fn connection(socket: TcpStream, service: Arc<Service>) {
    let hub = &service.delivery.hub;
    let Some(peer) = hub.enter() else { return };
    let ended = tokio::select! {
        () = peer.queue.closed() => Ok(()),
        ended = talk(socket, &peer, &service) => ended,
    };
    let channels = hub.leave(&peer);
    guests::tell(&peer, "PART", &channels, hub).await;
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
