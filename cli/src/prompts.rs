//! Prompts as token ids, and what is refused before anything is started.

use crate::carried::Model;
use crate::decode::Request;
use crate::error::CliError;
use std::str::FromStr;
use stepmesh_model::{ModelConfig, Sampler, SamplingOptions};
use stepmesh_proto::control::Sampling;

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
    token_ids: Vec<TokenIds>,
    /// Most tokens to add to each prompt [default: 32 to token ids, 200 to text]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: Option<u32>,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    /// Draw tokens: above 1 levels their probabilities, below 1 sharpens them; 0 takes the likeliest [default: 0]
    #[arg(long, value_name = "T", default_value_t = 0.0, hide_default_value = true, allow_hyphen_values = true)]
    temperature: f32,
    /// Draw from so many of the likeliest tokens only; 0 is all [default: 0]
    #[arg(long, value_name = "K", default_value_t = 0, hide_default_value = true)]
    top_k: u32,
    /// Draw from the likeliest tokens that together have this probability only [default: 1]
    #[arg(long, value_name = "P", default_value_t = 1.0, hide_default_value = true, allow_hyphen_values = true)]
    top_p: f32,
    /// Alike seeds draw alike tokens [default: 0]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    seed: u64,
}

/// One thing to continue.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    /// As it was given, if it was text.
    pub(crate) text: Option<String>,
    pub(crate) tokens: Vec<u32>,
}

impl PromptArguments {
    /// The prompts, those of a run that names none included.
    pub(crate) fn resolve(&self, model: &Model) -> Result<Vec<Prompt>, CliError> {
        if !self.token_ids.is_empty() {
            let of_ids = |ids: &TokenIds| Prompt { text: None, tokens: ids.0.clone() };
            return Ok(self.token_ids.iter().map(of_ids).collect());
        }
        if self.prompt.is_empty() && model.text.is_none() {
            return Ok(default_ids().into_iter().map(|tokens| Prompt { text: None, tokens }).collect());
        }
        let text = model.text()?;
        let given: Vec<&str> = match self.prompt.as_slice() {
            [] => DEFAULT_TEXTS.to_vec(),
            given => given.iter().map(String::as_str).collect(),
        };
        let prompt = |given: &&str| {
            if given.trim().is_empty() {
                return Err(CliError::plain_input("--prompt is empty: there is nothing to continue"));
            }
            let tokens = text.encode(given).map_err(|error| CliError::plain_input(error.to_string()))?;
            Ok(Prompt { text: Some((*given).to_owned()), tokens })
        };
        given.iter().map(prompt).collect()
    }

    /// Whether nothing was given to continue.
    pub(crate) fn is_empty(&self) -> bool {
        self.prompt.is_empty() && self.token_ids.is_empty()
    }

    /// What is asked for each prompt. Where they are token ids, sequences go on after an end-of-sequence token.
    pub(crate) fn requests(&self, prompts: &[Prompt], logits: bool) -> Result<Vec<Request>, CliError> {
        let options =
            SamplingOptions { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed };
        Sampler::new(options).map_err(|error| CliError::plain_input(format!("--{}", hyphened(&error.to_string()))))?;
        let sampling = Sampling {
            temperature: options.temperature,
            top_k: options.top_k,
            top_p: options.top_p,
            seed: options.seed,
        };
        let request = |prompt: &Prompt| Request {
            prompt: prompt.tokens.clone(),
            max_new_tokens: self.max_new_tokens.unwrap_or(if prompt.text.is_some() { 200 } else { 32 }),
            ignore_eos: self.ignore_eos || prompt.text.is_none(),
            logits,
            sampling: (self.temperature > 0.0).then_some(sampling),
        };
        Ok(prompts.iter().map(request).collect())
    }
}

/// An option's name as a flag has it, at the beginning of a message.
fn hyphened(message: &str) -> String {
    message.split_once(' ').map_or(message.into(), |(name, rest)| format!("{} {rest}", name.replace('_', "-")))
}

