//! A connection's bytes, with TLS or without.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::settings::IrcAddress;

/// For name, connection and TLS together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// What a connection reads from and writes to.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// Connects; `tls` is for an address that asks for it.
pub(super) async fn dial(
    address: &IrcAddress,
    tls: Option<&Arc<rustls::ClientConfig>>,
) -> io::Result<Box<dyn Transport>> {
    let dialing = async {
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await?;
        stream.set_nodelay(true)?;
        let Some(config) = tls.filter(|_| address.tls) else {
            return Ok(Box::new(stream) as Box<dyn Transport>);
        };
        let name = ServerName::try_from(address.host.clone()).map_err(io::Error::other)?;
        let stream = TlsConnector::from(Arc::clone(config)).connect(name, stream).await?;
        Ok(Box::new(stream) as Box<dyn Transport>)
    };
    timeout(DIAL_TIMEOUT, dialing).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
