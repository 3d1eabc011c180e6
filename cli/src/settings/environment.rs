//! Ties every setting to its variable and writes its default into the help.

use super::Layer;
use clap::Command;
use clap::error::{ContextKind, ContextValue};

fn variable(field: &str) -> String {
    format!("STEPMESH_{}", field.to_uppercase())
}

/// Gives each argument of `command` the variable `STEPMESH_<FIELD>`, and its default a place in the help.
pub(crate) fn with_environment<L: Layer>(command: Command) -> Command {
    let defaults = L::defaults();
    command.mut_args(|arg| {
        if arg.is_hide_set() {
            return arg;
        }
        let field = arg.get_id().to_string();
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let arg = arg.env(variable(&field)).hide_env(true);
        match defaults.iter().find(|(name, _)| *name == field) {
            Some((_, default)) => arg.help(format!("{help} [default: {default}]")),
            None => arg,
        }
    })
}

/// The variable at fault, when a refused value came from the environment and not from the command line.
pub(crate) fn blame(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else { return None };
    let flag = argument.split([' ', '=', '[']).next()?;
    let on_command_line = std::env::args().any(|given| given.split('=').next() == Some(flag));
    let variable = variable(&flag.trim_start_matches('-').replace('-', "_"));
    (!on_command_line && std::env::var_os(&variable).is_some()).then_some(variable)
}
