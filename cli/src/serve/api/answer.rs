//! Answers in OpenAI's shapes, whole and in pieces.

use super::request::Kind;
use serde_json::{Value, json};

/// What all answers to one request say of it.
#[derive(Clone, Debug)]
pub(crate) struct Heading {
    pub(crate) id: String,
    pub(crate) kind: Kind,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
}

/// Tokens that were read and generated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) completion: usize,
}

impl Usage {
    fn json(self) -> Value {
        json!({"prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion})
    }
}

impl Heading {
    /// The whole answer: each choice's text and why it ended.
    pub(crate) fn whole(&self, choices: &[(String, &'static str)], usage: Usage) -> Value {
        let choice = |(index, (text, reason)): (usize, &(String, &'static str))| match self.kind {
            Kind::Completion => json!({"index": index, "text": text, "logprobs": null, "finish_reason": reason}),
            Kind::Chat => json!({"index": index, "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": null, "finish_reason": reason}),
        };
        let choices: Vec<Value> = choices.iter().enumerate().map(choice).collect();
        self.with(json!({"choices": choices, "usage": usage.json()}), false)
    }

    /// A piece of a choice's text. The first one of a chat's choice carries the role.
    pub(crate) fn piece(&self, index: usize, text: &str, first: bool) -> Value {
        let choice = match self.kind {
            Kind::Completion => json!({"index": index, "text": text, "logprobs": null, "finish_reason": null}),
            Kind::Chat => {
                let delta =
                    if first { json!({"role": "assistant", "content": text}) } else { json!({"content": text}) };
                json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null})
            }
        };
        self.with(json!({"choices": [choice]}), true)
    }

    /// The end of a choice.
    pub(crate) fn end(&self, index: usize, reason: &str) -> Value {
        let choice = match self.kind {
            Kind::Completion => json!({"index": index, "text": "", "logprobs": null, "finish_reason": reason}),
            Kind::Chat => json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": reason}),
        };
        self.with(json!({"choices": [choice]}), true)
    }

    /// The last frame of a stream whose client wants to know.
    pub(crate) fn usage(&self, usage: Usage) -> Value {
        self.with(json!({"choices": [], "usage": usage.json()}), true)
    }

    fn with(&self, mut body: Value, streams: bool) -> Value {
        let object = match (self.kind, streams) {
            (Kind::Completion, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
        };
        body["id"] = json!(self.id);
        body["object"] = json!(object);
        body["created"] = json!(self.created);
        body["model"] = json!(self.model);
        body
    }
}
