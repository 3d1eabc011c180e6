//! `stepmesh eval`: how well a model predicts texts, measured through the daemons.

use crate::carried::Model;
use crate::client::Client;
use crate::demo::OutputFile;
use crate::deployment::Deployment;
use crate::error::CliError;
use crate::loading::StartScreen;
use crate::output::say;
use crate::settings::{Layer, OwnDeployment};
use crate::signals;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use stepmesh_model::Text;
use stepmesh_proto::control::generate_event::Body;
use stepmesh_proto::control::{GenerateRequest, failed};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Texts that are scored at the same time.
const IN_FLIGHT: usize = 64;

/// What `eval` is asked.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct EvalArguments {
    /// Texts, one a line; each is scored from its first token after the beginning to the end-of-sequence token
    #[arg(value_name = "FILE")]
    texts: PathBuf,
    #[command(flatten)]
    deployment: OwnDeployment,
    /// Write the result to FILE as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Serialize, Clone, Copy, Debug, Default)]
struct Report {
    texts: usize,
    /// Tokens predicted.
    tokens: usize,
    /// Mean negative log likelihood of a token, in nats.
    loss: f64,
    perplexity: f64,
    tokens_per_s: f64,
}

/// Starts a deployment, scores all texts, says how well they were predicted.
pub(crate) fn run(arguments: &EvalArguments, verbose: bool) -> Result<(), CliError> {
    let model = Model::open(arguments.deployment.checkpoint.as_deref())?;
    let failed = |source| CliError::File { verb: "read", path: arguments.texts.clone(), source };
    let lines = std::fs::read_to_string(&arguments.texts).map_err(failed)?;
    let sequences = sequences(&lines, &model)?;
    let json = arguments.json.as_deref().map(OutputFile::open).transpose()?;
    let report = signals::runtime()?.block_on(async {
        let mut screen = StartScreen::quiet();
        let deployment =
            Deployment::start(&arguments.deployment.layer().resolve(), verbose, &mut |progress| screen.show(&progress))
                .await;
        screen.finish(deployment.is_ok());
        let mut deployment = deployment?;
        let target = deployment.target().clone();
        let work = async { score(&Client::connect(&target).await?, sequences).await };
        let report = deployment.during(work).await;
        deployment.stop().await;
        report
    })?;
    say(&format!("{:<12} {:.4} nats a token, perplexity {:.3}", "loss", report.loss, report.perplexity))?;
    say(&format!("{:<12} {} tokens of {} texts", "predicted", report.tokens, report.texts))?;
    say(&format!("{:<12} {:.1} tokens/s", "throughput", report.tokens_per_s))?;
    json.map_or(Ok(()), |file| file.write_json(&report))
}

/// The tokens of each line, with an end-of-sequence token where the model has one.
fn sequences(lines: &str, model: &Model) -> Result<Vec<Vec<u32>>, CliError> {
    let text: &Text = model.text()?;
    let (context, end) = (model.config.context_length, model.config.eos_token_ids.first());
    let sequence = |(number, line): (usize, &str)| {
        let mut tokens = text.encode(line).map_err(|error| CliError::plain_input(error.to_string()))?;
        tokens.extend(end);
        if !(2..=context).contains(&tokens.len()) {
            let message = format!("line {}: {} tokens; 2 to {context} can be scored", number + 1, tokens.len());
            return Err(CliError::plain_input(message));
        }
        Ok(tokens)
    };
    let sequences: Vec<_> = lines
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(sequence)
        .collect::<Result<_, _>>()?;
    if sequences.is_empty() { Err(CliError::plain_input("there is no text to score")) } else { Ok(sequences) }
}

async fn score(client: &Client, sequences: Vec<Vec<u32>>) -> Result<Report, CliError> {
    let started = Instant::now();
    let permits = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut running = JoinSet::new();
    let texts = sequences.len();
    for (index, prompt) in sequences.into_iter().enumerate() {
        let (client, permits) = (client.clone(), permits.clone());
        running.spawn(async move {
            let _permit = permits.acquire_owned().await;
            one(&client, prompt).await.map_err(|error| error.of_sequence(index))
        });
    }
    let (mut sum, mut tokens) = (0.0, 0);
    while let Some(done) = running.join_next().await {
        let (loss, count) = done.map_err(|error| CliError::failed(format!("a text's task ended: {error}")))??;
        sum += loss;
        tokens += count;
    }
    let loss = sum / tokens.max(1) as f64;
    let tokens_per_s = tokens as f64 / started.elapsed().as_secs_f64();
    Ok(Report { texts, tokens, loss, perplexity: loss.exp(), tokens_per_s })
}

/// The summed negative log likelihood of a sequence's tokens after the first, and their number.
async fn one(client: &Client, prompt: Vec<u32>) -> Result<(f64, usize), CliError> {
    let expected = prompt.len() - 1;
    let mut events = client.start(GenerateRequest { prompt, score_prompt: true, ..Default::default() }).await?;
    let (mut sum, mut count) = (0.0, 0);
    loop {
        match events.next().await? {
            Some(Body::Scores(scores)) => {
                count += scores.log_probabilities.len();
                sum -= scores.log_probabilities.iter().map(|p| f64::from(*p)).sum::<f64>();
            }
            Some(Body::Finished(_)) if count == expected => return Ok((sum, count)),
            Some(Body::Failed(failure)) if failure.kind() == failed::Kind::Invalid => {
                return Err(CliError::plain_input(failure.message));
            }
            Some(Body::Failed(failure)) => return Err(CliError::failed(failure.message)),
            Some(Body::Token(_)) => {}
            Some(Body::Finished(_)) | None => {
                return Err(CliError::failed(format!("{count} of {expected} tokens were scored")));
            }
        }
    }
}
