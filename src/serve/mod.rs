//! The HTTP server: a runtime behind OpenAI's API, for many clients at once.
//!
//! In: a [`Runtime`] with its active patches. Out: `/v1/chat/completions` and `/v1/completions`,
//! `/v1/patches` and `/lora-adapters` to see and change the patches, `/v1/models`, `/health`,
//! `/metrics`; and at `/` a page to try all that (`page`).
//!
//! Requests become texts to write (`ask`), which wait in a bounded queue for one of the slots of a
//! single engine thread (`engine`); when the queue is full the answer is 429. A text is written
//! under the patches that are active when it begins, first token to last, and every answer says
//! which those were. Who may do what is in `auth`.
//!
//! What is generated greedily, or with a seed, may differ in near ties from one time to the next:
//! sums are rounded otherwise when a prompt's beginning is kept from another text and when several
//! texts share a batch. `keep_cache: false` in the runtime's options ends the first.

mod app;
mod ask;
mod auth;
mod body;
mod completions;
mod engine;
mod error;
mod job;
mod listen;
mod lora;
mod metrics;
mod page;
mod patches;
mod reply;
mod routes;
mod slot;
mod text;

pub use auth::{Key, Keys};
pub use error::ServeError;

use crate::error::Error;
use crate::runtime::Runtime;
use app::{App, model_name, now};
use engine::Engine;
use job::Message;
use lora::Lora;
use metrics::Metrics;
use page::Report;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// Time for a patch that is being applied when the server ends.
const LAST_CHANGE: Duration = Duration::from_secs(10);

/// How a server is set up. The context length of each slot is the runtime's.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0: any free one.
    pub address: SocketAddr,
    /// Texts written side by side.
    pub slots: usize,
    /// Texts that may wait for a slot.
    pub queue: usize,
    /// Largest JSON body, bytes. Patches have the runtime's limit.
    pub max_body: u64,
    /// Most connections at a time.
    pub max_connections: usize,
    /// Time for the head of a request, and for its body to begin.
    pub read_timeout: Duration,
    /// Who may do what.
    pub keys: Keys,
    /// Give answers without patches to who has the patch key and asks for them.
    pub allow_unpatched: bool,
    /// Host names it answers to beside addresses and `localhost`.
    pub hosts: Vec<String>,
    /// Directories that patches may be applied from.
    pub patch_dirs: Vec<PathBuf>,
    /// An evidence report to show, as `nepenthe report` writes it.
    pub report: Option<PathBuf>,
    /// Patches that apply from the start, with their scales; at 0 they are only listed.
    pub loras: Vec<(PathBuf, f32)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            slots: 4,
            queue: 32,
            max_body: 4 << 20,
            max_connections: 256,
            read_timeout: Duration::from_secs(30),
            keys: Keys::default(),
            allow_unpatched: false,
            hosts: Vec::new(),
            patch_dirs: Vec::new(),
            report: None,
            loras: Vec::new(),
        }
    }
}

/// A server that runs.
pub struct Server {
    address: SocketAddr,
    app: Arc<App>,
    stop: watch::Sender<Duration>,
    engine: JoinHandle<()>,
    http: JoinHandle<()>,
}

impl Server {
    /// Start serving `runtime`.
    ///
    /// # Errors
    /// A number that is 0, a directory that does not exist, a patch that is refused, an address
    /// that cannot be listened on, no memory for the context.
    pub fn start(runtime: Runtime, mut options: Options) -> Result<Self, Error> {
        let at_least_one = [
            ("slots", options.slots),
            ("max-connections", options.max_connections),
        ];
        for (setting, found) in at_least_one {
            if found == 0 {
                return Err(Error::Setting {
                    setting,
                    wanted: "1 or more".into(),
                    found: found.to_string(),
                });
            }
        }
        let report = Report::read(options.report.as_deref())?;
        let (address, listener) = bind(options.address)?;
        options.address = address;
        let metrics = Arc::new(Metrics::new());
        metrics.slots.set(options.slots as i64);
        let loras = Lora::apply_all(&runtime, &options.loras)?;
        let (inbox, messages) = mpsc::channel();
        let engine = Engine::new(runtime.clone(), options.slots, messages, metrics.clone())?;
        let app = Arc::new(App {
            model: model_name(runtime.model()),
            started: now(),
            model_digest: runtime.digest()?,
            room: Arc::new(Semaphore::new(options.slots + options.queue)),
            loras: Mutex::new(loras),
            patch_dirs: resolved(&options.patch_dirs)?,
            report,
            uploads: tempfile::tempdir().map_err(|source| Error::Io {
                path: std::env::temp_dir(),
                doing: "making a temporary directory",
                source,
            })?,
            is_ending: AtomicBool::new(false),
            n_requests: AtomicU64::new(0),
            metrics,
            inbox,
            options,
            runtime,
        });
        let threads = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("nepenthe-http")
            .enable_all()
            .build()
            .map_err(ServeError::Threads)?;
        let (stop, stopped) = watch::channel(Duration::ZERO);
        let router = routes::router(app.clone());
        let limits = listen::Limits {
            connections: app.options.max_connections,
            patience: app.options.read_timeout,
        };
        let named = |name: &str| thread::Builder::new().name(name.to_owned());
        let engine = named("nepenthe-engine").spawn(|| engine.run());
        let engine = engine.map_err(ServeError::Threads)?;
        let http = named("nepenthe-listen").spawn(move || {
            threads.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener);
                let listener = listener.expect("a listening socket, set not to block");
                listen::serve(listener, router, limits, stopped).await;
            });
            // What did not finish in time is cut off, but for a patch that is being applied: nothing
            // may compute when the process ends.
            threads.shutdown_timeout(LAST_CHANGE);
        });
        Ok(Self {
            address,
            app,
            stop,
            engine,
            http: http.map_err(ServeError::Threads)?,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it does its work.
    pub fn is_running(&self) -> bool {
        !self.engine.is_finished() && !self.http.is_finished()
    }

    /// Take no more requests, let those that run finish for at most `grace`, and end.
    ///
    /// # Errors
    /// An engine that had ended by itself.
    pub fn stop(self, grace: Duration) -> Result<(), Error> {
        let was_running = self.is_running();
        self.app.is_ending.store(true, Ordering::Relaxed);
        // Only fails when the listening thread has ended.
        let _ = self.stop.send(grace);
        let http = self.http.join();
        let _ = self.app.inbox.send(Message::Stop);
        match (was_running, self.engine.join(), http) {
            (true, Ok(()), Ok(())) => Ok(()),
            _ => Err(ServeError::Engine.into()),
        }
    }
}

fn bind(address: SocketAddr) -> Result<(SocketAddr, std::net::TcpListener), Error> {
    let bound = std::net::TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok((listener.local_addr()?, listener))
    });
    Ok(bound.map_err(|source| ServeError::Bind { address, source })?)
}

/// `dirs` with links resolved.
fn resolved(dirs: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let resolve = |dir: &PathBuf| {
        dir.canonicalize().map_err(|source| Error::Io {
            path: dir.clone(),
            doing: "opening",
            source,
        })
    };
    dirs.iter().map(resolve).collect()
}
