//! `/`: a page to chat with the model, see its patches, and compare answers with and without them;
//! `/report`: the evidence report that the operator gave.
//!
//! The page is a few files inside the program. Its policy lets it load and run nothing but these,
//! and talk to nobody but this server. The report is shown as it was made, in a sandbox: it runs
//! nothing, and the page may only add its one style sheet, named by its hash, because a report
//! that was fetched with a key is shown under the page's own policy.

use super::app::App;
use super::error::ApiError;
use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;

/// Of the report: as its own `<meta>` says, and no script, form or window whatever is in the file.
const REPORT_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
                             form-action 'none'; frame-ancestors 'self'; sandbox";

/// The evidence report, and the page's policy with its style sheets let in.
pub(super) struct Report {
    html: Option<String>,
    policy: String,
}

impl Report {
    /// Of the file at `path`, read once.
    ///
    /// # Errors
    /// A file that cannot be read as text.
    pub(super) fn read(path: Option<&Path>) -> Result<Self, crate::error::Error> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| crate::error::Error::Io {
                path: path.to_owned(),
                doing: "reading",
                source,
            })
        };
        let html = path.map(read).transpose()?;
        let styles = html.as_deref().map(hashes).unwrap_or_default();
        let policy = format!(
            "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self'; \
             connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        Ok(Self { html, policy })
    }
}

/// Source expressions of the style sheets in `html`.
fn hashes(html: &str) -> String {
    let sheets = html.split("<style>").skip(1);
    let sheets = sheets.filter_map(|rest| Some(rest.split_once("</style>")?.0));
    sheets
        .map(|sheet| {
            format!(
                " 'sha256-{}'",
                BASE64_STANDARD.encode(Sha256::digest(sheet))
            )
        })
        .collect()
}

pub(super) async fn page(State(app): State<Arc<App>>) -> Response {
    let body = include_str!("page/index.html");
    file("text/html; charset=utf-8", body, &app.report.policy)
}

/// What the page is made of.
pub(super) async fn part(
    State(app): State<Arc<App>>,
    UrlPath(name): UrlPath<String>,
) -> Result<Response, ApiError> {
    const SCRIPT: &str = "text/javascript; charset=utf-8";
    let (kind, body) = match name.as_str() {
        "app.js" => (SCRIPT, include_str!("page/app.js")),
        "server.js" => (SCRIPT, include_str!("page/server.js")),
        "style.css" => ("text/css; charset=utf-8", include_str!("page/style.css")),
        "icon.svg" => ("image/svg+xml", include_str!("page/icon.svg")),
        _ => return Err(ApiError::new(StatusCode::NOT_FOUND, "no such address")),
    };
    Ok(file(kind, body, &app.report.policy))
}

pub(super) async fn report(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let html = app.report.html.clone().ok_or_else(|| {
        let message = "this server was started without --report";
        ApiError::new(StatusCode::NOT_FOUND, message)
    })?;
    Ok(file("text/html; charset=utf-8", html, REPORT_POLICY))
}

fn file(kind: &'static str, body: impl IntoResponse, policy: &str) -> Response {
    let headers: [(HeaderName, &str); 7] = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, policy),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // Another build may have another page, and a report is nobody else's.
        (CACHE_CONTROL, "no-store"),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
    ];
    (headers, body).into_response()
}
