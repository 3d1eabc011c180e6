//! Refusals in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use stepmesh_mesh::control::ControlError;
use stepmesh_proto::control::{Failed, failed};

/// Why a request is not answered.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// The field that is at fault.
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
}

/// Seconds after which one that was refused for lack of room may come again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// The client's fault.
    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// A field that is not what it should be.
    pub(crate) fn field(param: &str, message: impl std::fmt::Display) -> Self {
        Self { param: Some(param.into()), ..Self::bad(format!("`{param}` {message}")) }
    }

    pub(crate) fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The error as the body of an answer, or as a frame of a stream that has begun.
    pub(crate) fn body(&self) -> serde_json::Value {
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        let status = match &error {
            ControlError::Refused(_) => StatusCode::BAD_REQUEST,
            ControlError::Overloaded(_) => StatusCode::TOO_MANY_REQUESTS,
            ControlError::NotReady(_) | ControlError::Lost(_) | ControlError::Unreachable { .. } => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

impl From<Failed> for ApiError {
    fn from(failed: Failed) -> Self {
        let status = match failed.kind() {
            failed::Kind::Invalid => StatusCode::BAD_REQUEST,
            failed::Kind::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            failed::Kind::PeerLost | failed::Kind::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
            failed::Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, failed.message)
    }
}
