//! The command tree.

use crate::bench::BenchCommand;
use crate::demo::DemoArguments;
use crate::doctor::DoctorArguments;
use crate::eval::EvalArguments;
use crate::generate::GenerateArguments;
use crate::inspect::InspectArguments;
use crate::serve::ServeArguments;
use crate::settings::{AttentionLayer, DeploymentLayer, FfnLayer, Layered, SchedulerLayer, with_environment};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Step-3 decoding with attention and FFN in different processes.
#[derive(Parser, Debug)]
#[command(
    name = "stepmesh",
    version,
    arg_required_else_help = true,
    after_help = "Start with:  stepmesh demo\n\
                  Then:        stepmesh up            and, with the address that it prints,\n\
                  \x20            stepmesh generate --scheduler URL --token-ids 0,5,17",
    max_term_width = 110
)]
pub(crate) struct Arguments {
    /// Log more; of a deployment, show what its processes say
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
    /// The process without which this one must not live
    #[arg(long, global = true, hide = true, value_name = "PID")]
    pub(crate) supervised_by: Option<u32>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What can be asked.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Start a deployment on this host, decode a few prompts, say how fast, stop everything
    #[command(after_help = "Examples:  stepmesh demo\n\
                                  \x20          stepmesh demo --attention 3 --ffn 1 --transport tcp --token-ids 0,5,17")]
    Demo(Box<DemoArguments>),
    /// Run a deployment on this host until a signal ends it; prints `ready URL` when it takes requests
    #[command(after_help = "Example:  stepmesh up --attention 2 --ffn 2")]
    Up(Box<Layered<DeploymentLayer>>),
    /// Decode prompts on a running deployment
    #[command(after_help = "Example:  stepmesh generate --scheduler http://127.0.0.1:7400 --token-ids 0,5,17")]
    Generate(Box<GenerateArguments>),
    /// Serve OpenAI's HTTP API: completions and chat, on a deployment of its own or one that runs
    #[command(after_help = "Example:  stepmesh serve --port 8000\n\
                                  \x20          curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\\n\
                                  \x20            -d '{\"prompt\": \"Once there was a girl\", \"max_tokens\": 200}'")]
    Serve(Box<ServeArguments>),
    /// Run the scheduler: it admits members, introduces them to each other and takes requests
    #[command(after_help = "Example:  stepmesh scheduler --listen 127.0.0.1:7400 --attention 2 --ffn 2")]
    Scheduler(Box<Layered<SchedulerLayer>>),
    /// Run an attention daemon
    #[command(after_help = "Example:  stepmesh attention --scheduler http://127.0.0.1:7400 --checkpoint ./step3-tiny")]
    Attention(Box<Layered<AttentionLayer>>),
    /// Run an FFN daemon
    #[command(after_help = "Example:  stepmesh ffn --scheduler http://127.0.0.1:7400 --checkpoint ./step3-tiny")]
    Ffn(Box<Layered<FfnLayer>>),
    /// Say how well a model predicts texts, measured through the daemons
    #[command(after_help = "Example:  stepmesh eval fixtures/step3-story/heldout.txt --dtype fp8")]
    Eval(Box<EvalArguments>),
    /// Measure this machine: transports and mesh against the floor and against other systems
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Say what this machine has and lacks
    Doctor(DoctorArguments),
    /// Say what model a checkpoint holds
    #[command(after_help = "Example:  stepmesh inspect ./step3-tiny")]
    Inspect(InspectArguments),
}

impl Arguments {
    /// Reads the command line and the environment.
    pub(crate) fn read() -> Result<Self, clap::Error> {
        let command = Self::command()
            .mut_subcommand("scheduler", with_environment::<SchedulerLayer>)
            .mut_subcommand("attention", with_environment::<AttentionLayer>)
            .mut_subcommand("ffn", with_environment::<FfnLayer>)
            .mut_subcommand("up", with_environment::<DeploymentLayer>)
            .mut_subcommand("serve", crate::serve::help);
        Self::from_arg_matches(&command.try_get_matches()?)
    }
}
