//! Who holds `DATA_DIR`: a command that needs what lies in it has it for itself, or goes through the service that has it.

use super::Failure;
use super::client::Service;
use crate::app::AppConfig;
use crate::app::check::SERVICE;
use crate::data_dir::{DataDir, DataDirError};
use crate::telemetry::logs::with_causes;

/// Who holds it.
pub(super) enum Held {
    /// This process, as long as this lives.
    ByUs(DataDir),
    /// A service, which answers.
    ByService,
}

/// Takes the folder for `command`, unless a service has it.
pub(super) async fn hold(config: &AppConfig, command: &str, service: &Service) -> Result<Held, Failure> {
    match DataDir::take(&config.data_dir, &format!("inlet {command}, process {}", std::process::id())) {
        Ok(folder) => Ok(Held::ByUs(folder)),
        Err(DataDirError::Held { holder, .. }) if holder.starts_with(SERVICE) => {
            // Before anything is sent: whoever else answers there must be handed nothing.
            service.greet().await?;
            Ok(Held::ByService)
        }
        Err(error) => Err(Failure::Configuration(with_causes(&error))),
    }
}
