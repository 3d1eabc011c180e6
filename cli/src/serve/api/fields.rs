//! Typed access to a request's fields; each refusal names the field.

use super::error::ApiError;
use serde_json::{Map, Value};

/// The fields of a JSON object. `null` counts as absent, as clients send it for what they leave open.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::bad("the body is not a JSON object")),
            Err(error) => Err(ApiError::bad(format!("the body is not JSON: {error}"))),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| ApiError::field(name, format!("is {value}; expected a string")))
    }

    pub(super) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        let Some(value) = self.get(name) else { return Ok(false) };
        value.as_bool().ok_or_else(|| ApiError::field(name, format!("is {value}; expected true or false")))
    }

    pub(super) fn integer(&self, name: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_u64().filter(|number| range.contains(number)).map(Some).ok_or_else(|| {
            let (least, most) = range.into_inner();
            ApiError::field(name, format!("is {value}; expected a whole number from {least} to {most}"))
        })
    }

    pub(super) fn number(&self, name: &str, range: std::ops::RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().filter(|number| range.contains(number)).map(Some).ok_or_else(|| {
            let (least, most) = range.into_inner();
            ApiError::field(name, format!("is {value}; expected a number from {least} to {most}"))
        })
    }

    /// Refuses what would change the answer but is not known here.
    pub(super) fn refuse(&self, name: &str, harmless: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.get(name).filter(|value| !harmless(value)) {
            None => Ok(()),
            Some(_) => Err(ApiError::field(name, "is not supported; leave it out")),
        }
    }
}
