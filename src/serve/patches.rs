//! `/v1/patches`: which apply, and their coming and going.
//!
//! `POST` takes `{"path": ..., "scale": ...}`, a file in one of the directories that the operator
//! allowed (`"name"` is the same), or the patch itself as `application/octet-stream`, with
//! `?name=...&scale=...` and, where signatures are required, the text of its `.minisig` in base64
//! in the header `nepenthe-signature`. Both need the patch key, as `DELETE` does.

use super::app::App;
use super::body;
use super::error::ApiError;
use super::job::Message;
use super::reply;
use crate::patch::PatchId;
use crate::runtime::{ActivePatch, ActiveSet};
use crate::trust::signature_path;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Header with the signature of an uploaded patch.
const SIGNATURE: &str = "nepenthe-signature";

#[derive(Deserialize)]
struct Named {
    path: Option<String>,
    name: Option<String>,
    #[serde(default = "one")]
    scale: f32,
}

/// Of an upload, in its URL.
#[derive(Deserialize)]
pub(super) struct Upload {
    name: Option<String>,
    #[serde(default = "one")]
    scale: f32,
}

fn one() -> f32 {
    1.0
}

pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    app.blocking(App::follow).await?;
    Ok(reply::json(&listing(&app, &app.runtime.active())))
}

/// The active set.
fn listing(app: &App, set: &ActiveSet) -> Value {
    json!({
        "object": "list",
        "data": set.patches().iter().map(entry).collect::<Vec<_>>(),
        "system_fingerprint": app.fingerprint(set),
        "allow_unpatched": app.options.allow_unpatched,
    })
}

fn entry(p: &ActivePatch) -> Value {
    let info = &p.info;
    json!({
        "id": p.id,
        "object": "patch",
        "name": p.name,
        "scale": p.scale,
        "stored": p.stored,
        "base": info.base,
        "method": info.method,
        "n_forget": info.n_forget,
        "n_retain": info.n_retain,
        "n_tensors": info.tensors.len(),
        "n_canaries": info.canaries.len(),
        "program": info.program,
        "metrics": info.metrics,
    })
}

pub(super) async fn apply(
    State(app): State<Arc<App>>,
    Query(upload): Query<Upload>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    app.options.keys.may_manage(&headers)?;
    let kind = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next();
    match kind.unwrap_or_default().trim() {
        "application/json" => {
            let named: Named = body::typed(&body::object(body, app.limits()).await?)?;
            app.blocking(move |app| {
                let wanted = named.path.as_deref().or(named.name.as_deref());
                let wanted = wanted.ok_or_else(|| ApiError::bad("wanted a path").param("path"))?;
                let path = allowed(&app.patch_dirs, wanted)?;
                apply_file(app, &path, named.scale)
            })
            .await
        }
        "application/octet-stream" => uploaded(app, upload, &headers, body).await,
        other => {
            let wanted = "wanted the content type application/json or application/octet-stream";
            Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("{wanted}, found {other:?}"),
            ))
        }
    }
}

fn apply_file(app: &App, path: &Path, scale: f32) -> Result<Response, ApiError> {
    let id = app.runtime.apply(path, scale)?;
    // An engine that has ended answers for itself.
    let _ = app.inbox.send(Message::Changed);
    let active = app.runtime.active();
    let patch = active.patches().iter().find(|p| p.id == id);
    Ok(reply::json(&patch.map_or(Value::Null, entry)))
}

/// The file that `wanted` names in one of `dirs`. Others are refused in the same words whether
/// they exist or not.
fn allowed(dirs: &[PathBuf], wanted: &str) -> Result<PathBuf, ApiError> {
    let found = dirs.iter().find_map(|dir| {
        // Links resolved: the file itself must lie there.
        let path = dir.join(wanted).canonicalize().ok()?;
        (path.starts_with(dir) && path.is_file()).then_some(path)
    });
    found.ok_or_else(|| {
        let message = match dirs {
            [] => "patches are not applied from files: the server was started without --patch-dir",
            _ => "no such file in a directory that --patch-dir allows",
        };
        ApiError::forbidden(message).param("path").code("path")
    })
}

async fn uploaded(
    app: Arc<App>,
    upload: Upload,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let failed = |e: std::io::Error| ApiError::internal(format!("cannot keep the upload: {e}"));
    let dir = tempfile::tempdir_in(app.uploads.path()).map_err(failed)?;
    let name = upload.name.as_deref().unwrap_or("upload.gguf");
    let path = dir.path().join(plain(name));
    let signature = headers.get(SIGNATURE).map(|v| BASE64_STANDARD.decode(v));
    if let Some(text) = signature {
        let text = text.map_err(|e| ApiError::bad(format!("{SIGNATURE}: {e}")).param(SIGNATURE))?;
        std::fs::write(signature_path(&path), text).map_err(failed)?;
    }
    let mut file = File::create(&path).map_err(failed)?;
    let limits = body::Limits {
        bytes: app.runtime.options().max_patch_bytes,
        ..app.limits()
    };
    body::read(body, limits, |data| file.write_all(data).map_err(failed)).await?;
    drop(file);
    app.blocking(move |app| {
        let applied = apply_file(app, &path, upload.scale);
        drop(dir);
        applied
    })
    .await
}

/// `name` as a file name in any directory.
fn plain(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let name: String = name
        .chars()
        .take(100)
        .map(|c| if is_plain(c) { c } else { '_' })
        .collect();
    match name.trim_matches('.') {
        "" => "upload.gguf".to_owned(),
        name => name.to_owned(),
    }
}

pub(super) async fn revoke(
    State(app): State<Arc<App>>,
    UrlPath(id): UrlPath<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    app.options.keys.may_manage(&headers)?;
    app.blocking(move |app| {
        let id: PatchId = id
            .parse()
            .map_err(|e: String| ApiError::bad(e).param("id"))?;
        app.runtime.revoke(id)?;
        // An engine that has ended answers for itself.
        let _ = app.inbox.send(Message::Changed);
        Ok(reply::json(
            &json!({"id": id, "object": "patch", "deleted": true}),
        ))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_outside_are_not_named() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let root = root.path().canonicalize().expect("it exists");
        let dir = root.join("patches");
        std::fs::create_dir(&dir).expect("room");
        for path in [dir.join("a.gguf"), root.join("b.gguf")] {
            std::fs::write(path, "x").expect("room");
        }
        std::os::unix::fs::symlink(root.join("b.gguf"), dir.join("link")).expect("room");
        let dirs = [dir.clone()];
        let inside = dir.join("a.gguf");
        for wanted in ["a.gguf", "./a.gguf", inside.to_str().expect("plain")] {
            assert_eq!(allowed(&dirs, wanted).expect("inside"), inside);
        }
        let outside = root.join("b.gguf");
        let refused: Vec<String> = ["../b.gguf", "link", "none", "", "/etc/passwd"]
            .into_iter()
            .chain(outside.to_str())
            .map(|wanted| allowed(&dirs, wanted).expect_err(wanted).message)
            .collect();
        assert!(refused.iter().all(|m| *m == refused[0]), "{refused:?}");
        assert!(allowed(&[], "a.gguf").is_err());
    }

    #[test]
    fn names_stay_in_their_directory() {
        assert_eq!(plain("../../a b.gguf"), "_.._a_b.gguf");
        assert_eq!(plain(".."), "upload.gguf");
        assert_eq!(plain("forget-1.gguf"), "forget-1.gguf");
    }
}
