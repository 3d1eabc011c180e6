//! The routes, and what every request meets on its way: the key, the bounds, the counters.

use super::api::answer::{Heading, Usage};
use super::api::error::ApiError;
use super::api::request::{Ask, Kind};
use super::choice::{Choice, News};
use super::metrics::{Ending, Metrics};
use crate::carried::Model;
use crate::client::Client;
use crate::settings::Secret;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use stepmesh_model::Text;
use stepmesh_proto::control::{GenerateRequest, Sampling};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

/// The largest body that is read.
const LARGEST_BODY: usize = 1 << 20;
/// Frames of a stream that may wait for their reader, and how long one that does not read is waited for.
const FRAMES: usize = 64;
const READ_PATIENCE: Duration = Duration::from_secs(30);

/// What bounds the server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Requests that are worked on at the same time.
    pub(super) requests: usize,
}

/// The server. Clones share it.
#[derive(Clone)]
pub(super) struct App(Arc<Inner>);

struct Inner {
    client: Client,
    model: Model,
    name: String,
    /// Digest of the key that clients must show.
    key: Option<[u8; 32]>,
    metrics: Metrics,
    permits: Arc<Semaphore>,
    started: u64,
    last_id: AtomicU64,
}

impl App {
    pub(super) fn new(client: Client, model: Model, name: String, key: Option<Secret>, limits: Limits) -> Self {
        Self(Arc::new(Inner {
            client,
            model,
            name,
            key: key.map(|key| Sha256::digest(key.reveal()).into()),
            metrics: Metrics::new(),
            permits: Arc::new(Semaphore::new(limits.requests)),
            started: now(),
            last_id: AtomicU64::new(0),
        }))
    }

    pub(super) fn client(&self) -> &Client {
        &self.0.client
    }

    pub(super) fn text(&self) -> Option<&Text> {
        self.0.model.text.as_ref()
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    pub(super) fn router(&self) -> Router {
        let api = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/models/{id}", get(model))
            .route("/v1/completions", post(completions))
            .route("/v1/chat/completions", post(chat))
            .layer(DefaultBodyLimit::max(LARGEST_BODY))
            .layer(from_fn_with_state(self.clone(), authorise));
        Router::new()
            .merge(api)
            .route("/health", get(health))
            .route("/metrics", get(metrics))
            .fallback(nowhere)
            .method_not_allowed_fallback(another_method)
            .layer(from_fn_with_state(self.clone(), count))
            .with_state(self.clone())
    }

    fn heading(&self, kind: Kind) -> Heading {
        let number = self.0.last_id.fetch_add(1, Ordering::Relaxed);
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        Heading {
            id: format!("{prefix}-{:x}-{number:x}", self.0.started),
            kind,
            created: now(),
            model: self.0.name.clone(),
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

async fn authorise(State(app): State<App>, request: Request, next: Next) -> Response {
    let Some(key) = app.0.key else { return next.run(request).await };
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    // Digests are compared, so that the time it takes says nothing of the key.
    if <[u8; 32]>::from(Sha256::digest(shown)) == key {
        return next.run(request).await;
    }
    ApiError::new(StatusCode::UNAUTHORIZED, "the API key is missing or wrong").code("invalid_api_key").into_response()
}

async fn count(State(app): State<App>, request: Request, next: Next) -> Response {
    let route = match request.uri().path() {
        "/v1/completions" => "/v1/completions",
        "/v1/chat/completions" => "/v1/chat/completions",
        path if path.starts_with("/v1/models") => "/v1/models",
        "/health" => "/health",
        "/metrics" => "/metrics",
        _ => "other",
    };
    let response = next.run(request).await;
    let ending = Ending { route, status: response.status().as_u16() };
    app.metrics().requests.get_or_create(&ending).inc();
    match response.status() {
        // The framework's own refusal has no body of OpenAI's shape.
        StatusCode::PAYLOAD_TOO_LARGE => too_large().into_response(),
        _ => response,
    }
}

fn too_large() -> ApiError {
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is larger than {LARGEST_BODY} bytes"))
}

async fn nowhere(request: Request) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no {} here", request.uri().path())).code("not_found")
}

async fn another_method(request: Request) -> ApiError {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn health(State(app): State<App>) -> Response {
    let error = match app.client().status().await {
        Ok(status) if status.complete => return axum::Json(json!({"status": "ok"})).into_response(),
        Ok(_) => "the deployment is not complete".to_owned(),
        Err(error) => error.to_string(),
    };
    (StatusCode::SERVICE_UNAVAILABLE, axum::Json(json!({"status": "unavailable", "reason": error}))).into_response()
}

async fn metrics(State(app): State<App>) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (kind, app.metrics().text()).into_response()
}

fn card(app: &App) -> Value {
    let (context, created) = (app.0.model.config.context_length, app.0.started);
    json!({"id": app.0.name, "object": "model", "created": created, "owned_by": "stepmesh", "max_model_len": context})
}

async fn models(State(app): State<App>) -> axum::Json<Value> {
    axum::Json(json!({"object": "list", "data": [card(&app)]}))
}

async fn model(State(app): State<App>, Path(id): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    if id == app.0.name {
        return Ok(axum::Json(card(&app)));
    }
    Err(ApiError::new(StatusCode::NOT_FOUND, format!("the model `{id}` does not exist")).code("model_not_found"))
}

async fn completions(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Response {
    answer(app, Kind::Completion, &headers, body).await.into_response()
}

async fn chat(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Response {
    answer(app, Kind::Chat, &headers, body).await.into_response()
}

async fn answer(
    app: App,
    kind: Kind,
    headers: &HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
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
    let config = &app.0.model.config;
    let ask = Ask::read(kind, &body, &app.0.name, app.text(), config.vocab_size)?;
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
    let permit = app.0.permits.clone().try_acquire_owned().map_err(|_| {
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
