//! `stepmesh up`: a deployment in the foreground until a signal ends it.

use crate::deployment::Deployment;
use crate::error::CliError;
use crate::loading::StartScreen;
use crate::output::say;
use crate::settings::DeploymentSettings;
use crate::signals;

/// Prints one line that starts with `ready` once requests are taken.
pub(crate) fn run(settings: &DeploymentSettings, verbose: bool) -> Result<(), CliError> {
    crate::carried::Model::open(settings.checkpoint.as_deref())?;
    signals::runtime()?.block_on(async {
        let mut screen = StartScreen::quiet();
        let started = Deployment::start(settings, verbose, &mut |progress| screen.show(&progress)).await;
        screen.finish(started.is_ok());
        let mut deployment = match started {
            Err(CliError::Interrupted) => return Ok(()),
            started => started?,
        };
        let ended = match say(&format!("ready {}", deployment.target().url)) {
            // Only a signal or a loss ends this.
            Ok(()) => deployment.during(std::future::pending()).await,
            unheard => unheard,
        };
        deployment.stop().await;
        match ended {
            Err(CliError::Interrupted) => Ok(()),
            ended => ended,
        }
    })
}