/// Beginnings that the carried model continues when none is given.
const DEFAULT_TEXTS: [&str; 4] = [
    "Once there was a girl named Anna who lived by the lighthouse.",
    "Tom is a boy who lives near the harbor. Tom finds a golden key near the",
    "In a house by the river lives a woman named Grace.",
    "There is a man by the village whose name is Oscar. Oscar has a friend named Nora who is a",
];

/// Short, repetitive, minimal and long prompts, for a model without a tokenizer.
fn default_ids() -> Vec<Vec<u32>> {
    let long = std::iter::once(0).chain(100..140).collect();
    vec![vec![0, 5, 17, 300, 42], long, vec![0, 511, 7, 7, 7, 7, 7, 7, 7, 9, 3], vec![0]]
}

/// Whether the model can take the prompts.
pub(crate) fn check(requests: &[Request], model: &ModelConfig) -> Result<(), CliError> {
    for (index, Request { prompt, max_new_tokens, .. }) in requests.iter().enumerate() {
        if let Some(id) = prompt.iter().find(|id| **id as usize >= model.vocab_size) {
            return Err(CliError::plain_input(format!(
                "prompt {index}: token id {id} is outside the model's vocabulary of {} (ids 0 to {})",
                model.vocab_size,
                model.vocab_size - 1
            )));
        }
        let needed = prompt.len() as u64 + u64::from(*max_new_tokens);
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

    fn requests(prompts: &[Vec<u32>], max_new_tokens: u32) -> Vec<Request> {
        let request = |prompt: &Vec<u32>| Request {
            prompt: prompt.clone(),
            max_new_tokens,
            ignore_eos: true,
            logits: false,
            sampling: None,
        };
        prompts.iter().map(request).collect()
    }

    #[test]
    fn the_last_token_that_fits_is_taken_and_the_next_refused() {
        let model = &Model::open(None).unwrap().config;
        let (vocabulary, context) = (model.vocab_size as u32, model.context_length);
        check(&requests(&[vec![vocabulary - 1; context - 24]], 24), model).unwrap();
        let long = check(&requests(&[vec![0], vec![0; context - 24]], 25), model).unwrap_err();
        assert!(long.to_string().starts_with("prompt 1: ") && long.to_string().contains("context"), "{long}");
        let outside = check(&requests(&[vec![3, vocabulary]], 1), model).unwrap_err();
        assert!(outside.to_string().contains(&format!("token id {vocabulary} is outside")), "{outside}");
        assert_eq!((long.code(), outside.code()), (2, 2));
    }

    fn parse(arguments: &[&str]) -> PromptArguments {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            prompts: PromptArguments,
        }
        <Command as clap::Parser>::parse_from([&["x"], arguments].concat()).prompts
    }

    #[test]
    fn a_run_that_names_no_prompt_has_some_that_its_model_can_take() {
        let model = Model::open(None).unwrap();
        let arguments = parse(&[]);
        let prompts = arguments.resolve(&model).unwrap();
        assert!(prompts.len() == 4 && prompts.iter().all(|prompt| prompt.text.is_some()));
        check(&arguments.requests(&prompts, false).unwrap(), &model.config).unwrap();
        let without = Model { text: None, ..model };
        assert!(arguments.resolve(&without).unwrap().iter().all(|prompt| prompt.text.is_none()));
        let error = parse(&["--prompt", "Once"]).resolve(&without).unwrap_err();
        assert!(error.to_string().contains("no tokenizer.json in step3-story"), "{error}");
    }

    #[test]
    fn sampling_that_makes_no_sense_is_refused_by_its_flag() {
        for (flag, value) in [("--temperature", "-1"), ("--top-p", "1.5")] {
            let error = parse(&[flag, value]).requests(&[], false).unwrap_err();
            assert!(error.to_string().starts_with(&format!("{flag} is {value}")), "{error}");
        }
    }
}
