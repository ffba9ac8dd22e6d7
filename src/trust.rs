//! Who made a patch: detached signatures in minisign's form, Ed25519 over the BLAKE2b-512 of the
//! file, in `FILE.minisig` beside it.
//!
//! `minisign -V` verifies what [`sign`] writes, and [`PublicKey`] what `minisign -S` writes. The
//! signature covers the whole file, and so what its metadata say of the effect before and after;
//! its trusted comment may carry a sequence number, by which a store tells an old patch from a new
//! one ([`crate::store`]). Nothing here needs a network.

use crate::atomic::write_atomic;
use crate::error::Error;
use minisign::{KeyPair, SecretKey, SecretKeyBox};
use minisign_verify::Signature as Parsed;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use thiserror::Error as ThisError;

/// Longest key or signature file read; real ones have a few hundred bytes.
const MAX_BYTES: u64 = 64 << 10;

/// Why a key or a signature is refused.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, Clone, PartialEq, ThisError)]
#[non_exhaustive]
pub enum TrustError {
    #[error("{key}: wanted a minisign public key, a file or its text, found {problem}")]
    PublicKey { key: String, problem: String },
    #[error("{}: wanted a minisign secret key: {problem}", path.display())]
    SecretKey { path: PathBuf, problem: String },
    #[error("{}: wanted a signature in {}, found none", path.display(), signature.display())]
    Unsigned { path: PathBuf, signature: PathBuf },
    #[error("{}: wanted a minisign signature: {problem}", path.display())]
    Signature { path: PathBuf, problem: String },
    #[error("{}: signed with another key than {key}", path.display())]
    OtherKey { path: PathBuf, key: String },
    #[error("{}: not what the key {key} signed: file or signature were changed", path.display())]
    Tampered { path: PathBuf, key: String },
    #[error("{}: cannot be signed: {problem}", path.display())]
    Signing { path: PathBuf, problem: String },
}

impl TrustError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PublicKey { .. } => 2,
            Self::SecretKey { .. } | Self::Signing { .. } => 3,
            _ => 4,
        }
    }
}

/// Where the signature of a file lies.
pub fn signature_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".minisig");
    name.into()
}

/// A key whose signatures are believed.
#[derive(Debug, Clone)]
pub struct PublicKey {
    key: minisign_verify::PublicKey,
    text: String,
}

impl PublicKey {
    /// From `key`, a public key's text or the file that holds it.
    ///
    /// # Errors
    /// Neither.
    pub fn parse(key: &str) -> Result<Self, Error> {
        let bad = |problem: String| TrustError::PublicKey {
            key: key.to_owned(),
            problem,
        };
        let text = if Path::new(key).is_file() {
            let text = read_text(Path::new(key)).map_err(|e| bad(e.to_string()))?;
            let line = text.lines().find(|l| !l.starts_with("untrusted comment:"));
            line.unwrap_or_default().trim().to_owned()
        } else {
            key.trim().to_owned()
        };
        let parsed = minisign_verify::PublicKey::from_base64(&text)
            .map_err(|_| bad("no such file and no such text".into()))?;
        Ok(Self { key: parsed, text })
    }

    /// The 56 characters of it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// A check of the signature of the file at `path`, to be fed the file's bytes.
    ///
    /// # Errors
    /// No signature, one in another form or by another key.
    pub fn verifier<'a>(
        &'a self,
        signature: &'a Signature,
        path: &'a Path,
    ) -> Result<Verifier<'a>, Error> {
        let stream = self.key.verify_stream(&signature.parsed).map_err(|e| {
            let path = path.to_owned();
            match e {
                minisign_verify::Error::UnexpectedKeyId => TrustError::OtherKey {
                    path,
                    key: self.text.clone(),
                },
                other => TrustError::Signature {
                    path,
                    problem: other.to_string(),
                },
            }
        })?;
        Ok(Verifier {
            stream,
            key: self,
            path,
        })
    }
}

/// A signature that has been read, and says nothing until it is verified.
#[derive(Clone)]
pub struct Signature {
    parsed: Parsed,
    text: String,
}

impl Signature {
    /// The one beside the file at `path`, if there is one.
    ///
    /// # Errors
    /// A file that cannot be read or is no signature.
    pub fn beside(path: &Path) -> Result<Option<Self>, Error> {
        let from = signature_path(path);
        let bad = |problem: String| TrustError::Signature {
            path: from.clone(),
            problem,
        };
        if !from.exists() {
            return Ok(None);
        }
        let text = read_text(&from).map_err(|e| bad(e.to_string()))?;
        let parsed = Parsed::decode(&text).map_err(|e| bad(e.to_string()))?;
        Ok(Some(Self { parsed, text }))
    }

    /// [`beside`](Self::beside), where there must be one.
    ///
    /// # Errors
    /// As there, and [`TrustError::Unsigned`].
    pub fn required(path: &Path) -> Result<Self, Error> {
        Ok(Self::beside(path)?.ok_or_else(|| TrustError::Unsigned {
            path: path.to_owned(),
            signature: signature_path(path),
        })?)
    }

