//! The small Step-3 checkpoint that the program carries, so that it runs from any directory with nothing beside it; and
//! the model that a command works with, that one or the user's.

use crate::error::CliError;
use std::path::Path;
use std::{fs, io};
use stepmesh_model::{Checkpoint, ModelConfig, ModelError, Text};
use stepmesh_pipeline::CheckpointSource;

/// What the carried model is called.
const ID: &str = "step3-story";

const CONFIG: &str = include_str!("../../fixtures/step3-story/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../fixtures/step3-story/model.safetensors");
const TOKENIZER: &str = include_str!("../../fixtures/step3-story/tokenizer.json");
const TOKENIZER_SETTINGS: &str = include_str!("../../fixtures/step3-story/tokenizer_config.json");

/// What a command needs to know of its model.
#[derive(Debug)]
pub(crate) struct Model {
    /// For programs: the directory's own name, or that of the carried model.
    pub(crate) id: String,
    /// For people: the directory, or what is carried.
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    /// Its way with text, where it has one.
    pub(crate) text: Option<Text>,
}

/// The checkpoint in `directory`, or the carried one.
pub(crate) fn source(directory: Option<&Path>) -> CheckpointSource {
    match directory {
        Some(directory) => CheckpointSource::Directory(directory.into()),
        None => CheckpointSource::Embedded { config: CONFIG, weights: WEIGHTS },
    }
}

/// Writes the carried checkpoint into a directory, for programs of others.
pub(crate) fn write(directory: &Path) -> io::Result<()> {
    fs::write(directory.join("config.json"), CONFIG)?;
    fs::write(directory.join("model.safetensors"), WEIGHTS)
}

impl Model {
    /// Opens the checkpoint in `directory`, or the carried one, which checks that it is there and whole.
    pub(crate) fn open(directory: Option<&Path>) -> Result<Self, CliError> {
        Self::read(directory).map_err(|error| CliError::plain_input(error.to_string()))
    }

    fn read(directory: Option<&Path>) -> Result<Self, ModelError> {
        let Some(directory) = directory else {
            let config = Checkpoint::from_bytes(CONFIG, WEIGHTS)?.config().clone();
            let text = Text::from_json(TOKENIZER, Some(TOKENIZER_SETTINGS), &config)?;
            return Ok(Self {
                id: ID.into(),
                name: format!("{ID} (carried by the program)"),
                config,
                text: Some(text),
            });
        };
        let config = Checkpoint::open(directory)?.config().clone();
        let text = Text::open(directory, &config)?;
        let whole = directory.canonicalize().unwrap_or_else(|_| directory.into());
        let id = whole.file_name().map_or_else(|| ID.into(), |name| name.to_string_lossy().into_owned());
        Ok(Self { id, name: directory.display().to_string(), config, text })
    }

    /// Its way with text, or why there is none.
    pub(crate) fn text(&self) -> Result<&Text, CliError> {
        self.text.as_ref().ok_or_else(|| {
            let message = format!("--prompt needs a tokenizer, but there is no tokenizer.json in {}", self.name);
            CliError::input(message, "give token ids instead: --token-ids 0,5,17")
        })
    }
}
