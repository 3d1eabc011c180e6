//! `stepmesh bench`: the latency suite.

mod common;
mod compare;
mod gpu;
mod model;
mod pipeline;
mod pipeline_ffn;
mod pushpull;
mod report;
mod scaling;
mod scaling_member;
mod screen;
mod sizes;
mod transport;

use crate::error::CliError;
use clap::Subcommand;

/// What can be measured.
#[derive(Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Round trips and streams over one transport, next to the floor of this machine, and to UCX where it is installed
    #[command(after_help = "Examples:  stepmesh bench transport --provider shm --json shm.json\n\
                                  \x20          stepmesh bench transport --provider tcp --sizes 8,7KiB,1.75MiB --quick")]
    Transport(transport::TransportArguments),
    /// Whole round trips through the mesh with the transfers of the Step-3 paper, next to the floor of this machine
    #[command(after_help = "Examples:  stepmesh bench pushpull --json pushpull.json\n\
                                  \x20          stepmesh bench pushpull --provider tcp --batch 128 --microbatches 3 --ffn-us 250")]
    Pushpull(pushpull::PushPullArguments),
    /// The three-stage pipeline with stages that only take their time, next to what the times allow
    #[command(after_help = "Examples:  stepmesh bench pipeline --json pipeline.json\n\
                                  \x20          stepmesh bench pipeline --attention-us 250 --ffn-us 250 --wire-us 272")]
    Pipeline(pipeline::PipelineArguments),
    #[command(hide = true)]
    PipelineFfn(pipeline_ffn::PipelineFfnArguments),
    /// What a transfer costs as a deployment grows from 1A1F to 16A16F
    #[command(after_help = "Example:  stepmesh bench scaling --json scaling.json")]
    Scaling(scaling::ScalingArguments),
    #[command(hide = true)]
    ScalingMember(scaling_member::ScalingMemberArguments),
    /// The systems that are installed on this machine, in turn with ours: UCX, libfabric, perftest, NIXL, Mooncake, ZeroMQ
    #[command(after_help = "Examples:  stepmesh bench compare --json compare.json\n\
                                  \x20          stepmesh bench compare --provider tcp --bytes 7168:14336 --python venv/bin/python")]
    Compare(compare::CompareArguments),
    /// How fast the model computes: an expert's products against the processor's peak, decoding beside PyTorch
    #[command(after_help = "Examples:  stepmesh bench model --json model.json\n\
                                  \x20          stepmesh bench model --python venv/bin/python --batch 32")]
    Model(model::ModelArguments),
    /// What the runtime costs a GPU and what it takes on it; needs a GPU
    #[command(after_help = "Examples:  stepmesh bench gpu --json gpu.json\n\
                                  \x20          stepmesh bench gpu --part pushpull,replay --one-process")]
    Gpu(gpu::GpuArguments),
    #[command(hide = true)]
    GpuFfn(gpu::GpuFfnArguments),
    /// Results files as tables, as one HTML page with plots, and what has moved since others
    #[command(
        after_help = "Example:  stepmesh bench report shm.json pushpull.json --html bench.html --baseline old.json"
    )]
    Report(report::ReportArguments),
}

pub(crate) fn run(command: BenchCommand) -> Result<(), CliError> {
    match command {
        BenchCommand::Transport(arguments) => transport::run(&arguments),
        BenchCommand::Pushpull(arguments) => pushpull::run(&arguments),
        BenchCommand::Pipeline(arguments) => pipeline::run(&arguments),
        BenchCommand::PipelineFfn(arguments) => pipeline_ffn::run(&arguments),
        BenchCommand::Scaling(arguments) => scaling::run(&arguments),
        BenchCommand::ScalingMember(arguments) => scaling_member::run(&arguments),
        BenchCommand::Compare(arguments) => compare::run(&arguments),
        BenchCommand::Model(arguments) => model::run(&arguments),
        BenchCommand::Gpu(arguments) => gpu::run(&arguments),
        BenchCommand::GpuFfn(arguments) => gpu::run_ffn(&arguments),
        BenchCommand::Report(arguments) => report::run(&arguments),
    }
}
