//! One TLS stack for everything that dials out: rustls with the aws-lc-rs provider.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;

/// Why no TLS configuration could be made.
#[derive(Debug, Error)]
pub enum TlsError {
    /// `TLS_CA_FILE` cannot be read or holds no certificate.
    #[error("TLS_CA_FILE cannot be used: {0}")]
    CaFile(String),
    /// The machine has no usable root certificates.
    #[error("no usable root certificates on this machine; install ca-certificates or set TLS_CA_FILE")]
    NoRoots,
    /// rustls refused the configuration.
    #[error("TLS cannot be set up")]
    Setup(#[from] rustls::Error),
}

/// Makes aws-lc-rs the process's provider, for libraries that ask for the default one. Harmless when called
/// twice.
pub fn install_provider() {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed before");
    }
}

/// A client's configuration that trusts the certificates in `ca_file`, or the system's roots.
pub fn client_config(ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => add_file(&mut roots, path)?,
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(TlsError::NoRoots);
    }
    with_roots(roots)
}

/// A client's configuration with which every connection fails: where there are no certificates to trust, and it is not
/// known whether any connection is to be made.
pub fn trusting_nobody() -> Result<Arc<ClientConfig>, TlsError> {
    with_roots(RootCertStore::empty())
}

fn with_roots(roots: RootCertStore) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), TlsError> {
    let certificates =
        CertificateDer::pem_file_iter(path).map_err(|error| TlsError::CaFile(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| TlsError::CaFile(error.to_string()))?;
        roots.add(certificate)?;
    }
    if roots.is_empty() { Err(TlsError::CaFile("it holds no certificate".to_owned())) } else { Ok(()) }
}

/// Settings of TLS.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// PEM file of the certificates to trust, for IRC, OAuth, NATS and the history service; left out: the system's roots
    #[arg(long, env)]
    tls_ca_file: Option<String>,
}

/// Checked settings of TLS.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct TlsConfig {
    /// The certificates to trust; `None`: the system's.
    #[serde(rename = "TLS_CA_FILE")]
    pub ca_file: Option<std::path::PathBuf>,
}

impl TlsArgs {
    /// Checks the settings.
    pub fn check(&self, problems: &mut crate::settings::Problems) -> Option<TlsConfig> {
        let ca_file =
            problems.parse_optional("TLS_CA_FILE", self.tls_ca_file.as_ref(), crate::settings::readable_file);
        Some(TlsConfig { ca_file: ca_file? })
    }
}
