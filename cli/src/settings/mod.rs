//! Settings in layers: a flag wins over the environment, that over the configuration file, that over the default.
//!
//! Every field `some_field` is at once the flag `--some-field`, the variable `STEPMESH_SOME_FIELD` and the key
//! `some_field` of the role's TOML file.

mod aliases;
mod deployment;
mod environment;
mod file;
mod member;
mod own;
mod scheduler;
mod secret;
mod values;

pub(crate) use deployment::{DeploymentLayer, DeploymentSettings};
pub(crate) use environment::{blame, with_environment};
pub(crate) use member::{AttentionLayer, AttentionSettings, FfnLayer, FfnSettings};
pub(crate) use own::OwnDeployment;
pub(crate) use scheduler::{SchedulerLayer, SchedulerSettings};
pub(crate) use secret::{Secret, read_token};
pub(crate) use values::{Connect, Names, Precision, ReleasePolicy, SlotMemory, Transport};

use crate::error::CliError;
use std::path::PathBuf;

/// One role's settings as one source gives them: every field may be absent.
pub(crate) trait Layer: serde::de::DeserializeOwned + Default {
    /// The settings with nothing absent but what has no default.
    type Settings;

    /// These, and where they are absent those of `lower`.
    fn or(self, lower: Self) -> Self;

    /// These, and where they are absent the defaults.
    fn resolve(self) -> Self::Settings;

    /// Fields that have a default, and the default as a user would write it.
    fn defaults() -> Vec<(&'static str, String)>;

    /// What StepMesh's own variables say.
    fn from_aliases(_variable: aliases::Variables<'_>) -> Result<Self, CliError> {
        Ok(Self::default())
    }
}

/// `--config FILE` and every field of the role.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Layered<L: clap::Args> {
    /// TOML file with any of the settings below; a field is spelt as its flag, with underscores.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    given: L,
}

impl<L: Layer + clap::Args> Layered<L> {
    /// Joins the layers.
    pub(crate) fn resolve(self) -> Result<L::Settings, CliError> {
        let aliases = L::from_aliases(&|name| std::env::var(name).ok())?;
        let file = self.config.as_deref().map(file::read::<L>).transpose()?.unwrap_or_default();
        Ok(self.given.or(aliases).or(file).resolve())
    }
}

/// Declares a role's fields once: `name: Type = default` or, without a default, `name: Type`.
macro_rules! settings {
    (@type $type:ty, $default:expr) => { $type };
    (@type $type:ty) => { Option<$type> };
    (@resolve $value:expr, $default:expr) => { $value.unwrap_or_else(|| $default) };
    (@resolve $value:expr) => { $value };
    (
        $layer:ident => $settings:ident $(, aliases: $aliases:path)?;
        $($(#[$meta:meta])* $field:ident: $type:ty $(= $default:expr)?,)*
    ) => {
        #[derive(clap::Args, serde::Deserialize, Clone, Debug, Default)]
        #[serde(deny_unknown_fields, default)]
        pub(crate) struct $layer {
            $($(#[$meta])* #[arg(long)] pub(crate) $field: Option<$type>,)*
        }

        #[derive(Clone, Debug)]
        pub(crate) struct $settings {
            $(pub(crate) $field: settings!(@type $type $(, $default)?),)*
        }

        impl Layer for $layer {
            type Settings = $settings;

            fn or(self, lower: Self) -> Self {
                Self { $($field: self.$field.or(lower.$field),)* }
            }

            fn resolve(self) -> $settings {
                $settings { $($field: settings!(@resolve self.$field $(, $default)?),)* }
            }

            fn defaults() -> Vec<(&'static str, String)> {
                vec![$($((stringify!($field), <$type>::to_string(&$default)),)?)*]
            }

            $(fn from_aliases(variable: aliases::Variables<'_>) -> Result<Self, CliError> {
                $aliases(variable)
            })?
        }
    };
}
use settings;

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field of a role has its row in the operator's manual, with its default.
    fn check_manual<L: Layer + clap::Args>(heading: &str) {
        let manual = include_str!("../../../docs/operations.md");
        let (_, section) = manual.split_once(heading).unwrap();
        let section = section.split("\n##").next().unwrap_or_default();
        let command = with_environment::<L>(L::augment_args(clap::Command::new("role")));
        let defaults = L::defaults();
        for field in command.get_arguments().map(|argument| argument.get_id().to_string()) {
            let default = defaults.iter().find(|(name, _)| *name == field).map(|(_, default)| default.as_str());
            let row = section.lines().find(|line| line.starts_with(&format!("| `{field}` |")));
            let row = row.unwrap_or_else(|| panic!("{heading} has no row for `{field}`"));
            let expected = default.map_or("| — |".to_owned(), |default| format!("| `{default}` |"));
            assert!(row.contains(&expected), "{row} does not say {expected}");
        }
        let rows = section.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(rows, command.get_arguments().count(), "{heading} has rows for fields that are gone");
    }

    #[test]
    fn the_manual_lists_every_field_and_its_default() {
        check_manual::<SchedulerLayer>("### Scheduler\n");
        check_manual::<AttentionLayer>("### Attention\n");
        check_manual::<FfnLayer>("### FFN\n");
        check_manual::<DeploymentLayer>("### A whole deployment (`up`)\n");
    }
}
