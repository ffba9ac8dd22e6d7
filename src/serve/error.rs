//! Refusals in the form OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`.

use crate::error::Error;
use crate::patch::PatchError;
use crate::runtime::RuntimeError;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::error::Error as _;
use std::net::SocketAddr;
use thiserror::Error as ThisError;

/// Why the server does not run.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// No threads.
    #[error("cannot start the server's threads")]
    Threads(#[source] std::io::Error),
    /// The engine's thread ended by itself.
    #[error("the engine has ended: see the messages above")]
    Engine,
}

impl ServeError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Bind { .. } | Self::Threads(_) => 6,
            Self::Engine => 8,
        }
    }
}

/// A request that is refused.
#[derive(Debug)]
pub(super) struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// What programs may tell apart.
    pub code: Option<&'static str>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
        }
    }

    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    pub(super) fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The server is about to end, or its engine has.
    pub(super) fn ending() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the server is ending").code("ending")
    }

    /// The names OpenAI gives to kinds of errors.
    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body's `error`.
    pub(super) fn json(&self) -> serde_json::Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, super::reply::json(&self.json())).into_response();
        let extra = match self.status {
            StatusCode::TOO_MANY_REQUESTS => Some((RETRY_AFTER, "1")),
            StatusCode::UNAUTHORIZED => Some((WWW_AUTHENTICATE, "Bearer")),
            _ => None,
        };
        if let Some((name, value)) = extra {
            response
                .headers_mut()
                .insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// What the crate refuses, in HTTP's words.
impl From<Error> for ApiError {
    fn from(e: Error) -> Self {
        let (status, code) = match &e {
            Error::Runtime(RuntimeError::NotActive { .. }) => (StatusCode::NOT_FOUND, "not_active"),
            Error::Runtime(RuntimeError::Stored { .. }) => (StatusCode::CONFLICT, "stored"),
            Error::Runtime(RuntimeError::TooMany { .. }) => (StatusCode::CONFLICT, "too_many"),
            Error::Patch(PatchError::TooLarge { .. }) => {
                (StatusCode::PAYLOAD_TOO_LARGE, "too_large")
            }
            Error::Store(_) => (StatusCode::SERVICE_UNAVAILABLE, "store"),
            Error::Trust(_) => (StatusCode::UNPROCESSABLE_ENTITY, "signature"),
            Error::Proof(_) => (StatusCode::UNPROCESSABLE_ENTITY, "proof"),
            e => match e.exit_code() {
                2 | 3 => (StatusCode::BAD_REQUEST, "invalid"),
                4 => (StatusCode::UNPROCESSABLE_ENTITY, "mismatch"),
                _ => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
            },
        };
        let mut message = e.to_string();
        let mut cause = e.source();
        while let Some(c) = cause {
            message += &format!(": {c}");
            cause = c.source();
        }
        Self::new(status, message).code(code)
    }
}
