//! `stepmesh generate`: asks a running deployment.

use crate::carried::Model;
use crate::client::{Client, Target};
use crate::decode::decode;
use crate::demo::{OutputFile, Screen, SequenceReport};
use crate::error::CliError;
use crate::prompts::PromptArguments;
use crate::settings::{Secret, read_token};
use crate::signals::{self, Interrupt};
use serde::Serialize;
use std::path::PathBuf;

/// What `generate` is asked.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct GenerateArguments {
    /// The scheduler's URL, as `stepmesh up` prints it
    #[arg(long, value_name = "URL", env = "STEPMESH_SCHEDULER", hide_env = true)]
    scheduler: String,
    /// Directory of the checkpoint that the deployment runs, for its tokenizer [default: the carried one]
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    #[command(flatten)]
    prompts: PromptArguments,
    /// Write prompts and tokens to FILE as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Token that the scheduler wants. Visible in the process list: prefer STEPMESH_TOKEN or --token-file
    #[arg(long, env = "STEPMESH_TOKEN", hide_env = true)]
    token: Option<Secret>,
    /// File whose first line is the token
    #[arg(long, value_name = "FILE", env = "STEPMESH_TOKEN_FILE", hide_env = true)]
    token_file: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report<'a> {
    sequences: Vec<SequenceReport<'a>>,
}

/// Prints tokens as they come.
pub(crate) fn run(arguments: GenerateArguments) -> Result<(), CliError> {
    if arguments.prompts.is_empty() {
        let hint = "give a prompt: --prompt TEXT, or --token-ids 0,5,17";
        return Err(CliError::input("nothing to generate from", hint));
    }
    let model = Model::open(arguments.checkpoint.as_deref())?;
    let prompts = arguments.prompts.resolve(&model)?;
    let requests = arguments.prompts.requests(&prompts, false)?;
    let token = read_token(arguments.token.as_ref(), arguments.token_file.as_deref())?;
    let json = arguments.json.as_deref().map(OutputFile::open).transpose()?;
    let target = Target { url: arguments.scheduler, token };
    let sequences = signals::runtime()?.block_on(async {
        let mut interrupt = Interrupt::new()?;
        let mut screen = Screen::new(&prompts, model.text.as_ref());
        let work = async {
            let client = Client::connect(&target).await?;
            let sequences = decode(&client, &requests, |index, tokens| screen.show(index, tokens)).await?;
            screen.print(&sequences)?;
            Ok(sequences)
        };
        tokio::select! {
            sequences = work => sequences,
            () = interrupt.arrived() => Err(CliError::Interrupted),
        }
    })?;
    if let Some(file) = json {
        let sequences = SequenceReport::all(&prompts, &sequences, model.text.as_ref());
        file.write_json(&Report { sequences })?;
    }
    Ok(())
}
