//! `/lora-adapters`, as llama.cpp's server has it: the adapters named on the command line, with
//! their scales; those a POST does not name get scale 0, which here takes a patch back.

use super::app::App;
use super::body;
use super::error::ApiError;
use super::job::Message;
use super::reply;
use crate::error::Error;
use crate::patch::PatchId;
use crate::runtime::Runtime;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

/// A patch that was named on the command line.
pub(super) struct Lora {
    path: PathBuf,
    /// Known once it was applied.
    id: Option<PatchId>,
}

impl Lora {
    /// Apply `specs` to `runtime`; those of scale 0 are only listed.
    ///
    /// # Errors
    /// As [`Runtime::apply`].
    pub(super) fn apply_all(
        runtime: &Runtime,
        specs: &[(PathBuf, f32)],
    ) -> Result<Vec<Self>, Error> {
        let named = || specs.iter().filter(|(_, scale)| *scale != 0.0);
        let applied: Vec<(&Path, f32)> = named().map(|(p, scale)| (p.as_path(), *scale)).collect();
        let mut ids = runtime.change(&applied, &[])?.into_iter();
        let lora = |(path, scale): &(PathBuf, f32)| Self {
            path: path.clone(),
            id: if *scale == 0.0 { None } else { ids.next() },
        };
        Ok(specs.iter().map(lora).collect())
    }

    fn scale(&self, runtime: &Runtime) -> f32 {
        let active = runtime.active();
        let found = active.patches().iter().find(|p| Some(p.id) == self.id);
        found.map_or(0.0, |p| p.scale)
    }
}

#[derive(Deserialize)]
struct Wanted {
    id: usize,
    scale: f32,
}

pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    app.blocking(App::follow).await?;
    let loras = app.loras.lock().unwrap_or_else(PoisonError::into_inner);
    let one = |(id, lora): (usize, &Lora)| json!({"id": id, "path": lora.path, "scale": lora.scale(&app.runtime)});
    Ok(reply::json(&loras.iter().enumerate().map(one).collect()))
}

pub(super) async fn set(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    app.options.keys.may_manage(&headers)?;
    let body = body::json(body, app.limits()).await?;
    let wanted: Vec<Wanted> = body::typed(&body)?;
    app.blocking(move |app| set_scales(app, &wanted)).await
}

fn set_scales(app: &App, wanted: &[Wanted]) -> Result<Response, ApiError> {
    let mut loras = app.loras.lock().unwrap_or_else(PoisonError::into_inner);
    let mut scales = vec![0.0; loras.len()];
    for w in wanted {
        let n = scales.len();
        let scale = scales.get_mut(w.id).ok_or_else(|| {
            let message = format!("wanted the id of one of {n} adapters, found {}", w.id);
            ApiError::bad(message).param("id")
        })?;
        *scale = w.scale;
    }
    let (mut applied, mut revoked, mut changed) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (lora, &scale)) in loras.iter().zip(&scales).enumerate() {
        let now = lora.scale(&app.runtime);
        if scale == now {
            continue;
        }
        if now != 0.0 {
            revoked.extend(lora.id);
        }
        if scale != 0.0 {
            applied.push((lora.path.as_path(), scale));
            changed.push(i);
        }
    }
    let ids = app.runtime.change(&applied, &revoked)?;
    for (i, id) in changed.into_iter().zip(ids) {
        loras[i].id = Some(id);
    }
    // An engine that has ended answers for itself.
    let _ = app.inbox.send(Message::Changed);
    let done: Value = json!({"success": true});
    Ok(reply::json(&done))
}
