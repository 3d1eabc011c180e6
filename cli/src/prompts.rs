//! Prompts as token ids, and what is refused before anything is started.

use crate::error::CliError;
use std::path::Path;
use std::str::FromStr;
use stepmesh_model::ModelConfig;

/// Token ids as the command line gives them: `0,5,17`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenIds(pub(crate) Vec<u32>);

impl FromStr for TokenIds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Err("an empty prompt has nothing to continue; give at least one token id".into());
        }
        let id = |text: &str| {
            let text = text.trim();
            text.parse().map_err(|_| format!("`{text}` is not a token id; ids are whole numbers, as in 0,5,17"))
        };
        text.split(',').map(id).collect::<Result<_, _>>().map(Self)
    }
}

/// What is decoded, as commands take it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct PromptArguments {
    /// A prompt as text; needs a checkpoint with a tokenizer.json. May be repeated
    #[arg(long, value_name = "TEXT", conflicts_with = "token_ids")]
    prompt: Vec<String>,
    /// A prompt as token ids; such a run ignores end-of-sequence tokens. May be repeated
    #[arg(long, value_name = "ID,ID,…", value_parser = TokenIds::from_str, allow_hyphen_values = true)]
    pub(crate) token_ids: Vec<TokenIds>,
    /// Tokens to add to each prompt
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_new_tokens: u32,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
}

impl PromptArguments {
    /// Whether sequences go on after an end-of-sequence token: always where the prompts are token ids.
    pub(crate) fn ignores_eos(&self) -> bool {
        self.ignore_eos || self.prompt.is_empty()
    }

    /// Refuses text: by the checkpoint's lack of a tokenizer, or by this build's.
    pub(crate) fn refuse_text(&self, checkpoint: Option<&Path>, name: &str) -> Result<(), CliError> {
        let Some(text) = self.prompt.first() else { return Ok(()) };
        if text.trim().is_empty() {
            return Err(CliError::plain_input("--prompt is empty: there is nothing to continue"));
        }
        let message = match checkpoint {
            Some(directory) if directory.join("tokenizer.json").exists() => {
                format!("--prompt: this build does not read {name}/tokenizer.json yet")
            }
            _ => format!("--prompt needs a tokenizer, but there is no tokenizer.json in {name}"),
        };
        Err(CliError::input(message, "give token ids instead: --token-ids 0,5,17"))
    }
}

/// The prompts of a run that names none: short, repetitive, minimal and long ones.
pub(crate) fn defaults() -> Vec<Vec<u32>> {
    let long = std::iter::once(0).chain(100..140).collect();
    vec![vec![0, 5, 17, 300, 42], long, vec![0, 511, 7, 7, 7, 7, 7, 7, 7, 9, 3], vec![0]]
}

/// Whether the model can take the prompts.
pub(crate) fn check(prompts: &[Vec<u32>], max_new_tokens: u32, model: &ModelConfig) -> Result<(), CliError> {
    for (index, prompt) in prompts.iter().enumerate() {
        if let Some(id) = prompt.iter().find(|id| **id as usize >= model.vocab_size) {
            return Err(CliError::plain_input(format!(
                "prompt {index}: token id {id} is outside the model's vocabulary of {} (ids 0 to {})",
                model.vocab_size,
                model.vocab_size - 1
            )));
        }
        let needed = prompt.len() as u64 + u64::from(max_new_tokens);
        if needed > model.context_length as u64 {
            return Err(CliError::input(
                format!(
                    "prompt {index}: {} tokens and {max_new_tokens} new ones make {needed}, more than the model's \
                     context of {}",
                    prompt.len(),
                    model.context_length
                ),
                "shorten the prompt, or lower --max-new-tokens",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ids_are_numbers_between_commas() {
        assert_eq!("0, 5,17".parse::<TokenIds>().unwrap().0, [0, 5, 17]);
        for (text, named) in
            [("", "empty prompt"), ("1,,2", "``"), ("1,x", "`x`"), ("-1", "`-1`"), ("4294967296", "429")]
        {
            assert!(text.parse::<TokenIds>().unwrap_err().contains(named), "{text}");
        }
    }

    #[test]
    fn the_last_token_that_fits_is_taken_and_the_next_refused() {
        let model = &crate::carried::check(None).unwrap();
        check(&defaults(), 32, model).unwrap();
        check(&[vec![511; 1000]], 24, model).unwrap();
        let long = check(&[vec![0], vec![0; 1000]], 25, model).unwrap_err();
        assert!(long.to_string().starts_with("prompt 1: 1000 tokens and 25 new ones make 1025"), "{long}");
        let outside = check(&[vec![3, 512]], 1, model).unwrap_err();
        assert!(outside.to_string().contains("token id 512 is outside the model's vocabulary of 512"), "{outside}");
        assert_eq!((long.code(), outside.code()), (2, 2));
    }
}
