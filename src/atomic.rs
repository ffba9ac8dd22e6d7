//! Whole-file writes that either appear complete under their final name or not at all.
//!
//! Order: temporary file in the target's directory, write, fsync, verify, rename, fsync of the
//! directory. The target is never modified in place, since another process may have it mapped.

use crate::fault::point;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const BUFFER_BYTES: usize = 1 << 20;

/// Why a file could not be put in place. The target is unchanged, except after a failed
/// "syncing the directory", when the new file stands but may not survive a power cut.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AtomicError {
    #[error("{}: the file exists already; wanted a free name, or force to replace it", path.display())]
    Exists { path: PathBuf },
    #[error("{}: wanted a path that ends in a file name", path.display())]
    NoFileName { path: PathBuf },
    #[error("{}: {doing} failed", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
}

/// Writes `path` through `write`; see the module for the order of steps.
///
/// An existing `path` is an error unless `force`. A symlink at `path` is replaced, not followed.
/// Any error removes the temporary file. If a write to disk failed, that error is returned, with
/// the path, in place of whatever `write` made of it.
pub fn write_atomic<T, E: From<AtomicError>>(
    path: &Path,
    force: bool,
    write: impl FnOnce(&mut dyn Write) -> Result<T, E>,
) -> Result<T, E> {
    write_atomic_verified(path, force, write, |_, _| Ok(()))
}

/// As [`write_atomic`], and calls `verify` with the finished temporary file and what `write`
/// returned before the rename; its error leaves the target as it was.
pub fn write_atomic_verified<T, E: From<AtomicError>>(
    path: &Path,
    force: bool,
    write: impl FnOnce(&mut dyn Write) -> Result<T, E>,
    verify: impl FnOnce(&Path, &T) -> Result<(), E>,
) -> Result<T, E> {
    let failed = |doing| {
        move |source| AtomicError::Io {
            path: path.to_owned(),
            doing,
            source,
        }
    };
    let exists = || AtomicError::Exists {
        path: path.to_owned(),
    };
    let file_name = path.file_name().ok_or_else(|| AtomicError::NoFileName {
        path: path.to_owned(),
    })?;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let old = fs::symlink_metadata(path).ok();
    if old.is_some() && !force {
        return Err(exists().into());
    }

    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(file_name);
    prefix.push(".");
    // A new file gets the umask's mode, not tempfile's 0600; a replaced one keeps its own.
    let mode = match old.filter(fs::Metadata::is_file) {
        Some(old) => old.permissions().mode() & 0o777,
        None => 0o666,
    };
    point();
    let temp = tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".tmp")
        .permissions(fs::Permissions::from_mode(mode))
        .tempfile_in(dir)
        .map_err(failed("creating a temporary file beside it"))?;

    let mut out = Output {
        inner: BufWriter::with_capacity(BUFFER_BYTES, temp.as_file()),
        error: None,
    };
    let written = write(&mut out).and_then(|value| {
        out.flush().map_err(failed("writing"))?;
        Ok(value)
    });
    if let Some(source) = out.error.take() {
        // drop the buffer without another attempt to write it
        let _ = out.inner.into_parts();
        return Err(failed("writing")(source).into());
    }
    drop(out);
    let value = written?;
    point();
    temp.as_file()
        .sync_all()
        .map_err(failed("syncing to disk"))?;
    verify(temp.path(), &value)?;
    point();

    if force {
        temp.persist(path)
            .map_err(|e| failed("renaming into place")(e.error))?;
    } else {
        // someone may have created the path since the check above
        temp.persist_noclobber(path)
            .map_err(|e| match e.error.kind() {
                io::ErrorKind::AlreadyExists => exists(),
                _ => failed("renaming into place")(e.error),
            })?;
    }
    point();
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("syncing the directory"))?;
    Ok(value)
}

/// Remembers the first error of the disk, whatever the caller's closure turns it into.
struct Output<'a> {
    inner: BufWriter<&'a File>,
    error: Option<io::Error>,
}

impl Output<'_> {
    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(e) = &result
            && e.kind() != io::ErrorKind::Interrupted
            && self.error.is_none()
        {
            self.error = Some(same_error(e));
        }
        result
    }
}

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.inner.write(bytes);
        self.note(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.inner.flush();
        self.note(result)
    }
}

/// A second copy of an error, since `io::Error` is not `Clone`.
pub(crate) fn same_error(e: &io::Error) -> io::Error {
    match e.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::new(e.kind(), e.to_string()),
    }
}
