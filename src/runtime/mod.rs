//! The embedded runtime: a model that generates and scores, and patches that come and go meanwhile.
//!
//! A [`Runtime`] holds one model and the set of patches that are active on it; it is shared between
//! threads by cloning. A [`Session`] holds one llama.cpp context with its KV cache, and belongs to
//! one thread at a time. The crate's front page has a complete example.
//!
//! # What a change of patches means
//!
//! - The active patches are an immutable [`ActiveSet`] with a generation number.
//!   [`Runtime::apply`] and [`Runtime::revoke`] build a new set and put it in place once llama.cpp
//!   has loaded it; until then, and when they fail, the old one stays. Changes are made one after
//!   another.
//! - A call on a session works from its first token to its last under the set that was active when
//!   it began, and says which that was ([`Generation::set`], [`Score::set`]). It does not wait for
//!   a change, nor does a change wait for it.
//! - A session keeps its KV cache between calls, so that a conversation's beginning is computed
//!   once. The cache belongs to the set it was computed under and is cleared at the first call
//!   after a change, and then alone.
//! - Several patches act as one adapter laid out in the order of their ids: what is generated
//!   depends on which patches are active and not on the order they came in.
//! - A patch's id is the SHA-256 of its file. Applying what is active already changes its scale,
//!   or nothing.
//!
//! # What is checked
//!
//! A patch file is read once into a private copy, its signature verified on the way where
//! [`Options::require_signature`] has a key, and everything is checked there before llama.cpp sees
//! it: each field of the file, the architecture, every shape, that all numbers are finite, and
//! that the model's adapted tensors (or its whole file) have the digests the patch was made for.
//! What is refused changes nothing.
//!
//! What has passed is tried: the patch's canaries are run with and without it, and a patch that
//! does not act as it did when it was made does not become active ([`crate::proof`],
//! [`Options::prove`]).
//!
//! With [`Options::store`] the active patches of a store ([`crate::store`]) apply from the start,
//! beside those applied by calls, and its changes take effect at the next call of a session
//! without a restart. A store that is broken, or was put back to an older set, makes sessions fail.
//!
//! # What it costs
//!
//! Beside llama.cpp's own memory for the model, each session's context and one adapter, a patch
//! takes its size in the directory for temporary files; sets of several patches take twice their
//! factors in memory while they are built. A replaced set is freed when the last session has seen
//! the change; [`Session::refresh`] makes an idle one see it.
//!
//! Threads wait for one another in OpenMP's barriers. libgomp spins for some five milliseconds before
//! a thread sleeps, which is long where other work has the cores: the program starts with
//! `GOMP_SPINCOUNT=10000` in its environment, and so should yours.

mod error;
mod session;
mod set;
mod text;

pub use crate::patch::PatchId;
pub use crate::score::{Finish, Sampling};
pub use error::RuntimeError;
pub use session::{Generate, Generation, Piece, Prompt, Score, Session};
#[cfg(feature = "serve")]
pub(crate) use session::{common_prefix, prompt_tokens};
pub use set::{ActivePatch, ActiveSet};
pub(crate) use text::take_text;

use crate::data::Template;
use crate::digest::Digest;
use crate::error::Error;
use crate::ggml::{Model, return_free_memory};
use crate::model::OpenModel;
use crate::patch::{Intake, PatchError, check_scale};
use crate::store::{Stamp, Store, StoreError};
use crate::trust::PublicKey;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tempfile::TempDir;

/// How a runtime is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tokens a session's context holds.
    pub n_ctx: u32,
    /// ggml threads of each session.
    pub n_threads: usize,
    /// Layers to offload; negative: all.
    pub n_gpu_layers: i32,
    /// Chat template; none: the model's own.
    pub template: Option<Template>,
    /// Keep a session's KV cache for the next call. What is generated may then differ in rounding
    /// from what a fresh session generates.
    pub keep_cache: bool,
    /// Most patches that may be active.
    pub max_patches: usize,
    /// Largest patch file taken, bytes.
    pub max_patch_bytes: u64,
    /// Take only patches that this key signed.
    pub require_signature: Option<PublicKey>,
    /// A store whose active patches apply from the start, and whose changes are followed.
    pub store: Option<PathBuf>,
    /// Run a patch's canaries before it takes effect ([`crate::proof`]). Patches without any pass.
    pub prove: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            n_ctx: 2048,
            n_threads: std::thread::available_parallelism().map_or(1, usize::from),
            n_gpu_layers: 0,
            template: None,
            keep_cache: true,
            max_patches: 64,
            max_patch_bytes: 4 << 30,
            require_signature: None,
            store: None,
            prove: true,
        }
    }
}

