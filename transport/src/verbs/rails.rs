//! The rails of a member: the ports that it was told to use, opened in that order.

use super::MAX_LANES;
use super::context::Context;
use super::options::VerbsOptions;
use crate::TransportError;
use std::sync::Arc;

/// One context a rail. Lane `i` of every link uses rail `i` modulo their number.
pub(super) type Rails = Arc<[Arc<Context>]>;

/// A device, and the port of it if one is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    pub(super) device: &'a str,
    pub(super) port: Option<u8>,
}

impl<'a> Wanted<'a> {
    fn parse(name: &'a str) -> Result<Self, TransportError> {
        let Some((device, port)) = name.split_once(':') else { return Ok(Self { device: name, port: None }) };
        match port.parse() {
            Ok(port) if port > 0 => Ok(Self { device, port: Some(port) }),
            _ => {
                Err(TransportError::invalid(format!("`{name}`: an RDMA device's ports count from 1, as in {device}:1")))
            }
        }
    }
}

/// Opens the ports that are asked for, or the first active one.
pub(super) fn open(options: &VerbsOptions) -> Result<Rails, TransportError> {
    options.check()?;
    if options.devices.is_empty() {
        return Ok([Context::open(options, None)?].into());
    }
    if options.devices.len() > usize::from(MAX_LANES) {
        let what = format!("{} rails: a member has 1 to {MAX_LANES}", options.devices.len());
        return Err(TransportError::invalid(what));
    }
    let mut rails: Vec<Arc<Context>> = Vec::with_capacity(options.devices.len());
    for name in &options.devices {
        let rail = Context::open(options, Some(Wanted::parse(name)?))?;
        if let Some(twice) = rails.iter().find(|other| other.name == rail.name && other.port.number == rail.port.number)
        {
            let what = format!("port {} of {} is asked for twice", twice.port.number, twice.name);
            return Err(TransportError::invalid(what));
        }
        rails.push(rail);
    }
    Ok(rails.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rail_is_a_device_and_perhaps_a_port() {
        assert_eq!(Wanted::parse("mlx5_0").unwrap(), Wanted { device: "mlx5_0", port: None });
        assert_eq!(Wanted::parse("mlx5_1:2").unwrap(), Wanted { device: "mlx5_1", port: Some(2) });
        for wrong in ["mlx5_1:", "mlx5_1:0", "mlx5_1:256", "mlx5_1:1:1", "mlx5_1:one"] {
            let why = Wanted::parse(wrong).unwrap_err().to_string();
            assert!(why.contains(wrong), "{why}");
        }
    }
}
