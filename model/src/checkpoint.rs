//! A checkpoint in HuggingFace layout: `config.json` and memory-mapped safetensors, whole or sharded.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, SafeTensorError};

use crate::tensor::Tensor;
use crate::{ModelConfig, ModelError};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An open checkpoint. Headers are checked; weights stay on disk until a stage loads the part that it holds.
///
/// The files must not be changed while the checkpoint is open: they are mapped, and a file that is cut short under a
/// mapping ends the process that touches it.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    files: Vec<WeightFile>,
    /// Tensor name to position in `files`.
    tensors: HashMap<String, usize>,
    origin: String,
}

/// What a checkpoint's files hold for each side, in bytes of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Inventory {
    /// Weight files.
    pub files: usize,
    /// Tensors of the attention side, scales included.
    pub attention_bytes: u64,
    /// Tensors of the FFN side, scales included.
    pub ffn_bytes: u64,
    /// Tensors of neither: vision, or what this release does not know. No daemon reads them.
    pub skipped_bytes: u64,
    /// How many these are.
    pub skipped_tensors: usize,
    /// Whether some weights are FP8.
    pub fp8: bool,
}

/// Which side a tensor belongs to, by its name.
enum Side {
    Attention,
    Ffn,
    Neither,
}

impl Side {
    fn of(name: &str) -> Self {
        const FFN: [&str; 5] = [".mlp.", ".share_expert.", ".moe.gate_proj.", ".moe.up_proj.", ".moe.down_proj."];
        match name.starts_with("model.") || name.starts_with("lm_head.") {
            true if FFN.iter().any(|part| name.contains(part)) => Self::Ffn,
            true => Self::Attention,
            false => Self::Neither,
        }
    }
}