/// A model and its active patches; clones share both.
#[derive(Clone)]
pub struct Runtime(Arc<Inner>);

struct Inner {
    open: OpenModel,
    template: Template,
    options: Options,
    /// Private copies of the active patches.
    copies: TempDir,
    /// Held while a change is made.
    changing: Mutex<()>,
    set: RwLock<Arc<ActiveSet>>,
    followed: Option<Followed>,
}

/// A store, and what of it is in the active set.
struct Followed {
    store: Store,
    seen: Mutex<(Option<Stamp>, u64)>,
}

impl Runtime {
    /// Open the model at `path` (any part of a split one). The patches of the store are active,
    /// if there is one, and no others.
    ///
    /// # Errors
    /// As [`OpenModel::open`] and [`follow`](Self::follow), or no directory for temporary files.
    pub fn open(path: impl AsRef<Path>, options: Options) -> Result<Self, Error> {
        let open = OpenModel::open(path.as_ref(), options.n_gpu_layers)?;
        let template = match &options.template {
            Some(template) => template.clone(),
            None => open.template()?,
        };
        let copies = tempfile::Builder::new().prefix("nepenthe-").tempdir();
        let followed = options.store.as_deref().map(Store::open).transpose()?;
        let runtime = Self(Arc::new(Inner {
            open,
            template,
            options,
            followed: followed.map(|store| Followed {
                store,
                seen: Mutex::default(),
            }),
            copies: copies.map_err(|source| Error::Io {
                path: std::env::temp_dir(),
                doing: "making a temporary directory",
                source,
            })?,
            changing: Mutex::new(()),
            set: RwLock::new(Arc::new(ActiveSet::none())),
        }));
        runtime.follow()?;
        Ok(runtime)
    }

    /// llama.cpp's model, for tokens and their texts.
    pub fn model(&self) -> &Model {
        &self.0.open.model
    }

    /// The chat template in use.
    pub fn template(&self) -> &Template {
        &self.0.template
    }

