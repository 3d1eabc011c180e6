//! Requests for completions, plain and chat, checked before anything is started.

use super::error::ApiError;
use super::fields::Fields;
use serde_json::Value;
use stepmesh_model::{ChatMessage, Text};
use stepmesh_proto::control::Sampling;

/// Choices of one request, over all its prompts.
const MOST_CHOICES: usize = 32;
const MOST_STOPS: usize = 4;
const MOST_MESSAGES: usize = 1024;
/// What `max_tokens` is when a completion does not say.
const DEFAULT_TOKENS: u64 = 16;

/// Either kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Completion,
    Chat,
}

/// What is to be generated.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) kind: Kind,
    /// Token ids of each prompt.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// The prompts as text, to be repeated before the answer.
    pub(crate) echo: Option<Vec<String>>,
    /// Choices for each prompt.
    pub(crate) n: usize,
    /// As much as fits where absent.
    pub(crate) max_tokens: Option<u64>,
    /// What tokens are drawn by; a choice adds its number to the seed.
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    pub(crate) stream: bool,
    pub(crate) stream_usage: bool,
}

impl Ask {
    /// Reads a body. `model` is what clients call the model; without `text` prompts are token ids.
    pub(crate) fn read(
        kind: Kind,
        body: &[u8],
        model: &str,
        text: Option<&Text>,
        vocabulary: usize,
    ) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        if let Some(asked) = fields.text("model")?
            && asked != model
        {
            let message = format!("the model `{asked}` does not exist; this server has `{model}`");
            let error = ApiError::new(axum::http::StatusCode::NOT_FOUND, message);
            return Err(ApiError { param: Some("model".into()), ..error }.code("model_not_found"));
        }
        refuse_unsupported(&fields)?;
        let max_tokens = match fields.integer("max_completion_tokens", 1..=u64::from(u32::MAX))? {
            None => fields.integer("max_tokens", 1..=u64::from(u32::MAX))?,
            some => some,
        };
        let (prompts, given) = match kind {
            Kind::Completion => prompts(&fields, text, vocabulary)?,
            Kind::Chat => (vec![conversation(&fields, text)?], Vec::new()),
        };
        let n = fields.integer("n", 1..=MOST_CHOICES as u64)?.unwrap_or(1) as usize;
        if n * prompts.len() > MOST_CHOICES {
            return Err(ApiError::field("n", format!("times the prompts makes more than {MOST_CHOICES} choices")));
        }
        let options = fields.get("stream_options").and_then(|options| options.get("include_usage"));
        Ok(Self {
            kind,
            n,
            max_tokens: max_tokens.or((kind == Kind::Completion).then_some(DEFAULT_TOKENS)),
            sampling: sampling(&fields)?,
            stop: stops(&fields)?,
            ignore_eos: fields.flag("ignore_eos")?,
            stream: fields.flag("stream")?,
            stream_usage: options.and_then(Value::as_bool).unwrap_or(false),
            echo: (kind == Kind::Completion && fields.flag("echo")?).then_some(given),
            prompts,
        })
    }

    /// Most tokens that a prompt may be followed by, in a model of `context` tokens.
    pub(crate) fn room(&self, prompt: &[u32], context: usize) -> Result<u32, ApiError> {
        let left = context.saturating_sub(prompt.len()) as u64;
        match self.max_tokens {
            None if left > 0 => Ok(left as u32),
            Some(asked) if asked <= left => Ok(asked as u32),
            asked => {
                let wanted = asked.map_or(String::new(), |asked| format!(" and {asked} for the answer"));
                let message = format!(
                    "the model's context is {context} tokens, but there are {} in the prompt{wanted}; shorten either",
                    prompt.len()
                );
                let param = if self.kind == Kind::Chat { "messages" } else { "prompt" };
                Err(ApiError { param: Some(param.into()), ..ApiError::bad(message) }.code("context_length_exceeded"))
            }
        }
    }
}

fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    let empty = |value: &Value| {
        value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(|map| map.is_empty())
    };
    for name in ["tools", "functions", "logit_bias"] {
        fields.refuse(name, empty)?;
    }
    for name in ["frequency_penalty", "presence_penalty"] {
        fields.refuse(name, |value| value.as_f64() == Some(0.0))?;
    }
    fields.refuse("logprobs", |value| value.as_bool() == Some(false))?;
    fields.refuse("top_logprobs", |value| value.as_u64() == Some(0))?;
    fields.refuse("best_of", |value| value.as_u64() == Some(1))?;
    fields.refuse("suffix", |value| value.as_str() == Some(""))?;
    fields.refuse("response_format", |value| value["type"] == "text")
}

