//! `nepenthe serve`.

use super::common::{AdapterArgs, ModelArgs, TemplateArg, TrustArgs};
use super::interrupt;
use crate::data::Template;
use crate::error::Error;
use crate::runtime::{Options as RuntimeOptions, Runtime};
use crate::serve::{Key, Keys, Options, Server};
use clap::Args;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often the server's health and Ctrl-C are looked at.
const WATCH: Duration = Duration::from_millis(50);

/// Serve the model over HTTP, with OpenAI's API
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    adapters: AdapterArgs,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    template: TemplateArg,
    /// Store whose patches apply, and whose changes are followed
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    host: String,
    /// Port to listen on; 0: any free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Context length in tokens, of each slot
    #[arg(
        short,
        long = "ctx-size",
        visible_alias = "ctx",
        default_value_t = 2048
    )]
    ctx_size: u32,
    /// Texts written side by side
    #[arg(long, visible_alias = "parallel", default_value_t = 4)]
    slots: usize,
    /// Texts that may wait for a slot; more are refused with 429
    #[arg(long, default_value_t = 32)]
    queue: usize,
    /// Largest JSON body, bytes
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20)]
    max_body: u64,
    /// Largest patch taken, bytes
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 30)]
    max_patch: u64,
    /// Most connections at a time
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_connections: usize,
    /// Seconds for a request's head, and for its body to begin
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    read_timeout: u64,
    /// Key wanted for everything but /health (others see it in the process list: better a file)
    #[arg(
        long,
        value_name = "KEY",
        env = "NEPENTHE_API_KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
    /// File with such keys, one a line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Key wanted for changing patches; without one they are not changed over HTTP
    #[arg(
        long,
        value_name = "KEY",
        env = "NEPENTHE_PATCH_KEY",
        hide_env_values = true
    )]
    patch_key: Option<String>,
    /// File with such keys, one a line
    #[arg(long, value_name = "FILE")]
    patch_key_file: Option<PathBuf>,
    /// Folder that patches may be applied from over HTTP; may be given several times
    #[arg(long, value_name = "DIR")]
    patch_dir: Vec<PathBuf>,
    /// Evidence report to show at /report, as `nepenthe report -o FILE` writes it
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Let who has the patch key ask for answers without patches, which show what was forgotten
    #[arg(long)]
    allow_unpatched: bool,
    /// Host name to answer to, beside addresses and localhost; may be given several times
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// Seconds that running answers have to finish when the server ends
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
}

impl Serve {
    pub(super) fn run(&self) -> Result<(), Error> {
        crate::ggml::set_verbose(self.model.verbose);
        let options = self.options()?;
        let runtime = Runtime::open(&self.model.model, self.runtime_options()?)?;
        let is_open = options.keys.api.is_empty() && !options.address.ip().is_loopback();
        interrupt::listen("ending: running answers may finish");
        let server = Server::start(runtime, options)?;
        if is_open {
            eprintln!("nepenthe: whoever reaches this machine may use the model (--api-key)");
        }
        eprintln!("nepenthe: listening on http://{}", server.address());
        while server.is_running() && !interrupt::asked() {
            std::thread::sleep(WATCH);
        }
        server.stop(Duration::from_secs(self.grace))
    }

    fn runtime_options(&self) -> Result<RuntimeOptions, Error> {
        if self.ctx_size < 2 {
            return Err(Error::Setting {
                setting: "ctx-size",
                wanted: "2 or more".into(),
                found: self.ctx_size.to_string(),
            });
        }
        Ok(RuntimeOptions {
            n_ctx: self.ctx_size,
            n_threads: self.model.n_threads(),
            n_gpu_layers: self.model.n_gpu_layers.0,
            template: match self.template.template.as_str() {
                "gguf" => None,
                "none" => Some(Template::None),
                file => Some(Template::from_file(Path::new(file))?),
            },
            max_patch_bytes: self.max_patch,
            require_signature: self.trust.key()?,
            store: self.store.clone(),
            ..RuntimeOptions::default()
        })
    }

    fn options(&self) -> Result<Options, Error> {
        let keys = Keys {
            api: keys("api-key-file", &self.api_key, self.api_key_file.as_deref())?,
            patch: keys(
                "patch-key-file",
                &self.patch_key,
                self.patch_key_file.as_deref(),
            )?,
        };
        if self.allow_unpatched && keys.patch.is_empty() {
            return Err(Error::Setting {
                setting: "allow-unpatched",
                wanted: "a --patch-key beside it".into(),
                found: "none".into(),
            });
        }
        let loras = self.adapters.specs()?;
        Ok(Options {
            address: self.address()?,
            slots: self.slots,
            queue: self.queue,
            max_body: self.max_body,
            max_connections: self.max_connections,
            read_timeout: Duration::from_secs(self.read_timeout),
            keys,
            allow_unpatched: self.allow_unpatched,
            hosts: self.allow_host.clone(),
            patch_dirs: self.patch_dir.clone(),
            report: self.report.clone(),
            loras: loras.into_iter().map(|(p, s)| (p.to_owned(), s)).collect(),
        })
    }

    fn address(&self) -> Result<SocketAddr, Error> {
        let found = (self.host.as_str(), self.port).to_socket_addrs();
        found
            .ok()
            .and_then(|mut a| a.next())
            .ok_or_else(|| Error::Setting {
                setting: "host",
                wanted: "an address or a name of this machine".into(),
                found: self.host.clone(),
            })
    }
}

/// The key on the command line and those of the file.
fn keys(
    setting: &'static str,
    given: &Option<String>,
    file: Option<&Path>,
) -> Result<Vec<Key>, Error> {
    let mut texts: Vec<String> = given.iter().cloned().collect();
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            doing: "reading",
            source,
        })?;
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        texts.extend(lines.map(str::to_owned));
        if texts.is_empty() {
            return Err(Error::Setting {
                setting,
                wanted: "a file with a key".into(),
                found: format!("{}, which is empty", path.display()),
            });
        }
    }
    if texts.iter().any(String::is_empty) {
        return Err(Error::Setting {
            setting,
            wanted: "a key".into(),
            found: "an empty one".into(),
        });
    }
    Ok(texts.iter().map(|t| Key::new(t)).collect())
}
