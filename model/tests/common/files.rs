//! Checkpoint files that tests change, and errors that must name what was changed.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
pub use safetensors::tensor::Dtype as FileDtype;
use safetensors::tensor::TensorView;
use stepmesh_model::ModelError;

/// Name, type, shape and bytes of a file's tensors.
pub type Tensors = BTreeMap<String, (FileDtype, Vec<usize>, Vec<u8>)>;

pub fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let copy =
        |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    file.tensors().into_iter().map(copy).collect()
}

pub fn save(path: &Path, tensors: &Tensors) {
    let view = |(dtype, shape, data): &(FileDtype, Vec<usize>, Vec<u8>)| {
        TensorView::new(*dtype, shape.clone(), data)
            .map(|view| (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    let checked: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), view(tensor).unwrap())).collect();
    let views = checked
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[track_caller]
pub fn assert_says<T: std::fmt::Debug>(result: Result<T, ModelError>, words: &[&str]) {
    let error = result.unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "`{error}` does not say `{word}`");
    }
}
