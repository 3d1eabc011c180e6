//! The variables that StepMesh's own launch scripts set, understood as ours.

use crate::error::CliError;
use std::net::IpAddr;
use std::str::FromStr;

/// Looks a variable up.
pub(crate) type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// `DMLC_PS_ROOT_URI` and `DMLC_PS_ROOT_PORT`: where the scheduler is. Both or neither.
pub(super) fn scheduler_host_and_port(variable: Variables<'_>) -> Result<Option<(String, u16)>, CliError> {
    let Some(host) = variable("DMLC_PS_ROOT_URI") else { return Ok(None) };
    match number(variable, "DMLC_PS_ROOT_PORT")? {
        Some(port) => Ok(Some((host, port))),
        None => Err(CliError::input(
            "DMLC_PS_ROOT_URI is set, but DMLC_PS_ROOT_PORT is not",
            "set both, or give the scheduler's address with STEPMESH_SCHEDULER or --scheduler",
        )),
    }
}

/// `http://host:port`, with the brackets that an IPv6 address needs.
pub(super) fn url(host: &str, port: u16) -> String {
    match host.parse() {
        Ok(IpAddr::V6(address)) => format!("http://[{address}]:{port}"),
        _ => format!("http://{host}:{port}"),
    }
}

/// A variable that is a number.
pub(super) fn number<N: FromStr>(variable: Variables<'_>, name: &str) -> Result<Option<N>, CliError> {
    let Some(text) = variable(name) else { return Ok(None) };
    let refused = |_| CliError::plain_input(format!("`{text}` in the variable {name} is not a number that fits"));
    text.parse().map(Some).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::super::{AttentionLayer, Layer, SchedulerLayer};

    #[test]
    fn launch_scripts_of_stepmesh_find_their_scheduler() {
        let set = |name: &str| match name {
            "DMLC_PS_ROOT_URI" => Some("10.0.0.7".to_owned()),
            "DMLC_PS_ROOT_PORT" => Some("8123".to_owned()),
            "DMLC_NODE_RANK" | "DMLC_NUM_WORKER" => Some("2".to_owned()),
            "DMLC_NUM_SERVER" => Some("5".to_owned()),
            _ => None,
        };
        let member = AttentionLayer::from_aliases(&set).unwrap();
        assert_eq!(member.scheduler.as_deref(), Some("http://10.0.0.7:8123"));
        assert_eq!(member.rank, Some(2));
        let scheduler = SchedulerLayer::from_aliases(&set).unwrap();
        assert_eq!(scheduler.listen.unwrap().to_string(), "10.0.0.7:8123");
        assert_eq!((scheduler.attention.unwrap().get(), scheduler.ffn.unwrap().get()), (2, 5));
    }

    #[test]
    fn a_variable_that_is_half_or_no_number_is_named() {
        let half = |name: &str| (name == "DMLC_PS_ROOT_URI").then(|| "h".to_owned());
        assert!(AttentionLayer::from_aliases(&half).unwrap_err().to_string().contains("DMLC_PS_ROOT_PORT"));
        let word = |name: &str| (name == "DMLC_NODE_RANK").then(|| "first".to_owned());
        assert!(AttentionLayer::from_aliases(&word).unwrap_err().to_string().contains("DMLC_NODE_RANK"));
    }
}