    /// Its file's text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The sequence number in the trusted comment; believe it once the signature is verified.
    pub fn sequence(&self) -> Option<u64> {
        let comment = self.parsed.trusted_comment();
        let mut fields = comment.split(['\t', ' ']);
        fields.find_map(|f| f.strip_prefix("sequence:")?.parse().ok())
    }
}

/// A signature on its way to being verified.
pub struct Verifier<'a> {
    stream: minisign_verify::StreamVerifier<'a>,
    key: &'a PublicKey,
    path: &'a Path,
}

impl Verifier<'_> {
    /// The file's next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.stream.update(bytes);
    }

    /// After the last.
    ///
    /// # Errors
    /// [`TrustError::Tampered`].
    pub fn finish(mut self) -> Result<(), Error> {
        self.stream.finalize().map_err(|_| TrustError::Tampered {
            path: self.path.to_owned(),
            key: self.key.text.clone(),
        })?;
        Ok(())
    }
}

/// Write a new pair of keys. Without a password the secret key lies open in its file, which only
/// its owner can read; [`Password::Ask`] asks for one on the terminal.
///
/// # Errors
/// Files that exist, a failing disk.
pub fn keygen(secret: &Path, public: &Path, password: Password) -> Result<PublicKey, Error> {
    let failed = |problem: minisign::PError| TrustError::SecretKey {
        path: secret.to_owned(),
        problem: problem.to_string(),
    };
    let pair = match password {
        Password::None => KeyPair::generate_unencrypted_keypair(),
        Password::Ask => KeyPair::generate_encrypted_keypair(None),
        Password::Given(password) => KeyPair::generate_encrypted_keypair(Some(password)),
    };
    let pair = pair.map_err(failed)?;
    let secret_text = pair
        .sk
        .to_box(Some("nepenthe secret key"))
        .map_err(failed)?;
    let public_text = pair.pk.to_box().map_err(failed)?.into_string();
    write_atomic(public, false, |out| write_text(out, &public_text, public))?;
    let io = |source| Error::Io {
        path: secret.to_owned(),
        doing: "writing",
        source,
    };
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(secret)
        .and_then(|mut file| {
            file.write_all(secret_text.into_string().as_bytes())?;
            file.sync_all()
        });
    if let Err(e) = written {
        // A public key without its secret one is of no use.
        let _ = fs::remove_file(public);
        return Err(io(e));
    }
    PublicKey::parse(&pair.pk.to_base64())
}

/// What protects a secret key in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Password {
    /// Nothing.
    None,
    /// What the user types.
    Ask,
    /// This.
    Given(String),
}

/// Sign the file at `path`; the signature goes beside it. Returns its path.
///
/// # Errors
/// A bad key, an existing signature unless `force`, a file that cannot be read, a failing disk.
pub fn sign(
    path: &Path,
    secret: &Path,
    password: Password,
    sequence: Option<u64>,
    force: bool,
) -> Result<PathBuf, Error> {
    let key = secret_key(secret, password)?;
    let failed = |problem: String| TrustError::Signing {
        path: path.to_owned(),
        problem,
    };
    let data = File::open(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        doing: "opening",
        source,
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut comment = format!(
        "timestamp:{}\tfile:{}",
        now.map_or(0, |t| t.as_secs()),
        name.replace(char::is_control, "?"),
    );
    if let Some(n) = sequence {
        comment += &format!("\tsequence:{n}");
    }
    let signature = minisign::sign(
        None,
        &key,
        data,
        Some(&(comment + "\thashed")),
        Some("signature of a nepenthe patch"),
    )
    .map_err(|e| failed(e.to_string()))?;
    let out = signature_path(path);
    let text = signature.into_string();
    write_atomic(&out, force, |file| write_text(file, &text, &out))?;
    Ok(out)
}

fn secret_key(path: &Path, password: Password) -> Result<SecretKey, Error> {
    let bad = |problem: String| TrustError::SecretKey {
        path: path.to_owned(),
        problem,
    };
    let text = read_text(path).map_err(|e| bad(e.to_string()))?;
    let boxed = || SecretKeyBox::from_string(&text).map_err(|e| bad(e.to_string()));
    if let Ok(key) = boxed()?.into_unencrypted_secret_key() {
        return Ok(key);
    }
    let password = match password {
        Password::Given(password) => Some(password),
        Password::Ask | Password::None => None,
    };
    let key = boxed()?.into_secret_key(password);
    Ok(key.map_err(|e| bad(e.to_string()))?)
}

fn write_text(out: &mut dyn Write, text: &str, path: &Path) -> Result<(), Error> {
    out.write_all(text.as_bytes()).map_err(|source| Error::Io {
        path: path.to_owned(),
        doing: "writing",
        source,
    })
}

fn read_text(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(MAX_BYTES)
        .read_to_string(&mut text)?;
    Ok(text)
}
