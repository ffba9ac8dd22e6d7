//! Which address is answered by what, and what every request passes on its way.

use super::app::App;
use super::error::ApiError;
use super::{completions, lora, page, patches, reply};
use axum::Router;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) fn router(app: Arc<App>) -> Router {
    let keyed = Router::new()
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/completions", post(completions::completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/v1/patches", get(patches::list).post(patches::apply))
        .route("/v1/patches/{id}", delete(patches::revoke))
        .route("/lora-adapters", get(lora::list).post(lora::set))
        .route("/metrics", get(metrics))
        .route("/report", get(page::report))
        .route_layer(from_fn_with_state(app.clone(), with_key));
    Router::new()
        .merge(keyed)
        .route("/", get(page::page))
        .route("/page/{name}", get(page::part))
        .route("/health", get(health))
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "no such address"))
        .method_not_allowed_fallback(async |method: Method| {
            let message = format!("{method} is not taken here");
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
        })
        .layer(from_fn_with_state(app.clone(), watched))
        .with_state(app)
}

/// Around everything: where a request comes from, and its count.
async fn watched(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>();
    let route = path.map_or("other", MatchedPath::as_str).to_owned();
    let response = match app.check_origin(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(e) => e.into_response(),
    };
    let status = response.status();
    let labels = [route.as_str(), status.as_str()];
    app.metrics.requests.with_label_values(&labels).inc();
    response
}

async fn with_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    app.options.keys.may_use(request.headers())?;
    Ok(next.run(request).await)
}

/// Whether requests are answered: not while the store is broken.
async fn health(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    app.blocking(|app| {
        app.follow()?;
        match app.is_ending.load(std::sync::atomic::Ordering::Relaxed) {
            true => Err(ApiError::ending()),
            false => Ok(reply::json(&json!({"status": "ok"}))),
        }
    })
    .await
}

fn about(app: &App) -> Value {
    json!({
        "id": &*app.model,
        "object": "model",
        "created": app.started,
        "owned_by": "nepenthe",
        "sha256": app.model_digest,
        "n_ctx": app.runtime.options().n_ctx,
        "n_vocab": app.runtime.model().n_vocab(),
    })
}

async fn models(State(app): State<Arc<App>>) -> Response {
    reply::json(&json!({"object": "list", "data": [about(&app)]}))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    if id != *app.model {
        let message = format!("the model here is {}, not {id}", app.model);
        return Err(ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found"));
    }
    Ok(reply::json(&about(&app)))
}

async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let n = app.runtime.active().patches().len();
    app.metrics.patches.set(n as i64);
    app.metrics.render()
}
