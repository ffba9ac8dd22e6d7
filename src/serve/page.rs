//! `/`: the place of the web page.

use super::error::ApiError;
use axum::http::StatusCode;

pub(super) async fn page() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is no page here")
}
