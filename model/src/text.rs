//! Text to tokens and back: a checkpoint's `tokenizer.json` and its chat template.

mod chat;
mod stream;

use std::path::Path;

use tokenizers::Tokenizer;

use crate::{ModelConfig, ModelError};
use chat::ChatTemplate;

pub use chat::ChatMessage;
pub use stream::Detokenizer;

const TOKENIZER: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// A checkpoint's way with text.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    bos: Option<u32>,
    vocab_size: usize,
    chat: Option<ChatTemplate>,
}

impl Text {
    /// The tokenizer of the checkpoint in `dir`, with the chat template of `tokenizer_config.json` or
    /// `chat_template.jinja`; `None` where there is no `tokenizer.json`.
    ///
    /// # Errors
    /// Names the file that cannot be read or is not what it should be.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Option<Self>, ModelError> {
        let Some(tokenizer) = read(dir, TOKENIZER)? else { return Ok(None) };
        let settings = read(dir, SETTINGS)?;
        let mut text = Self::from_json(&tokenizer, settings.as_deref(), config)?;
        if let Some(template) = read(dir, TEMPLATE)? {
            text.chat = Some(ChatTemplate::new(template, settings.as_deref(), TEMPLATE)?);
        }
        Ok(Some(text))
    }

    /// A tokenizer that the program carries: the texts of `tokenizer.json` and, with the chat template, of
    /// `tokenizer_config.json`.
    ///
    /// # Errors
    /// Names the file that is not what it should be.
    pub fn from_json(tokenizer: &str, settings: Option<&str>, config: &ModelConfig) -> Result<Self, ModelError> {
        let tokenizer: Tokenizer = tokenizer.parse().map_err(|error: tokenizers::Error| wrong(TOKENIZER, error))?;
        let chat = settings.map(|settings| ChatTemplate::from_settings(settings, SETTINGS)).transpose()?.flatten();
        Ok(Self { tokenizer, bos: config.bos_token_id, vocab_size: config.vocab_size, chat })
    }

    /// The tokens of a text to continue; the model's beginning-of-sequence token comes first where it has one.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the tokenizer fails, or names a token that the model does not have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let mut tokens = self.tokens(text, true)?;
        if let Some(bos) = self.bos
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    /// The tokens of a conversation, up to where the assistant's answer begins.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] if the checkpoint has none, or it refuses these messages.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>, ModelError> {
        let template = self.chat.as_ref().ok_or_else(|| ModelError::ChatTemplate {
            reason: "the checkpoint has none (tokenizer_config.json, `chat_template`); ask for a plain completion"
                .into(),
        })?;
        self.tokens(&template.render(messages)?, false)
    }

    /// Whether conversations can be encoded.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// The text of `tokens`, without special ones. Bytes that are no UTF-8 come as U+FFFD.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] if the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.tokenizer.decode(tokens, true).map_err(|error| wrong(TOKENIZER, error))
    }

    /// Tokens in the tokenizer's vocabulary, added ones included.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    fn tokens(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self.tokenizer.encode(text, add_special_tokens).map_err(|error| wrong(TOKENIZER, error))?;
        let tokens = encoding.get_ids();
        match tokens.iter().find(|token| **token as usize >= self.vocab_size) {
            None => Ok(tokens.to_vec()),
            Some(token) => {
                let reason = format!("it gives token {token}, but the model's vocabulary is {}", self.vocab_size);
                Err(ModelError::Tokenizer { file: TOKENIZER.into(), reason })
            }
        }
    }
}

fn wrong(file: &str, error: impl std::fmt::Display) -> ModelError {
    ModelError::Tokenizer { file: file.into(), reason: error.to_string() }
}

/// The text of a file that may not be there.
fn read(dir: &Path, name: &str) -> Result<Option<String>, ModelError> {
    let path = dir.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelError::Io { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte is a token, its id the byte; then `<s>` (256) and `</s>` (257).
    pub(super) fn byte_tokenizer() -> Text {
        // The byte-level alphabet: printable bytes stand for themselves, others for characters from U+0100.
        let mut others = 256..;
        let vocabulary: serde_json::Map<String, serde_json::Value> = (0..=255u32)
            .map(|byte| {
                let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
                let character = if printable { byte } else { others.next().unwrap() };
                (char::from_u32(character).unwrap().to_string(), byte.into())
            })
            .collect();
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false})
        };
        let byte_level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true});
        let tokenizer = serde_json::json!({"version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(256, "<s>"), special(257, "</s>")], "normalizer": null,
            "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []}});
        let settings = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template":
            "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}\
             {{ raise_exception('no role ' ~ m.role) }}{% endif %}{{ m.role[0] }}:{{ m.content.strip() }}\
             {{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"});
        Text::from_json(&tokenizer.to_string(), Some(&settings.to_string()), &config()).unwrap()
    }

    fn config() -> ModelConfig {
        let tiny = include_str!("../../fixtures/step3-tiny/config.json");
        let mut config = ModelConfig::from_json(tiny, "config.json").unwrap();
        config.bos_token_id = Some(256);
        config
    }

    #[test]
    fn text_comes_back_and_begins_with_the_beginning_of_sequence() {
        let text = byte_tokenizer();
        for sample in ["Anna has a key.", "naïve 🦀 → ü", ""] {
            let tokens = text.encode(sample).unwrap();
            assert_eq!((tokens[0], tokens.len()), (256, sample.len() + 1));
            assert_eq!(text.decode(&tokens).unwrap(), sample);
        }
        assert_eq!(text.encode("<s>x").unwrap(), [256, 120], "not twice");
        assert_eq!(text.vocabulary(), 258);
    }

    #[test]
    fn a_conversation_is_written_as_the_template_says() {
        let text = byte_tokenizer();
        let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
        let tokens = text.encode_chat(&[message("user", " hi "), message("assistant", "yo")]).unwrap();
        let (first, rest) = tokens.split_first().unwrap();
        assert_eq!((*first, rest.iter().filter(|token| **token == 257).count()), (256, 2));
        assert_eq!(text.decode(&tokens).unwrap(), "u:hia:yoa:");
        let error = text.encode_chat(&[message("robot", "hi")]).unwrap_err().to_string();
        assert!(error.contains("no role robot"), "{error}");
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let config = config();
        assert!(Text::open(dir.path(), &config).unwrap().is_none());
        std::fs::write(dir.path().join("tokenizer.json"), "{\"version\": 3}").unwrap();
        let error = Text::open(dir.path(), &config).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        for settings in ["[", "{\"chat_template\": 5}", "{\"chat_template\": \"{% if %}\"}"] {
            let error = ChatTemplate::from_settings(settings, "tokenizer_config.json").unwrap_err().to_string();
            assert!(error.contains("tokenizer_config.json"), "{error}");
        }
        assert!(ChatTemplate::from_settings("{}", "x").unwrap().is_none());
    }

    #[test]
    fn a_template_that_never_ends_is_cut_off() {
        let endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}".to_owned();
        let error = ChatTemplate::new(endless, None, "x").unwrap().render(&[]).unwrap_err().to_string();
        assert!(error.contains("fuel"), "{error}");
    }

    #[test]
    fn a_tokenizer_of_another_model_is_found_out() {
        let mut text = byte_tokenizer();
        text.vocab_size = 100;
        let error = text.encode("z").unwrap_err().to_string();
        assert!(error.contains("token 122") && error.contains("vocabulary is 100"), "{error}");
    }
}
