//! `stepmesh bench model`: how fast the model computes, against the processor's peak and beside PyTorch.

use super::common::{Common, Session};
use super::screen::Screen;
use crate::carried::{self, Model};
use crate::client::Client;
use crate::decode::{Request, decode};
use crate::deployment::Deployment;
use crate::error::CliError;
use crate::settings::{DeploymentLayer, Layer, Precision, Transport};
use crate::signals;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Instant;
use stepmesh_bench::BenchError;
use stepmesh_bench::model::{Decode, Options, PyTorch, Row, decoding, products};
use tempfile::TempDir;

/// Tokens of each prompt.
const PROMPT: usize = 16;

/// What is measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ModelArguments {
    /// The model that is decoded with [default: the small checkpoint that the program carries]
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Attention instances
    #[arg(long, value_name = "N", default_value = "2")]
    attention: NonZeroU32,
    /// FFN instances
    #[arg(long, value_name = "N", default_value = "2")]
    ffn: NonZeroU32,
    /// The transport
    #[arg(long, default_value = "shm")]
    transport: Transport,
    /// What is decoded in
    #[arg(long, default_value = "bf16")]
    dtype: Precision,
    /// Sequences that are decoded at once
    #[arg(long, value_name = "N", default_value = "16", value_parser = clap::value_parser!(u32).range(1..=256))]
    batch: u32,
    /// Tokens that each sequence gets
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u32).range(8..=4096))]
    new_tokens: u32,
    /// Threads of a product and of PyTorch [default: all CPUs that this process may use]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// The interpreter that has PyTorch: torch, safetensors
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    #[command(flatten)]
    common: Common,
}

pub(crate) fn run(arguments: &ModelArguments) -> Result<(), CliError> {
    let model = Model::open(arguments.checkpoint.as_deref())?;
    let length = PROMPT + arguments.new_tokens as usize;
    if length > model.config.context_length {
        let message = format!("{length} tokens of a sequence; the model's context is {}", model.config.context_length);
        return Err(CliError::input(message, "ask for fewer with --new-tokens"));
    }
    let session = Session::open(&arguments.common)?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut options = Options::new(arguments.threads.map_or(cpus, NonZeroUsize::get));
    if arguments.common.quick {
        options.quick();
    }
    let mut screen = Screen::new();
    let mut report = session.report();
    screen.line(&report.machine);
    screen.line(&format!("an expert's products on {} threads", options.threads));
    screen.line(&Row::HEAD);
    let mut outcome = products(&options, &mut report, &mut |progress| session.follow(&mut screen, progress));
    if outcome.is_ok() {
        let directory = Directory::of(arguments.checkpoint.as_deref())?;
        let peer = PyTorch::find(&arguments.python, directory.path());
        if peer.is_none() {
            screen
                .line(&"\nPyTorch is not here: pip install torch safetensors, and name the interpreter with --python");
        }
        let row = row(arguments, &model, options.threads);
        let runtime = signals::runtime()?;
        let mut ours = runtime.block_on(Ours::start(arguments, &model))?;
        let mut round = || runtime.block_on(ours.round());
        let watcher = &mut |progress: stepmesh_bench::Progress<'_, Row>| session.follow(&mut screen, progress);
        outcome = decoding(&options, row, &mut round, peer.as_ref(), &mut report, watcher);
        runtime.block_on(ours.deployment.stop());
    }
    session.close(&report, outcome, screen.finish())
}

fn row(arguments: &ModelArguments, model: &Model, threads: usize) -> Decode {
    Decode {
        op: "decode",
        model: model.id.clone(),
        attention: arguments.attention.get(),
        ffn: arguments.ffn.get(),
        provider: stepmesh_transport::Provider::from(arguments.transport).name(),
        dtype: arguments.dtype.to_string(),
        batch: arguments.batch as usize,
        prompt_tokens: PROMPT,
        new_tokens: arguments.new_tokens as usize,
        threads,
        tokens_per_s: 0.0,
        peers: Vec::new(),
    }
}

/// The deployment that decodes, round after round; it sleeps in between.
struct Ours {
    deployment: Deployment,
    client: Client,
    requests: Vec<Request>,
}

impl Ours {
    async fn start(arguments: &ModelArguments, model: &Model) -> Result<Self, CliError> {
        let tokens = arguments.batch as usize * (PROMPT + arguments.new_tokens as usize + 64);
        let settings = DeploymentLayer {
            checkpoint: arguments.checkpoint.clone(),
            attention: Some(arguments.attention),
            ffn: Some(arguments.ffn),
            transport: Some(arguments.transport),
            dtype: Some(arguments.dtype),
            kv_tokens: NonZeroUsize::new(tokens),
            ..DeploymentLayer::default()
        };
        let mut deployment = Deployment::start(&settings.resolve(), false, &mut |_| {}).await?;
        let target = deployment.target().clone();
        let client = deployment.during(Client::connect(&target)).await?;
        let vocabulary = model.config.vocab_size as u32;
        let prompt = |row| (0..PROMPT as u32).map(|at| (7 * row + 3 * at) % vocabulary).collect();
        let requests = (0..arguments.batch).map(|row| Request {
            prompt: prompt(row),
            max_new_tokens: arguments.new_tokens,
            ignore_eos: true,
            logits: false,
            sampling: None,
        });
        Ok(Self { deployment, client, requests: requests.collect() })
    }

    /// Tokens a second from when every sequence has its first one.
    async fn round(&mut self) -> Result<f64, BenchError> {
        let (mut begun, mut first, mut last, mut count) = (0, None, Instant::now(), 0_usize);
        let work = decode(&self.client, &self.requests, |_, tokens| {
            last = Instant::now();
            begun += usize::from(tokens.len() == 1);
            match first {
                None if begun == self.requests.len() => first = Some(last),
                None => {}
                Some(_) => count += 1,
            }
        });
        let decoded = self.deployment.during(work).await;
        match (decoded, first) {
            (Err(CliError::Interrupted), _) => Err(BenchError::Interrupted),
            (Err(error), _) => Err(BenchError::Sequence(error.to_string())),
            (Ok(_), None) => Err(BenchError::Sequence("a sequence has no token".into())),
            (Ok(_), Some(first)) => Ok(count as f64 / last.saturating_duration_since(first).as_secs_f64()),
        }
    }
}

/// Where PyTorch finds the model.
enum Directory {
    Given(PathBuf),
    /// The carried one, written down for as long as it is needed.
    Written(TempDir),
}

impl Directory {
    fn of(checkpoint: Option<&Path>) -> Result<Self, CliError> {
        if let Some(given) = checkpoint {
            return Ok(Self::Given(given.into()));
        }
        let directory = TempDir::with_prefix("stepmesh-").map_err(CliError::system("make a temporary directory"))?;
        carried::write(directory.path()).map_err(CliError::system("write the carried checkpoint down"))?;
        Ok(Self::Written(directory))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Written(directory) => directory.path(),
        }
    }
}