#[derive(Debug)]
struct WeightFile {
    name: String,
    bytes: Bytes,
    metadata: Metadata,
    /// Where tensor data starts: after the length word and the header.
    data_start: usize,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
    #[cfg(any(test, fuzzing))]
    Owned(Vec<u8>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
            #[cfg(any(test, fuzzing))]
            Self::Owned(bytes) => bytes,
        }
    }
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`: `config.json`, and either `model.safetensors` or the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Names the file that is missing, truncated, corrupt or contradictory.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let config = ModelConfig::from_dir(dir)?;
        let index = dir.join(INDEX);
        let origin = dir.display().to_string();
        if index.exists() {
            return Self::open_shards(config, dir, &index, origin);
        }
        let file = WeightFile::map(&dir.join(SINGLE))?;
        Ok(Self::with_file(config, file, origin))
    }

    /// A checkpoint that the binary carries: the text of `config.json` and the bytes of one safetensors file.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], naming `config.json` and `model.safetensors` as embedded.
    pub fn from_bytes(config_json: &str, safetensors: &'static [u8]) -> Result<Self, ModelError> {
        let config = ModelConfig::from_json(config_json, "embedded config.json")?;
        let file = WeightFile::check("embedded model.safetensors".into(), Bytes::Static(safetensors))?;
        Ok(Self::with_file(config, file, "the embedded checkpoint".into()))
    }

    /// As [`Checkpoint::from_bytes`], of bytes that do not outlive it.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_owned(config_json: &str, safetensors: Vec<u8>) -> Result<Self, ModelError> {
        let config = ModelConfig::from_json(config_json, "config.json")?;
        Ok(Self::with_file(
            config,
            WeightFile::check("model.safetensors".into(), Bytes::Owned(safetensors))?,
            "".into(),
        ))
    }

    /// Asks for every tensor, each in the shape that its file gives it, which panics if one is not there.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn check_all(&self) {
        for (name, file) in &self.tensors {
            let shape = self.files[*file].metadata.info(name).map(|info| info.shape.clone());
            let found = self.tensor(name, &shape.unwrap_or_default());
            assert!(matches!(found, Ok(_) | Err(ModelError::TensorDtype { .. })), "{name}: {:?}", found.err());
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of all weight files, tensors of other parts of the model (vision) included.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes.as_slice().len() as u64).sum()
    }

    /// What the weight files hold, counted from their headers.
    pub fn inventory(&self) -> Inventory {
        let mut inventory = Inventory { files: self.files.len(), ..Inventory::default() };
        for (name, file) in &self.tensors {
            let Some(info) = self.files.get(*file).and_then(|file| file.metadata.info(name)) else { continue };
            let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
            inventory.fp8 |= info.dtype == safetensors::Dtype::F8_E4M3;
            match Side::of(name) {
                Side::Attention => inventory.attention_bytes += bytes,
                Side::Ffn => inventory.ffn_bytes += bytes,
                Side::Neither => {
                    inventory.skipped_bytes += bytes;
                    inventory.skipped_tensors += 1;
                }
            }
        }
        inventory
    }

    fn with_file(config: ModelConfig, file: WeightFile, origin: String) -> Self {
        let tensors = file.metadata.tensors().into_keys().map(|name| (name, 0)).collect();
        Self { config, files: vec![file], tensors, origin }
    }

    fn open_shards(config: ModelConfig, dir: &Path, index: &Path, origin: String) -> Result<Self, ModelError> {
        let mut names: Vec<String> = Vec::new();
        let mut tensors = HashMap::new();
        let wrong = |reason| ModelError::Index { index: index.display().to_string(), reason };
        for (tensor, shard) in read_index(index)? {
            if Path::new(&shard).file_name() != Some(shard.as_ref()) {
                return Err(wrong(format!(
                    "tensor `{tensor}` is said to be in `{shard}`, which is not a plain file name"
                )));
            }
            let position = names.iter().position(|name| *name == shard).unwrap_or_else(|| {
                names.push(shard);
                names.len() - 1
            });
            tensors.insert(tensor, position);
        }
        let mut files = Vec::with_capacity(names.len());
        for name in names {
            if !dir.join(&name).exists() {
                return Err(wrong(format!("it names the file `{name}`, which is not there")));
            }
            files.push(WeightFile::map(&dir.join(&name))?);
        }
        for (tensor, position) in &tensors {
            let file = &files[*position];
            if file.metadata.info(tensor).is_none() {
                return Err(wrong(format!("tensor `{tensor}` is said to be in {}, which does not hold it", file.name)));
            }
        }
        Ok(Self { config, files, tensors, origin })
    }

    /// The tensor `name`, which must have the shape that the configuration implies.
    pub(crate) fn tensor<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<Tensor<'a>, ModelError> {
        let missing = || ModelError::MissingTensor { tensor: name.into(), origin: self.origin.clone() };
        let file = self.tensors.get(name).and_then(|position| self.files.get(*position)).ok_or_else(missing)?;
        let info = file.metadata.info(name).ok_or_else(missing)?;
        if info.shape != shape {
            return Err(ModelError::TensorShape {
                tensor: name.into(),
                file: file.name.clone(),
                found: info.shape.clone(),
                expected: shape.into(),
            });
        }
        let (start, end) = (file.data_start + info.data_offsets.0, file.data_start + info.data_offsets.1);
        let bytes = file.bytes.as_slice().get(start..end).ok_or_else(|| ModelError::Safetensors {
            file: file.name.clone(),
            reason: format!("tensor `{name}` reaches past the end of the file"),
        })?;
        Tensor::new(name, &file.name, info.dtype, shape, bytes)
    }
}

impl WeightFile {
    fn map(path: &Path) -> Result<Self, ModelError> {
        let failed = |source| ModelError::Io { path: PathBuf::from(path), source };
        let file = File::open(path).map_err(failed)?;
        // SAFETY: the mapping is read-only and private to this checkpoint; that nobody cuts the file short or rewrites
        // it meanwhile is the documented condition of `Checkpoint`, the same as for every memory-mapped checkpoint.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Self::check(path.display().to_string(), Bytes::Mapped(map))
    }

    /// Checks the header: its length, its JSON, that tensors neither overlap nor leave holes, and that the file is as
    /// long as they need.
    fn check(name: String, bytes: Bytes) -> Result<Self, ModelError> {
        let (header_len, metadata) = SafeTensors::read_metadata(bytes.as_slice())
            .map_err(|error| ModelError::Safetensors { file: name.clone(), reason: explain(&error) })?;
        Ok(Self { name, bytes, metadata, data_start: header_len + 8 })
    }
}

fn explain(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => {
            "it is truncated before the end of its header".into()
        }
        SafeTensorError::MetadataIncompleteBuffer => "its length is not what its header declares (truncated?)".into(),
        SafeTensorError::InvalidOffset(tensor) => format!("tensor `{tensor}` overlaps another one or leaves a hole"),
        other => other.to_string(),
    }
}

fn read_index(path: &Path) -> Result<Vec<(String, String)>, ModelError> {
    let json = std::fs::read_to_string(path).map_err(|source| ModelError::Io { path: path.into(), source })?;
    parse_index(&json, &path.display().to_string())
}

/// Each tensor, and the file that it is said to be in.
pub(crate) fn parse_index(json: &str, origin: &str) -> Result<Vec<(String, String)>, ModelError> {
    let index: serde_json::Value =
        serde_json::from_str(json).map_err(|source| ModelError::Json { origin: origin.into(), source })?;
    let wrong = |reason: &str| ModelError::Index { index: origin.into(), reason: reason.into() };
    let map = index.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| wrong("it has no `weight_map` object"))?;
    map.iter()
        .map(|(tensor, file)| {
            let file = file.as_str().ok_or_else(|| wrong(&format!("the file of tensor `{tensor}` is not a string")))?;
            Ok((tensor.clone(), file.to_owned()))
        })
        .collect()
}
