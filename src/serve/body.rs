//! Reading what clients send, no more of it than is allowed and no longer.

use super::error::ApiError;
use axum::body::Body;
use axum::http::StatusCode;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Bounds of one body.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most bytes.
    pub bytes: u64,
    /// Time for the first bytes; what has come buys more, a second for [`SLOWEST`] bytes.
    pub patience: Duration,
}

/// Bytes a second below which a sender is given up.
const SLOWEST: u64 = 16 << 10;

/// Hand `body` to `sink`, piece by piece.
pub(super) async fn read(
    mut body: Body,
    limits: Limits,
    mut sink: impl FnMut(&[u8]) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    let begun = Instant::now();
    let mut n_bytes = 0u64;
    loop {
        let earned = Duration::from_secs(n_bytes / SLOWEST);
        let frame = timeout_at(begun + limits.patience + earned, body.frame()).await;
        let frame = frame.map_err(|_| {
            let message = "the request's body did not come in time";
            ApiError::new(StatusCode::REQUEST_TIMEOUT, message)
        })?;
        let Some(frame) = frame else { return Ok(()) };
        let frame = frame.map_err(|e| ApiError::bad(format!("the body ended early: {e}")))?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        n_bytes += data.len() as u64;
        if n_bytes > limits.bytes {
            let message = format!(
                "wanted a body of at most {} bytes, found more",
                limits.bytes
            );
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).code("too_large"));
        }
        sink(data)?;
    }
}

/// A body that is a JSON object; fields that are null are left out, as if they were not there.
pub(super) async fn object(body: Body, limits: Limits) -> Result<Value, ApiError> {
    let value = json(body, limits).await?;
    let Value::Object(mut fields) = value else {
        return Err(ApiError::bad("wanted a JSON object"));
    };
    fields.retain(|_, v| !v.is_null());
    Ok(Value::Object(fields))
}

/// A body that is JSON.
pub(super) async fn json(body: Body, limits: Limits) -> Result<Value, ApiError> {
    let mut bytes = Vec::new();
    read(body, limits, |data| {
        bytes.extend_from_slice(data);
        Ok(())
    })
    .await?;
    serde_json::from_slice(&bytes)
        .map_err(|e| ApiError::bad(format!("the body is not JSON: {e}")).code("invalid_json"))
}

/// `value` as what it should be; the error names the field at fault.
pub(super) fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|e| {
        let path = e.path().to_string();
        let message = e.into_inner().to_string();
        match path.as_str() {
            "." => ApiError::bad(message),
            _ => ApiError::bad(format!("{path}: {message}")).param(path),
        }
    })
}

/// The fields of an object.
pub(super) fn fields(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}