fn sampling(fields: &Fields) -> Result<Sampling, ApiError> {
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0) as f32;
    if top_p == 0.0 {
        return Err(ApiError::field("top_p", "is 0; expected a number above 0"));
    }
    let seed = match fields.get("seed") {
        None => {
            let mut bytes = [0; 8];
            getrandom::fill(&mut bytes).map_err(|error| {
                ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, format!("no random numbers: {error}"))
            })?;
            u64::from_le_bytes(bytes)
        }
        // Negative ones too, as some clients draw them from all 64 bits.
        Some(seed) => seed
            .as_u64()
            .or(seed.as_i64().map(|seed| seed as u64))
            .ok_or_else(|| ApiError::field("seed", format!("is {seed}; expected a whole number")))?,
    };
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0) as f32,
        top_k: fields.integer("top_k", 0..=u64::from(u32::MAX))?.unwrap_or(0) as u32,
        top_p,
        seed,
    })
}

fn stops(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let wrong = || ApiError::field("stop", format!("must be a string or up to {MOST_STOPS} of them, none empty"));
    let stops = match fields.get("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) => {
            stops.iter().map(|stop| stop.as_str().map(str::to_owned).ok_or_else(wrong)).collect::<Result<_, _>>()?
        }
        Some(_) => return Err(wrong()),
    };
    if stops.len() > MOST_STOPS || stops.iter().any(String::is_empty) { Err(wrong()) } else { Ok(stops) }
}

/// Prompts as token ids, and as text as far as they were given so.
fn prompts(fields: &Fields, text: Option<&Text>, vocabulary: usize) -> Result<(Vec<Vec<u32>>, Vec<String>), ApiError> {
    let wrong = || ApiError::field("prompt", "must be a string, token ids, or a list of either");
    let encode = |prompt: &str| {
        let text =
            text.ok_or_else(|| ApiError::field("prompt", "is text, but the model has no tokenizer; send token ids"))?;
        text.encode(prompt).map_err(|error| ApiError::field("prompt", format!("cannot be encoded: {error}")))
    };
    let ids = |list: &[Value]| {
        let id = |id: &Value| id.as_u64().filter(|id| (*id as usize) < vocabulary).map(|id| id as u32);
        let ids: Option<Vec<u32>> = list.iter().map(id).collect();
        ids.ok_or_else(|| ApiError::field("prompt", format!("holds what is no token id below {vocabulary}")))
    };
    let decode = |ids: &[u32]| text.and_then(|text| text.decode(ids).ok()).unwrap_or_default();
    let mut tokens = Vec::new();
    let mut texts = Vec::new();
    match fields.get("prompt").ok_or_else(|| ApiError::field("prompt", "is missing"))? {
        Value::String(prompt) => {
            tokens.push(encode(prompt)?);
            texts.push(prompt.clone());
        }
        Value::Array(list) if list.iter().all(Value::is_number) => {
            tokens.push(ids(list)?);
            texts.push(decode(&tokens[0]));
        }
        Value::Array(list) => {
            for prompt in list.iter().take(MOST_CHOICES + 1) {
                match prompt {
                    Value::String(prompt) => {
                        tokens.push(encode(prompt)?);
                        texts.push(prompt.clone());
                    }
                    Value::Array(list) => {
                        tokens.push(ids(list)?);
                        texts.push(decode(&tokens[tokens.len() - 1]));
                    }
                    _ => return Err(wrong()),
                }
            }
        }
        _ => return Err(wrong()),
    }
    match tokens.iter().any(Vec::is_empty) || tokens.is_empty() {
        true => Err(ApiError::field("prompt", "is empty: there is nothing to continue")),
        false => Ok((tokens, texts)),
    }
}

/// A conversation as token ids.
fn conversation(fields: &Fields, text: Option<&Text>) -> Result<Vec<u32>, ApiError> {
    let text = text.ok_or_else(|| ApiError::bad("the model has no tokenizer; use completions with token ids"))?;
    let messages = match fields.get("messages") {
        Some(Value::Array(messages)) if (1..=MOST_MESSAGES).contains(&messages.len()) => messages,
        _ => return Err(ApiError::field("messages", format!("must be a list of 1 to {MOST_MESSAGES} messages"))),
    };
    let message = |(index, message): (usize, &Value)| {
        let param = format!("messages[{index}]");
        let role = match message["role"].as_str() {
            Some("developer") => "system",
            Some(role @ ("system" | "user" | "assistant")) => role,
            _ => return Err(ApiError::field(&format!("{param}.role"), "must be system, developer, user or assistant")),
        };
        let content = content(&message["content"])
            .ok_or_else(|| ApiError::field(&format!("{param}.content"), "must be a string or a list of text parts"))?;
        Ok(ChatMessage { role: role.into(), content })
    };
    let messages: Vec<ChatMessage> = messages.iter().enumerate().map(message).collect::<Result<_, _>>()?;
    text.encode_chat(&messages).map_err(|error| ApiError::field("messages", format!("cannot be encoded: {error}")))
}

