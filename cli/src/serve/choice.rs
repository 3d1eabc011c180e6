//! One choice of an answer: a sequence that the deployment decodes, its tokens as text, and its end.

use super::api::error::ApiError;
use super::app::App;
use super::stop::StopFilter;
use std::time::Instant;
use stepmesh_mesh::control::Generation;
use stepmesh_model::Detokenizer;
use stepmesh_proto::control::finished::Reason;
use stepmesh_proto::control::{GenerateRequest, generate_event::Body};

/// A choice that grows. Dropped before its end, it cancels its sequence.
pub(super) struct Choice {
    app: App,
    events: Generation,
    stream: Detokenizer,
    stop: StopFilter,
    /// Tokens generated.
    pub(super) tokens: usize,
    last: Instant,
    over: bool,
}

/// What a choice has to say.
pub(super) enum News {
    /// More text; not empty.
    Text(String),
    /// The last text, which may be empty, and why it is the last.
    End(String, &'static str),
}

impl Choice {
    pub(super) async fn start(app: &App, request: GenerateRequest, stop: Vec<String>) -> Result<Self, ApiError> {
        let prompt = request.prompt.len() as u64;
        let events = app.client().start(request).await?;
        app.metrics().prompt_tokens.inc_by(prompt);
        app.metrics().running.inc();
        Ok(Self {
            app: app.clone(),
            events,
            stream: Detokenizer::default(),
            stop: StopFilter::new(stop),
            tokens: 0,
            last: Instant::now(),
            over: false,
        })
    }

    /// The next news. Dropping the future loses nothing. Not to be called after the end or an error.
    pub(super) async fn next(&mut self) -> Result<News, ApiError> {
        loop {
            let event = self.events.next().await?;
            let piece = match event {
                Some(Body::Token(token)) => self.take(token.token)?,
                Some(Body::Finished(finished)) => {
                    self.over = true;
                    let rest = match self.app.text() {
                        Some(text) => self.stream.finish(text).map_err(internal)?,
                        None => String::new(),
                    };
                    let (mut text, stopped) = self.stop.push(&rest);
                    text.push_str(&self.stop.finish());
                    let at_end = stopped || finished.reason() == Reason::Eos;
                    return Ok(News::End(text, if at_end { "stop" } else { "length" }));
                }
                Some(Body::Failed(failed)) => return Err(failed.into()),
                Some(Body::Scores(_)) => continue,
                None => return Err(internal("the sequence ended without a word")),
            };
            let (text, stopped) = self.stop.push(&piece);
            if stopped {
                self.over = true;
                return Ok(News::End(text, "stop"));
            }
            if !text.is_empty() {
                return Ok(News::Text(text));
            }
        }
    }

    fn take(&mut self, token: u32) -> Result<String, ApiError> {
        let metrics = self.app.metrics();
        let elapsed = std::mem::replace(&mut self.last, Instant::now()).elapsed().as_secs_f64();
        if self.tokens == 0 { &metrics.first_token } else { &metrics.token }.observe(elapsed);
        metrics.generated_tokens.inc();
        self.tokens += 1;
        match self.app.text() {
            Some(text) => self.stream.push(text, token).map_err(internal),
            // Without a tokenizer ids are all there is to say.
            None if self.tokens == 1 => Ok(token.to_string()),
            None => Ok(format!(" {token}")),
        }
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        self.app.metrics().running.dec();
        if !self.over {
            self.app.metrics().cancelled.inc();
        }
    }
}

fn internal(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}
