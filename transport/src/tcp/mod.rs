//! The `tcp` provider.
use crate::{Device, DeviceOptions, TransportError};
use std::sync::Arc;

/// Opens the provider.
pub fn open(_options: &DeviceOptions) -> Result<Arc<dyn Device>, TransportError> {
    Err(TransportError::invalid("in progress"))
}
