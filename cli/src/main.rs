//! The `stepmesh` command: reads what is asked, does it, and says what went wrong.

mod arguments;
mod bench;
mod carried;
mod client;
mod decode;
mod demo;
mod deployment;
mod doctor;
mod error;
mod eval;
mod generate;
mod guard;
mod inspect;
mod loading;
mod output;
mod program;
mod prompts;
mod roles;
mod serve;
mod settings;
mod signals;
mod supervisor;
mod units;
mod up;

use arguments::{Arguments, Command};
use error::CliError;
use roles::Log;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = match Arguments::read() {
        Ok(arguments) => arguments,
        Err(error) => return explain(&error),
    };
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn run(arguments: Arguments) -> Result<(), CliError> {
    if let Some(supervisor) = arguments.supervised_by {
        guard::end_with(supervisor)?;
    }
    let verbose = arguments.verbose;
    let log = match (verbose, arguments.supervised_by) {
        (false, Some(_)) => Log::Problems,
        (true, None) => Log::Everything,
        _ => Log::Events,
    };
    match arguments.command {
        Command::Demo(arguments) => demo::run(*arguments, verbose),
        Command::Up(settings) => up::run(&settings.resolve()?, verbose),
        Command::Generate(arguments) => generate::run(*arguments),
        Command::Scheduler(settings) => roles::run_scheduler(&settings.resolve()?, log),
        Command::Attention(settings) => roles::run_attention(&settings.resolve()?, log),
        Command::Ffn(settings) => roles::run_ffn(&settings.resolve()?, log),
        Command::Serve(arguments) => serve::run(&arguments, verbose),
        Command::Eval(arguments) => eval::run(&arguments, verbose),
        Command::Bench(command) => bench::run(command),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
    }
}

/// Help and version end well; everything else is a usage error.
fn explain(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if let Some(variable) = settings::blame(error) {
        output::complain(&format!("  hint: the value comes from the variable {variable}"));
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}
