//! What every suite is asked, and how each ends: its table is out, its JSON is written, also of a part.

use super::screen::Screen;
use crate::demo::OutputFile;
use crate::error::CliError;
use crate::signals;
use serde::Serialize;
use std::fmt::Display;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use stepmesh_bench::{BenchError, Cpus, Program, Progress, Report};

/// A measurement is left when it is over; none takes as long.
const GRACE: Duration = Duration::from_secs(60);

/// Arguments of every suite.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Common {
    /// The CPUs of the two ends [default: the first two that this process may use]
    #[arg(long, value_name = "A,B")]
    cpus: Option<CpuPair>,
    /// A short look, to see that everything works: the figures are not worth keeping
    #[arg(long)]
    pub(crate) quick: bool,
    /// Write the results to FILE as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug)]
struct CpuPair([usize; 2]);

impl FromStr for CpuPair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let cpus = text.split_once(',').and_then(|(a, b)| Some([a.trim().parse().ok()?, b.trim().parse().ok()?]));
        cpus.map(Self).ok_or_else(|| "two CPU numbers with a comma between them, as in `0,1`".into())
    }
}

/// This program as one of the processes of a measurement; it ends with this one.
pub(crate) fn in_role(role: &str) -> Program {
    let own = std::process::id().to_string();
    let arguments = ["--supervised-by", &own, "bench", role].map(Into::into).to_vec();
    Program { program: crate::program::path(), arguments }
}

/// A run that can be told to stop and whose results can be written.
pub(crate) struct Session {
    pub(crate) cpus: Cpus,
    file: Option<OutputFile>,
    stop: Arc<AtomicBool>,
}

impl Session {
    /// Checks what was asked and opens the output, before anything is measured.
    pub(crate) fn open(common: &Common) -> Result<Self, CliError> {
        let cpus = Cpus::choose(common.cpus.map(|CpuPair(cpus)| cpus)).map_err(explain)?;
        let file = common.json.as_deref().map(OutputFile::open).transpose()?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        signals::on_interrupt(GRACE, move || asked.store(true, Ordering::Relaxed))?;
        Ok(Self { cpus, file, stop })
    }

    /// An empty report.
    pub(crate) fn report<R>(&self) -> Report<R> {
        let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
        Report::new(self.cpus, std::iter::once("stepmesh".into()).chain(arguments).collect::<Vec<_>>().join(" "))
    }

    /// Shows how far a suite has come; it is enough when nobody reads any more, or somebody has interrupted.
    pub(crate) fn follow<R: Display>(&self, screen: &mut Screen, progress: Progress<'_, R>) -> ControlFlow<()> {
        let read = match progress {
            Progress::Taking { number, of, attempt } => {
                screen.step(number, of, attempt);
                true
            }
            Progress::Done(result) => screen.line(result),
        };
        if read && !self.stop.load(Ordering::Relaxed) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    /// Writes what there is, also when the run ended early; then says how it ended.
    pub(crate) fn close<R: Serialize>(
        self,
        report: &Report<R>,
        outcome: Result<(), BenchError>,
        shown: Result<(), CliError>,
    ) -> Result<(), CliError> {
        if let Some(file) = self.file
            && !report.results.is_empty()
        {
            file.write_json(report)?;
        }
        shown?;
        outcome.map_err(explain)
    }
}

/// The same error, as the command says it.
pub(crate) fn explain(error: BenchError) -> CliError {
    match error {
        BenchError::Cpus(_) | BenchError::SameCpu(_) | BenchError::NoCpu { .. } => {
            CliError::plain_input(error.to_string())
        }
        BenchError::Interrupted => CliError::Interrupted,
        error => CliError::failed(error.to_string()),
    }
}
