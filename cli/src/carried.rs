//! The small Step-3 checkpoint that the program carries, so that it runs from any directory with nothing beside it.

use crate::error::CliError;
use std::path::Path;
use stepmesh_model::{Checkpoint, ModelConfig};
use stepmesh_pipeline::CheckpointSource;

/// What people see instead of a directory.
pub(crate) const NAME: &str = "step3-tiny (carried by the program)";

const CONFIG: &str = include_str!("../../fixtures/step3-tiny/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../fixtures/step3-tiny/model.safetensors");

/// The checkpoint in `directory`, or the carried one.
pub(crate) fn source(directory: Option<&Path>) -> CheckpointSource {
    match directory {
        Some(directory) => CheckpointSource::Directory(directory.into()),
        None => CheckpointSource::Embedded { config: CONFIG, weights: WEIGHTS },
    }
}

/// Opens it, which checks that it is there and whole, and says what model it is.
pub(crate) fn check(directory: Option<&Path>) -> Result<ModelConfig, CliError> {
    let checkpoint = match directory {
        Some(directory) => Checkpoint::open(directory),
        None => Checkpoint::from_bytes(CONFIG, WEIGHTS),
    };
    match checkpoint {
        Ok(checkpoint) => Ok(checkpoint.config().clone()),
        Err(error) => Err(CliError::plain_input(error.to_string())),
    }
}
