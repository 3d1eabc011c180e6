//! `stepmesh demo`: a deployment of real processes decodes a few prompts and says how fast.

mod files;
mod report;
mod screen;

pub(crate) use files::OutputFile;
pub(crate) use report::SequenceReport;
pub(crate) use screen::Screen;

use crate::carried::Model;
use crate::client::Client;
use crate::decode::{Decoded, Request, decode};
use crate::deployment::Deployment;
use crate::error::CliError;
use crate::loading::StartScreen;
use crate::output::say;
use crate::prompts::{self, Prompt, PromptArguments};
use crate::settings::{DeploymentSettings, Layer, OwnDeployment};
use crate::{signals, units};
use report::Timings;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What `demo` is asked.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct DemoArguments {
    #[command(flatten)]
    deployment: OwnDeployment,
    #[command(flatten)]
    prompts: PromptArguments,
    /// Repeat until interrupted, and check that every round yields the same tokens
    #[arg(long = "loop")]
    repeat: bool,
    /// Write tokens and figures to FILE as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write each new position's logits to FILE as safetensors: `logits.<sequence>`, f32 [new, vocab]
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
}

/// Checks everything that can be checked, then starts, decodes, reports and stops.
pub(crate) fn run(arguments: DemoArguments, verbose: bool) -> Result<(), CliError> {
    let model = Model::open(arguments.deployment.checkpoint.as_deref())?;
    let prompts = arguments.prompts.resolve(&model)?;
    let requests = arguments.prompts.requests(&prompts, arguments.logits.is_some())?;
    prompts::check(&requests, &model.config)?;
    let json = arguments.json.as_deref().map(OutputFile::open).transpose()?;
    let logits = arguments.logits.as_deref().map(OutputFile::open).transpose()?;
    let settings = settings(&arguments, &requests);

    introduce(&model, &settings)?;
    let run = signals::runtime()?.block_on(async {
        let mut screen = StartScreen::new();
        let deployment = Deployment::start(&settings, verbose, &mut |progress| screen.show(&progress)).await;
        screen.finish(deployment.is_ok());
        let mut deployment = deployment?;
        let run = if arguments.repeat {
            repeat(&mut deployment, &prompts, &model, &requests).await
        } else {
            once(&mut deployment, &prompts, &model, &requests).await
        };
        deployment.stop().await;
        run
    })?;

    run.timings.print()?;
    if let Some(file) = json {
        file.write_json(&run.timings.report(&prompts, &run.sequences, model.text.as_ref(), &settings))?;
    }
    if let Some(file) = logits {
        file.write_logits(&run.sequences, model.config.vocab_size)?;
    }
    Ok(())
}

/// What came out: the last round's sequences, the figures of all rounds.
struct Run {
    sequences: Vec<Decoded>,
    timings: Timings,
}

async fn once(
    deployment: &mut Deployment,
    prompts: &[Prompt],
    model: &Model,
    requests: &[Request],
) -> Result<Run, CliError> {
    let target = deployment.target().clone();
    let mut screen = Screen::new(prompts, model.text.as_ref());
    let work = async {
        let client = Client::connect(&target).await?;
        client.stats(true).await?;
        let started = Instant::now();
        let sequences = decode(&client, requests, |index, tokens| screen.show(index, tokens)).await?;
        let mut timings = Timings::default();
        timings.add_round(&sequences, started.elapsed());
        timings.add_stats(&client.stats(false).await?);
        Ok(Run { sequences, timings })
    };
    let run = deployment.during(work).await?;
    screen.print(&run.sequences)?;
    Ok(run)
}

/// How often a line about the rounds is printed where there is no terminal.
const ROUND_LINE_EVERY: Duration = Duration::from_secs(1);

async fn repeat(
    deployment: &mut Deployment,
    prompts: &[Prompt],
    model: &Model,
    requests: &[Request],
) -> Result<Run, CliError> {
    let mut run = once(deployment, prompts, model, requests).await?;
    let target = deployment.target().clone();
    let client = deployment.during(Client::connect(&target)).await?;
    let mut said = Instant::now();
    loop {
        let started = Instant::now();
        let sequences = match deployment.during(decode(&client, requests, |_, _| {})).await {
            Err(CliError::Interrupted) => break,
            sequences => sequences?,
        };
        run.timings.add_round(&sequences, started.elapsed());
        if let Some(index) = run.differing(&sequences) {
            let round = run.timings.rounds();
            return Err(CliError::failed(format!("round {round}: sequence {index} has other tokens than in round 1")));
        }
        run.sequences = sequences;
        if said.elapsed() >= ROUND_LINE_EVERY {
            said = Instant::now();
            say(&run.timings.round_line())?;
        }
    }
    let stats = deployment.during(client.stats(false)).await?;
    run.timings.add_stats(&stats);
    Ok(run)
}

impl Run {
    fn differing(&self, sequences: &[Decoded]) -> Option<usize> {
        self.sequences.iter().zip(sequences).position(|(before, now)| before.tokens != now.tokens)
    }
}

fn settings(arguments: &DemoArguments, requests: &[Request]) -> DeploymentSettings {
    let mut settings = arguments.deployment.layer().resolve();
    // Room for all sequences at once, even on one instance; a block may be left unfilled by each.
    const BLOCK: usize = 64;
    let tokens = |request: &Request| request.prompt.len() + request.max_new_tokens as usize + BLOCK;
    let needed = requests.iter().map(tokens).sum();
    settings.kv_tokens = settings.kv_tokens.max(NonZeroUsize::new(needed).unwrap_or(NonZeroUsize::MIN));
    settings
}

fn introduce(model: &Model, settings: &DeploymentSettings) -> Result<(), CliError> {
    let Model { name, config: model, .. } = model;
    say(&format!(
        "model        {name}: {} layers, {} experts of which {} a token, {} parameters",
        model.num_layers,
        model.num_experts,
        model.top_k,
        units::count(model.parameters().total)
    ))?;
    say(&format!(
        "deployment   {} attention, {} FFN over {}, {} microbatches, {}",
        settings.attention, settings.ffn, settings.transport, settings.microbatches, settings.dtype
    ))
}
