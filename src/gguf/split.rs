//! Models split over several files, as `llama-gguf-split` writes them: `NAME-00001-of-0000N.gguf`
//! with the keys `split.no` (from 0), `split.count` and `split.tensors.count`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::gguf::{Gguf, GgufError, Metadata, TensorInfo};

const KEY_NO: &str = "split.no";
const KEY_COUNT: &str = "split.count";
const KEY_TENSORS: &str = "split.tensors.count";
const KEY_ARCHITECTURE: &str = "general.architecture";

/// What the file name of one part says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitName {
    /// Directory and file name up to the `-00001-of-0000N.gguf`.
    pub prefix: PathBuf,
    /// Part number, from 0.
    pub no: u32,
    /// Number of parts.
    pub count: u32,
}

impl SplitName {
    /// Reads `PREFIX-NNNNN-of-NNNNN.gguf`; `None` for any other name and for no part 1..=count.
    pub fn parse(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        let number = |s: &str| {
            let five_digits = s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
            five_digits.then(|| s.parse::<u32>().ok()).flatten()
        };
        let (no, count) = (number(no)?, number(count)?);
        if prefix.is_empty() || no == 0 || no > count {
            return None;
        }
        Some(Self {
            prefix: path.with_file_name(prefix),
            no: no - 1,
            count,
        })
    }

    /// The path of part `no` (from 0) of the same model.
    pub fn path_of(&self, no: u32) -> PathBuf {
        let mut path = self.prefix.clone().into_os_string();
        path.push(format!("-{:05}-of-{:05}.gguf", no + 1, self.count));
        path.into()
    }
}

/// A model in one file or in all its parts, checked against each other.
#[derive(Debug)]
pub struct GgufSet {
    parts: Vec<Gguf>,
    by_name: HashMap<String, usize>,
}

impl GgufSet {
    /// Opens a single file or, given any part of a split model, all parts.
    ///
    /// # Errors
    /// As [`Gguf::open`] for each part; [`GgufError::SplitName`], [`GgufError::SplitPartMissing`],
    /// [`GgufError::SplitMismatch`], [`GgufError::DuplicateTensor`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let given = Gguf::open(path)?;
        let count = given.metadata().get_opt::<u16>(KEY_COUNT)?.unwrap_or(1);
        let parts = match SplitName::parse(path) {
            Some(name) if name.count > 1 || count > 1 => open_parts(given, &name)?,
            None if count > 1 => {
                return Err(GgufError::SplitName {
                    path: path.to_owned(),
                    count: count.into(),
                });
            }
            _ => vec![given],
        };
        let mut by_name = HashMap::new();
        for (i, part) in parts.iter().enumerate() {
            for t in part.tensors() {
                if by_name.insert(t.name.clone(), i).is_some() {
                    return Err(GgufError::DuplicateTensor {
                        path: part.path().to_owned(),
                        tensor: t.name.clone(),
                    });
                }
            }
        }
        Ok(Self { parts, by_name })
    }

    /// The files in order; at least one.
    pub fn parts(&self) -> &[Gguf] {
        &self.parts
    }

    /// The metadata of the model, which the first part holds.
    pub fn metadata(&self) -> &Metadata {
        self.parts[0].metadata()
    }

    /// Every tensor with its part, in order.
    pub fn tensors(&self) -> impl Iterator<Item = (&Gguf, &TensorInfo)> {
        self.parts
            .iter()
            .flat_map(|part| part.tensors().iter().map(move |t| (part, t)))
    }

    /// The tensor called `name` and the part it is in.
    pub fn tensor(&self, name: &str) -> Option<(&Gguf, &TensorInfo)> {
        let part = &self.parts[*self.by_name.get(name)?];
        part.tensor(name).map(|t| (part, t))
    }

    /// All data bytes of the tensor called `name`.
    ///
    /// # Errors
    /// As [`Gguf::read_tensor`].
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>, GgufError> {
        let part = self.tensor(name).map_or(&self.parts[0], |(part, _)| part);
        part.read_tensor(name)
    }
}

/// Opens the parts beside `given`, each checked before the next is opened.
fn open_parts(given: Gguf, name: &SplitName) -> Result<Vec<Gguf>, GgufError> {
    check_numbers(&given, name.no, name.count)?;
    let mut given = Some(given);
    let mut parts = Vec::new();
    for no in 0..name.count {
        let part = match given.take_if(|_| no == name.no) {
            Some(part) => part,
            None => open_part(name, no)?,
        };
        check_numbers(&part, no, name.count)?;
        parts.push(part);
    }
    check_whole(&parts)?;
    Ok(parts)
}

fn open_part(name: &SplitName, no: u32) -> Result<Gguf, GgufError> {
    let path = name.path_of(no);
    Gguf::open(&path).map_err(|e| match e {
        GgufError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            GgufError::SplitPartMissing {
                path,
                no: no + 1,
                count: name.count,
            }
        }
        other => other,
    })
}

fn mismatch(
    part: &Gguf,
    key: &'static str,
    wanted: impl ToString,
    with: &'static str,
    found: impl ToString,
) -> GgufError {
    GgufError::SplitMismatch {
        path: part.path().to_owned(),
        key,
        wanted: wanted.to_string(),
        with,
        found: found.to_string(),
    }
}

/// `split.no` and `split.count` agree with the file name.
fn check_numbers(part: &Gguf, no: u32, count: u32) -> Result<(), GgufError> {
    for (key, wanted) in [(KEY_COUNT, count), (KEY_NO, no)] {
        let found = part.metadata().get::<u16>(key)?;
        if u32::from(found) != wanted {
            return Err(mismatch(part, key, wanted, "the file name", found));
        }
    }
    Ok(())
}

/// The parts hold as many tensors as they say, and are of one architecture.
fn check_whole(parts: &[Gguf]) -> Result<(), GgufError> {
    let n_tensors: u64 = parts.iter().map(|part| part.tensors().len() as u64).sum();
    // the first part must have the count, later ones may
    parts[0].metadata().get::<u64>(KEY_TENSORS)?;
    let first: Option<&str> = parts[0].metadata().get_opt(KEY_ARCHITECTURE)?;
    for part in parts {
        let all = "the tensors in all parts";
        match part.metadata().get_opt::<u64>(KEY_TENSORS)? {
            Some(n) if n != n_tensors => {
                return Err(mismatch(part, KEY_TENSORS, n_tensors, all, n));
            }
            _ => {}
        }
        match part.metadata().get_opt::<&str>(KEY_ARCHITECTURE)? {
            Some(own) if Some(own) != first => {
                let wanted = first.unwrap_or("none");
                let with = "the first part";
                return Err(mismatch(part, KEY_ARCHITECTURE, wanted, with, own));
            }
            _ => {}
        }
    }
    Ok(())
}
