//! The routes, and what every request meets on its way: the key, the bounds, the counters.

use super::answer::answer;
use super::api::answer::Heading;
use super::api::error::ApiError;
use super::api::request::Kind;
use super::metrics::{Ending, Metrics};
use crate::carried::Model;
use crate::client::Client;
use crate::settings::Secret;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use stepmesh_model::{ModelConfig, Text};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The largest body that is read.
const LARGEST_BODY: usize = 1 << 20;

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
    pub(super) fn new(
        client: Client,
        model: Model,
        name: String,
        key: Option<Secret>,
        max_requests: NonZeroUsize,
    ) -> Self {
        Self(Arc::new(Inner {
            client,
            model,
            name,
            key: key.map(|key| Sha256::digest(key.reveal()).into()),
            metrics: Metrics::new(),
            permits: Arc::new(Semaphore::new(max_requests.get())),
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

    pub(super) fn name(&self) -> &str {
        &self.0.name
    }

    pub(super) fn config(&self) -> &ModelConfig {
        &self.0.model.config
    }

    /// A place among the requests that are worked on at the same time, if one is free.
    pub(super) fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.0.permits.clone().try_acquire_owned().ok()
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    pub(super) fn router(&self) -> Router {
        let api = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/models/{id}", get(model))
            .route(
                "/v1/completions",
                post(async |app, headers, body| answer(app, Kind::Completion, headers, body).await),
            )
            .route(
                "/v1/chat/completions",
                post(async |app, headers, body| answer(app, Kind::Chat, headers, body).await),
            )
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

    pub(super) fn heading(&self, kind: Kind) -> Heading {
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

pub(super) fn too_large() -> ApiError {
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
