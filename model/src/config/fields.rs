//! Typed access to the fields of a JSON object; each failure names the file and the dotted field.

use serde_json::{Map, Value};
use std::borrow::Cow;

use crate::ModelError;

/// One JSON object, where it came from, and the dotted path that leads to it.
pub(super) struct Fields<'a> {
    values: Cow<'a, Map<String, Value>>,
    origin: &'a str,
    path: String,
}

impl<'a> Fields<'a> {
    pub(super) fn parse(json: &str, origin: &'a str) -> Result<Self, ModelError> {
        match serde_json::from_str(json) {
            Ok(Value::Object(values)) => Ok(Self { values: Cow::Owned(values), origin, path: String::new() }),
            Ok(_) => Err(ModelError::Config {
                origin: origin.into(),
                field: "(root)".into(),
                reason: "must be a JSON object".into(),
            }),
            Err(source) => Err(ModelError::Json { origin: origin.into(), source }),
        }
    }

    pub(super) fn error(&self, field: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Config { origin: self.origin.into(), field: format!("{}{field}", self.path), reason: reason.into() }
    }

    fn mistyped(&self, field: &str, value: &Value, expected: &str) -> ModelError {
        self.error(field, format!("is {value}; expected {expected}"))
    }

    /// The field's value; an explicit `null` counts as absent.
    fn get(&self, field: &str) -> Option<&Value> {
        self.values.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Fields<'_>>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Fields {
                values: Cow::Borrowed(values),
                origin: self.origin,
                path: format!("{}{field}.", self.path),
            })),
            Some(other) => Err(self.mistyped(field, other, "an object or null")),
        }
    }

    pub(super) fn size(&self, field: &str, most: usize) -> Result<usize, ModelError> {
        self.size_if_present(field, most)?.ok_or_else(|| self.error(field, "is missing; it is a positive integer"))
    }

    pub(super) fn size_if_present(&self, field: &str, most: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if (1..=most).contains(&size) => Ok(Some(size)),
            _ => Err(self.mistyped(field, value, &format!("an integer from 1 to {most}"))),
        }
    }

    pub(super) fn number(&self, field: &str) -> Result<Option<f32>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().map(|number| number as f32) {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.mistyped(field, value, "a number")),
        }
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.mistyped(field, value, "true or false"))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&str>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.mistyped(field, value, "a string"))
    }

    /// One token id or a list of them.
    pub(super) fn token_ids(&self, field: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let listed = match value {
            Value::Array(ids) => ids.as_slice(),
            one => std::slice::from_ref(one),
        };
        let token = |id: &Value| id.as_u64().filter(|id| *id < vocab_size as u64).map(|id| id as u32);
        let ids: Option<Vec<u32>> = listed.iter().map(token).collect();
        ids.map(Some).ok_or_else(|| self.mistyped(field, value, &format!("token ids below {vocab_size}")))
    }

    /// Layer numbers as a list of integers or as a comma-separated string.
    pub(super) fn layer_list(&self, field: &str) -> Result<Option<Vec<usize>>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let layers: Option<Vec<usize>> = match value {
            Value::String(text) if text.trim().is_empty() => Some(Vec::new()),
            Value::String(text) => text.split(',').map(|layer| layer.trim().parse().ok()).collect(),
            Value::Array(items) => items.iter().map(|layer| layer.as_u64().map(|layer| layer as usize)).collect(),
            _ => None,
        };
        layers.map(Some).ok_or_else(|| self.mistyped(field, value, "layer numbers: a list, or \"4,5,6\""))
    }
}
