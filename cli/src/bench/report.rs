//! `stepmesh bench report`: results files as a page, as plots, against earlier ones, or as tables.

use crate::demo::OutputFile;
use crate::error::CliError;
use crate::output::say;
use std::path::{Path, PathBuf};
use stepmesh_bench::page::{Results, compare, html, plots, text};

/// What is shown, and how.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ReportArguments {
    /// Results, as `--json` wrote them
    #[arg(required = true, value_name = "FILE")]
    results: Vec<PathBuf>,
    /// Write a page that needs nothing else to FILE
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write each plot as an SVG file into DIR
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Results of an earlier run: say which figures moved by more than noise
    #[arg(long, value_name = "FILE")]
    baseline: Vec<PathBuf>,
}

pub(crate) fn run(arguments: &ReportArguments) -> Result<(), CliError> {
    let results = arguments.results.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
    let baseline = arguments.baseline.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
    let page = arguments.html.as_deref().map(OutputFile::open).transpose()?;
    if let Some(directory) = &arguments.svg {
        std::fs::create_dir_all(directory).map_err(|source| CliError::File {
            verb: "create",
            path: directory.clone(),
            source,
        })?;
        for (index, plot) in plots(&results).into_iter().enumerate() {
            OutputFile::open(&directory.join(format!("{index:02}-{}.svg", plot.name)))?.write(plot.svg.as_bytes())?;
        }
    }
    if page.is_none() && arguments.svg.is_none() && baseline.is_empty() {
        return say(text(&results).trim_end());
    }
    if let Some(page) = page {
        page.write(html(&results).as_bytes())?;
    }
    if !baseline.is_empty() {
        let moved = compare(&baseline, &results);
        for moved in &moved {
            let (worse, change) = (if moved.worse { "worse" } else { "better" }, moved.change * 100.0);
            say(&format!(
                "{worse:<6} {change:>+6.1} %  {} {:.3} -> {:.3}  {}",
                moved.figure, moved.before, moved.now, moved.what
            ))?;
        }
        say(&format!("{} figures moved by more than noise", moved.len()))?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Results, CliError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| CliError::File { verb: "read", path: path.into(), source })?;
    Results::parse(&path.display().to_string(), &text).map_err(|error| CliError::plain_input(error.to_string()))
}
