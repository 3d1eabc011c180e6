//! Conversations as text: the checkpoint's chat template, in Jinja as HuggingFace's tokenizers have it.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};

use super::wrong;
use crate::ModelError;

/// Instructions that a template may take; a real one needs a few for each message.
const FUEL: u64 = 1_000_000;
const NAME: &str = "chat";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template in the text of a `tokenizer_config.json`, if it has one; of several, the one called `default`.
    pub(super) fn from_settings(settings: &str, file: &str) -> Result<Option<Self>, ModelError> {
        let values: serde_json::Value = serde_json::from_str(settings).map_err(|error| wrong(file, error))?;
        let template = match &values["chat_template"] {
            serde_json::Value::Null => return Ok(None),
            serde_json::Value::String(template) => Some(template.as_str()),
            serde_json::Value::Array(named) => {
                named.iter().find(|named| named["name"] == "default").and_then(|named| named["template"].as_str())
            }
            _ => None,
        };
        let template = template.ok_or_else(|| wrong(file, "`chat_template` is neither a string nor a list of them"))?;
        Self::new(template.to_owned(), Some(settings), file).map(Some)
    }

    /// A template, and the names of the special tokens that `settings` gives.
    pub(super) fn new(template: String, settings: Option<&str>, file: &str) -> Result<Self, ModelError> {
        let values: serde_json::Value = match settings {
            Some(settings) => serde_json::from_str(settings).map_err(|error| wrong(file, error))?,
            None => serde_json::Value::Null,
        };
        let token = |name: &str| {
            let value = &values[name];
            value.as_str().or(value["content"].as_str()).unwrap_or_default().to_owned()
        };
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| wrong(file, error))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, template).map_err(|error| wrong(file, error))?;
        Ok(Self { environment, bos: token("bos_token"), eos: token("eos_token") })
    }

    /// The conversation as text, with the opening of the assistant's answer.
    pub(super) fn render(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        let message = |said: &ChatMessage| context! { role => said.role.as_str(), content => said.content.as_str() };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let values = context! {
            messages, add_generation_prompt => true, bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let template = self.environment.get_template(NAME);
        template
            .and_then(|template| template.render(values))
            .map_err(|error| ModelError::ChatTemplate { reason: error.to_string() })
    }
}