fn content(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let part = |part: &Value| part["text"].as_str().filter(|_| part["type"] == "text").map(str::to_owned);
            parts.iter().map(part).collect()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::carried::Model;
    use serde_json::json;

    fn read(kind: Kind, body: Value) -> Result<Ask, ApiError> {
        let model = Model::open(None).unwrap();
        Ask::read(kind, body.to_string().as_bytes(), "story", model.text.as_ref(), model.config.vocab_size)
    }

    #[track_caller]
    fn assert_refused(kind: Kind, body: Value, param: &str) {
        let error = read(kind, body.clone()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{body}: {error:?}");
        assert!(error.message.contains(param.split('[').next().unwrap()), "{error:?}");
    }

    #[test]
    fn what_is_left_open_has_openais_defaults() {
        let ask =
            read(Kind::Completion, json!({"prompt": "Once", "model": "story", "seed": null, "user": "x"})).unwrap();
        assert_eq!((ask.max_tokens, ask.n, ask.stream), (Some(16), 1, false));
        assert_eq!((ask.sampling.temperature, ask.sampling.top_p, ask.sampling.top_k), (1.0, 1.0, 0));
        let chat = read(Kind::Chat, json!({"messages": [{"role": "user", "content": "Hi"}]})).unwrap();
        assert_eq!(chat.max_tokens, None);
        assert_eq!(chat.room(&[0; 500], 512).unwrap(), 12);
    }

    #[test]
    fn prompts_are_text_or_ids_one_or_many() {
        let prompts = |prompt: Value| read(Kind::Completion, json!({"prompt": prompt})).unwrap().prompts;
        assert_eq!(prompts(json!([0, 5, 17])), [[0, 5, 17]]);
        assert_eq!(prompts(json!([[0], [0, 5]])), [vec![0], vec![0, 5]]);
        assert_eq!(prompts(json!(["Anna", "Tom"])).len(), 2);
        assert_eq!(prompts(json!("Anna")), prompts(json!(["Anna"])));
    }

    #[test]
    fn wrong_types_and_values_are_refused_by_field() {
        let with = |name: &str, value: Value| {
            let mut body = json!({"prompt": "Once"});
            body[name] = value;
            body
        };
        for (name, value) in [
            ("prompt", json!(5)),
            ("prompt", json!("")),
            ("prompt", json!([])),
            ("prompt", json!([1.5])),
            ("prompt", json!([-1])),
            ("prompt", json!([1_000_000])),
            ("prompt", json!([true])),
            ("max_tokens", json!(0)),
            ("max_tokens", json!("10")),
            ("max_tokens", json!(1e30)),
            ("temperature", json!(-0.1)),
            ("temperature", json!("hot")),
            ("top_p", json!(0)),
            ("top_p", json!(1.1)),
            ("n", json!(0)),
            ("n", json!(1000)),
            ("stop", json!(["a", 5])),
            ("stop", json!(["a", "b", "c", "d", "e"])),
            ("stop", json!("")),
            ("seed", json!("x")),
            ("stream", json!("yes")),
            ("logprobs", json!(5)),
            ("best_of", json!(3)),
            ("presence_penalty", json!(0.5)),
            ("tools", json!([{"type": "function"}])),
        ] {
            // An empty text has the beginning-of-sequence token, which can be continued.
            if value != json!("") || name == "stop" {
                assert_refused(Kind::Completion, with(name, value), name);
            }
        }
        for (messages, param) in [
            (json!([]), "messages"),
            (json!("hi"), "messages"),
            (json!([{"role": "robot", "content": "hi"}]), "messages[0].role"),
            (json!([{"role": "user", "content": "hi"}, {"role": "user", "content": 5}]), "messages[1].content"),
            (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content"),
        ] {
            assert_refused(Kind::Chat, json!({"messages": messages}), param);
        }
    }

    #[test]
    fn what_is_no_json_or_another_model_is_refused() {
        let model = Model::open(None).unwrap();
        for body in [&b"{"[..], b"[]", b"\xff\xfe", b""] {
            let error = Ask::read(Kind::Chat, body, "story", model.text.as_ref(), 10).unwrap_err();
            assert_eq!(error.status, 400);
        }
        let error = read(Kind::Completion, json!({"prompt": "x", "model": "gpt"})).unwrap_err();
        assert_eq!((error.status.as_u16(), error.code), (404, Some("model_not_found")));
        let error = Ask::read(Kind::Completion, br#"{"prompt": "x"}"#, "story", None, 10).unwrap_err();
        assert!(error.message.contains("no tokenizer"), "{error:?}");
    }

    #[test]
    fn a_prompt_beyond_the_context_is_refused_as_openai_does() {
        let ask = read(Kind::Completion, json!({"prompt": "x", "max_tokens": 13})).unwrap();
        assert_eq!(ask.room(&[0; 499], 512).unwrap(), 13);
        let error = ask.room(&[0; 500], 512).unwrap_err();
        assert_eq!((error.status.as_u16(), error.code), (400, Some("context_length_exceeded")));
        assert!(error.message.contains("512") && error.message.contains("500 in the prompt and 13"), "{error:?}");
    }
}