    /// The settings it was opened with.
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    /// SHA-256 of the model's file, or of all parts of a split one in order. The first call reads
    /// all of it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn digest(&self) -> Result<Digest, Error> {
        self.0.open.weights.digest()
    }

    /// The set that a call beginning now works under.
    pub fn active(&self) -> Arc<ActiveSet> {
        let set = self.0.set.read();
        set.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A new session, with its own context.
    ///
    /// # Errors
    /// When llama.cpp has no memory for the context.
    pub fn session(&self) -> Result<Session, Error> {
        Session::new(self.clone())
    }

    /// Apply the patch at `path`, `scale` times; one that is active already gets the new scale.
    ///
    /// # Errors
    /// A scale that is 0 or not finite; a patch that is malformed, too large, without provenance,
    /// not signed by the key that is required, or for another model; a patch too many; llama.cpp's refusal. The active set is then what it
    /// was.
    pub fn apply(&self, path: impl AsRef<Path>, scale: f32) -> Result<PatchId, Error> {
        Ok(self.change(&[(path.as_ref(), scale)], &[])?[0])
    }

    /// Take back patch `id`.
    ///
    /// # Errors
    /// [`RuntimeError::NotActive`], [`RuntimeError::Stored`].
    pub fn revoke(&self, id: PatchId) -> Result<(), Error> {
        self.change(&[], &[id]).map(drop)
    }

    /// Take back `revoked` and apply `applied`, patches with their scales, in one step: no call
    /// sees a part of it. Returns the ids of `applied`.
    ///
    /// # Errors
    /// As [`apply`](Self::apply) and [`revoke`](Self::revoke). The active set is then what it was.
    pub fn change(
        &self,
        applied: &[(&Path, f32)],
        revoked: &[PatchId],
    ) -> Result<Vec<PatchId>, Error> {
        for (_, scale) in applied {
            check_scale(*scale)?;
        }
        let _alone = self.0.changing.lock();
        let before = self.active();
        let mut patches = before.patches().to_vec();
        for &id in revoked {
            match patches.iter().position(|p| p.id == id) {
                None => return Err(RuntimeError::NotActive { id }.into()),
                Some(at) if patches[at].stored => return Err(RuntimeError::Stored { id }.into()),
                Some(at) => drop(patches.remove(at)),
            }
        }
        let mut ids = Vec::with_capacity(applied.len());
        for &(path, scale) in applied {
            let patch = self.take_in(path, scale)?;
            let id = patch.id;
            match patches.iter().position(|p| p.id == id) {
                Some(at) if patches[at].stored => return Err(RuntimeError::Stored { id }.into()),
                Some(at) => patches[at] = patch,
                None => patches.push(patch),
            }
            ids.push(id);
        }
        if ActiveSet::digest_of(&patches) != before.digest() {
            self.put(patches)?;
        }
        Ok(ids)
    }

    /// Bring the active set in line with the store, if there is one and it has changed. Every call
    /// of a session does this when it begins.
    ///
    /// # Errors
    /// A store that cannot be read or was put back to an older set, a patch of it that is refused.
    /// The active set is then what it was; sessions fail, rather than answer without a patch that
    /// the store says is active, until the store is put right.
    pub fn follow(&self) -> Result<(), Error> {
        let Some(Followed { store, seen }) = &self.0.followed else {
            return Ok(());
        };
        let is_new = |stamp: Option<Stamp>| {
            let seen = *seen.lock().unwrap_or_else(PoisonError::into_inner);
            stamp.is_none() || stamp != seen.0
        };
        if !is_new(store.stamp()) {
            return Ok(());
        }
        let _alone = self.0.changing.lock();
        let stamp = store.stamp();
        if !is_new(stamp) {
            return Ok(());
        }
        let index = store.index()?;
        let before = seen.lock().unwrap_or_else(PoisonError::into_inner).1;
        if index.sequence < before {
            return Err(StoreError::OlderStore {
                path: store.dir().to_owned(),
                seen: before,
                found: index.sequence,
            }
            .into());
        }
        let active = self.active();
        let mut patches: Vec<ActivePatch> = active.patches().to_vec();
        patches.retain(|p| !p.stored && index.patches.iter().all(|e| e.id != p.id));
        for entry in &index.patches {
            let known = active.patches().iter().find(|p| p.id == entry.id);
            let patch = match known {
                Some(patch) => patch.clone(),
                None => {
                    let path = store.path_of(entry.id);
                    let patch = self.take_in(&path, entry.scale)?;
                    if patch.id != entry.id {
                        return Err(StoreError::Changed {
                            path,
                            wanted: entry.id,
                            found: patch.id,
                        }
                        .into());
                    }
                    patch
                }
            };
            patches.push(ActivePatch {
                name: entry.name.clone(),
                scale: entry.scale,
                stored: true,
                ..patch
            });
        }
        if index.sequence > before || !patches.is_empty() {
            self.put(patches)?;
        }
        *seen.lock().unwrap_or_else(PoisonError::into_inner) = (stamp, index.sequence);
        Ok(())
    }

    /// Read a patch and check all of it.
    fn take_in(&self, path: &Path, scale: f32) -> Result<ActivePatch, Error> {
        let (open, options) = (&self.0.open, &self.0.options);
        let intake = Intake::read(
            path,
            self.0.copies.path(),
            options.max_patch_bytes,
            options.require_signature.as_ref(),
        )?;
        let patch = intake.patch()?;
        patch.check_shapes(&open.weights)?;
        patch.check_base(&open.weights)?;
        let Some(info) = patch.info else {
            return Err(PatchError::NoProvenance {
                path: path.to_owned(),
            }
            .into());
        };
        let name = path.file_name().unwrap_or_default();
        Ok(ActivePatch {
            id: intake.id(),
            name: name.to_string_lossy().into_owned(),
            scale,
            stored: false,
            info: Arc::new(info),
            intake: Arc::new(intake),
        })
    }

    /// Make `patches` the active set. The caller holds the lock on changes.
    fn put(&self, patches: Vec<ActivePatch>) -> Result<(), Error> {
        let wanted = self.0.options.max_patches;
        if patches.len() > wanted {
            return Err(RuntimeError::TooMany { wanted }.into());
        }
        let before = self.active();
        let generation = before.generation() + 1;
        let set = Arc::new(ActiveSet::build(generation, patches, &self.0.open)?);
        if self.0.options.prove {
            let n_threads = self.0.options.n_threads;
            set.prove(&before, &self.0.open.model, n_threads)?;
        }
        *self.0.set.write().unwrap_or_else(PoisonError::into_inner) = set;
        drop(before);
        return_free_memory();
        Ok(())
    }
}
