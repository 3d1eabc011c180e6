//! The answer to a request for text: its choices are decoded at the same time, and sent whole or piece by piece.

use super::api::answer::{Heading, Usage};
use super::api::error::ApiError;
use super::api::request::{Ask, Kind};
use super::app::{App, too_large};
use super::choice::{Choice, News};
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::convert::Infallible;
use std::time::Duration;
use stepmesh_proto::control::{GenerateRequest, Sampling};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

/// What may wait in each of a stream's queues for its reader, and how long one that does not read is waited for.
const FRAMES: usize = 64;
const READ_PATIENCE: Duration = Duration::from_secs(30);

/// Answers a request for a completion or a chat.
pub(super) async fn answer(
    State(app): State<App>,
    kind: Kind,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body = body.map_err(|refused| match refused.status() {
        StatusCode::PAYLOAD_TOO_LARGE => too_large(),
        _ => ApiError::bad(refused.body_text()),
    })?;
    let json = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if json.is_some_and(|kind| !kind.starts_with("application/json")) {
        let message = "the body's content type is not application/json";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let config = app.config();
    let ask = Ask::read(kind, &body, app.name(), app.text(), config.vocab_size)?;
    let mut requests = Vec::with_capacity(ask.prompts.len() * ask.n);
    for prompt in &ask.prompts {
        let max_new_tokens = ask.room(prompt, config.context_length)?;
        for _ in 0..ask.n {
            let seed = ask.sampling.seed.wrapping_add(requests.len() as u64);
            requests.push(GenerateRequest {
                prompt: prompt.clone(),
                max_new_tokens,
                ignore_eos: ask.ignore_eos,
                sampling: Some(Sampling { seed, ..ask.sampling }),
                ..GenerateRequest::default()
            });
        }
    }
    let permit = app.permit().ok_or_else(|| {
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "as many requests are worked on as this server takes; try again")
    })?;
    let usage = Usage { prompt: ask.prompts.iter().map(Vec::len).sum(), completion: 0 };
    let mut choices = Vec::with_capacity(requests.len());
    for request in requests {
        choices.push(Choice::start(&app, request, ask.stop.clone()).await?);
    }
    let heading = app.heading(kind);
    if ask.stream {
        return Ok(stream(heading, ask, choices, usage, permit));
    }
    whole(heading, &ask, choices, usage).await
}

/// Waits for all choices.
async fn whole(heading: Heading, ask: &Ask, choices: Vec<Choice>, mut usage: Usage) -> Result<Response, ApiError> {
    let mut ended = vec![(String::new(), ""); choices.len()];
    let mut growing = JoinSet::new();
    for (index, mut choice) in choices.into_iter().enumerate() {
        growing.spawn(async move {
            let mut all = String::new();
            loop {
                match choice.next().await? {
                    News::Text(text) => all.push_str(&text),
                    News::End(text, reason) => return Ok::<_, ApiError>((index, all + &text, reason, choice.tokens)),
                }
            }
        });
    }
    while let Some(done) = growing.join_next().await {
        let done = done.map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        let (index, text, reason, tokens) = done?;
        let before = ask.echo.as_ref().and_then(|echo| echo.get(index / ask.n)).map_or("", String::as_str);
        ended[index] = (format!("{before}{text}"), reason);
        usage.completion += tokens;
    }
    Ok(axum::Json(heading.whole(&ended, usage)).into_response())
}

/// Sends pieces as they come. A client that goes away, or does not read, ends the choices.
fn stream(
    heading: Heading,
    ask: Ask,
    choices: Vec<Choice>,
    mut usage: Usage,
    permit: OwnedSemaphorePermit,
) -> Response {
    let (frames, reader) = mpsc::channel::<Result<Bytes, Infallible>>(FRAMES);
    tokio::spawn(async move {
        let _permit = permit;
        let (news, mut heard) = mpsc::channel(FRAMES);
        let mut growing = JoinSet::new();
        for (index, mut choice) in choices.into_iter().enumerate() {
            let news = news.clone();
            growing.spawn(async move {
                loop {
                    let next = choice.next().await;
                    let over = !matches!(next, Ok(News::Text(_)));
                    if news.send((index, next, choice.tokens)).await.is_err() || over {
                        return;
                    }
                }
            });
        }
        drop(news);
        let frame = |value: &Value| Ok(Bytes::from(format!("data: {value}\n\n")));
        let send = async |value: Value| {
            let sent = tokio::time::timeout(READ_PATIENCE, frames.send(frame(&value))).await;
            matches!(sent, Ok(Ok(())))
        };
        let mut begun = vec![false; growing.len()];
        loop {
            let next = tokio::select! {
                next = heard.recv() => next,
                () = frames.closed() => return,
            };
            let Some((index, next, tokens)) = next else { break };
            let (mut text, reason) = match next {
                Ok(News::Text(text)) => (text, None),
                Ok(News::End(text, reason)) => (text, Some(reason)),
                Err(error) => {
                    send(error.body()).await;
                    break;
                }
            };
            let first = !std::mem::replace(&mut begun[index], true);
            if let (true, Some(echo)) = (first, ask.echo.as_ref().and_then(|echo| echo.get(index / ask.n))) {
                text.insert_str(0, echo);
            }
            if (first || !text.is_empty()) && !send(heading.piece(index, &text, first)).await {
                return;
            }
            if let Some(reason) = reason {
                usage.completion += tokens;
                if !send(heading.end(index, reason)).await {
                    return;
                }
            }
        }
        if ask.stream_usage {
            send(heading.usage(usage)).await;
        }
        let _ = tokio::time::timeout(READ_PATIENCE, frames.send(Ok(Bytes::from_static(b"data: [DONE]\n\n")))).await;
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    (headers, Body::from_stream(ReceiverStream::new(reader))).into_response()
}
