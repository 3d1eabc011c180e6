//! `stepmesh serve`: the OpenAI-compatible front door of a deployment, its own or one that runs already.

mod answer;
mod api;
mod app;
mod choice;
mod metrics;
mod stop;

use crate::carried::Model;
use crate::client::{Client, Target};
use crate::deployment::Deployment;
use crate::error::CliError;
use crate::loading::StartScreen;
use crate::output::say;
use crate::settings::{DeploymentLayer, DeploymentSettings, Layer, OwnDeployment, Precision, Secret, read_token};
use crate::signals::{self, Interrupt};
use app::App;
use clap::Command;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use tokio::net::TcpListener;

/// What `serve` is asked.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ServeArguments {
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", env = "STEPMESH_HOST", hide_env = true, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 lets the system choose
    #[arg(long, value_name = "PORT", env = "STEPMESH_PORT", hide_env = true, default_value_t = 8000)]
    port: u16,
    /// A deployment that runs already [default: start one]
    #[arg(long, value_name = "URL", env = "STEPMESH_SCHEDULER", hide_env = true)]
    scheduler: Option<String>,
    #[command(flatten)]
    deployment: OwnDeployment,
    /// What clients call the model [default: the directory's name]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Key that clients must show. Visible in the process list: prefer STEPMESH_API_KEY or --api-key-file
    #[arg(long, env = "STEPMESH_API_KEY", hide_env = true)]
    api_key: Option<Secret>,
    /// File whose first line is the key
    #[arg(long, value_name = "FILE", env = "STEPMESH_API_KEY_FILE", hide_env = true)]
    api_key_file: Option<PathBuf>,
    /// Listen on a non-loopback address without a key
    #[arg(long)]
    insecure: bool,
    /// Requests that are worked on at the same time; more are refused
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::new(256).unwrap_or(NonZeroUsize::MIN))]
    max_requests: NonZeroUsize,
    /// Tokens that each attention instance's KV cache holds [default: 16384]
    #[arg(long, value_name = "N")]
    kv_tokens: Option<NonZeroUsize>,
    /// Token that the scheduler wants. Visible in the process list: prefer STEPMESH_TOKEN or --token-file
    #[arg(long, env = "STEPMESH_TOKEN", hide_env = true)]
    token: Option<Secret>,
    /// File whose first line is the token
    #[arg(long, value_name = "FILE", env = "STEPMESH_TOKEN_FILE", hide_env = true)]
    token_file: Option<PathBuf>,
}

/// Serves until a signal ends it; prints one line that starts with `serving` once requests are taken.
pub(crate) fn run(arguments: &ServeArguments, verbose: bool) -> Result<(), CliError> {
    let model = Model::open(arguments.deployment.checkpoint.as_deref())?;
    let key = read_token(arguments.api_key.as_ref(), arguments.api_key_file.as_deref())?;
    if !arguments.host.is_loopback() && key.is_none() && !arguments.insecure {
        return Err(CliError::input(
            format!("{} can be reached from other hosts, but clients need no key", arguments.host),
            "give a key with --api-key-file, or say --insecure if the network is trusted",
        ));
    }
    let name = arguments.model_name.clone().unwrap_or_else(|| model.id.clone());
    signals::runtime()?.block_on(async {
        let address = SocketAddr::new(arguments.host, arguments.port);
        let listener = TcpListener::bind(address).await.map_err(|error| {
            CliError::input(format!("cannot listen on {address}: {error}"), "choose another port with --port")
        })?;
        let mut deployment = None;
        if arguments.scheduler.is_none() {
            let mut screen = StartScreen::quiet();
            let started =
                Deployment::start(&settings(arguments), verbose, &mut |progress| screen.show(&progress)).await;
            screen.finish(started.is_ok());
            deployment = match started {
                Err(CliError::Interrupted) => return Ok(()),
                started => Some(started?),
            };
        }
        let target = match (&deployment, &arguments.scheduler) {
            (Some(deployment), _) => deployment.target().clone(),
            (None, url) => Target {
                url: url.clone().unwrap_or_default(),
                token: read_token(arguments.token.as_ref(), arguments.token_file.as_deref())?,
            },
        };
        let work = async {
            let client = Client::connect(&target).await?;
            serve(listener, App::new(client, model, name, key, arguments.max_requests)).await
        };
        let ended = match &mut deployment {
            Some(deployment) => deployment.during(work).await,
            None => {
                let mut interrupt = Interrupt::new()?;
                tokio::select! {
                    ended = work => ended,
                    () = interrupt.arrived() => Err(CliError::Interrupted),
                }
            }
        };
        if let Some(deployment) = deployment {
            deployment.stop().await;
        }
        match ended {
            Err(CliError::Interrupted) => Ok(()),
            ended => ended,
        }
    })
}

async fn serve(listener: TcpListener, app: App) -> Result<(), CliError> {
    let address = listener.local_addr().map_err(CliError::system("listen"))?;
    say(&format!("serving http://{address}/v1"))?;
    axum::serve(listener, app.router()).await.map_err(CliError::system("serve"))
}

/// What differs from other commands: the model may be named by a variable, one attention and one FFN instance suffice.
pub(crate) fn help(command: Command) -> Command {
    command
        .mut_arg("checkpoint", |checkpoint| {
            checkpoint.env("STEPMESH_CHECKPOINT").hide_env(true).help(
                "Directory of the model: of the deployment that is started, or the tokenizer of the one that runs \
                 [default: the small checkpoint that the program carries]",
            )
        })
        .mut_arg("attention", |attention| attention.help("Attention instances [default: 1]"))
        .mut_arg("ffn", |ffn| ffn.help("FFN instances [default: 1]"))
        .mut_arg("dtype", |dtype| dtype.help("What is computed in [default: bf16]"))
}

fn settings(arguments: &ServeArguments) -> DeploymentSettings {
    let own = DeploymentLayer {
        kv_tokens: arguments.kv_tokens,
        token: arguments.token.clone(),
        token_file: arguments.token_file.clone(),
        ..arguments.deployment.layer()
    };
    let defaults = DeploymentLayer {
        attention: Some(NonZeroU32::MIN),
        ffn: Some(NonZeroU32::MIN),
        dtype: Some(Precision::Bf16),
        ..DeploymentLayer::default()
    };
    own.or(defaults).resolve()
}
