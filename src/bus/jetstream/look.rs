//! A look at NATS that changes nothing there.

use std::time::Duration;

use futures_util::future::join_all;

use super::session::{ConnectError, Connector};
use super::{Desired, JetStreamConfig, ensure};
use crate::bus::{BusConfig, BusError};
use crate::secret::without_user_info;
use crate::tls::TlsConfig;

/// What a start would find.
#[derive(Debug)]
pub struct Looked {
    /// The stream, or the name of the one that a start would create.
    pub stream: Result<StreamSeen, String>,
    /// Servers that are not there, and why. At least one is.
    pub servers_away: Vec<String>,
}

/// A stream that fits.
#[derive(Debug)]
pub struct StreamSeen {
    /// Its name.
    pub name: String,
    /// Whether its retention is limits; otherwise counts may be lost in a crash.
    pub keeps_by_limits: bool,
    /// How long it keeps a message; `None`: without end.
    pub max_age: Option<Duration>,
}

/// Connects to every server, and looks for the stream as a start would. [`BusError::Settings`]: a server does not let us in.
pub async fn look(config: &JetStreamConfig, bus: &BusConfig, tls: &TlsConfig) -> Result<Looked, BusError> {
    let connector = Connector::new(config.clone(), tls.clone(), 1);
    let dialled = join_all(config.urls.iter().map(|url| async {
        let shown = without_user_info(url.expose());
        connector.connect_to(url).await.map_err(|error| (shown, error))
    }));
    let (mut links, mut servers_away) = (Vec::new(), Vec::new());
    for dialled in dialled.await {
        match dialled {
            Ok(link) => links.push(link),
            Err((server, error @ ConnectError::Refused(_))) => {
                return Err(BusError::Settings(format!("{server}: {error}")));
            }
            Err((server, error @ ConnectError::Away(_))) => servers_away.push(format!("{server}: {error}")),
        }
    }
    let Some(link) = links.first() else {
        return Err(BusError::Away(servers_away.join("; ")));
    };
    let found = ensure::look(link.context(), &Desired::new(config, bus)).await?;
    let stream = found.map(|attached| StreamSeen {
        name: attached.name,
        keeps_by_limits: attached.keeps_by_limits,
        max_age: attached.max_age,
    });
    Ok(Looked { stream, servers_away })
}
