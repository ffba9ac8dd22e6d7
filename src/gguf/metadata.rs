//! The ordered key/value list of a GGUF file and typed access to it.

use std::path::{Path, PathBuf};

use crate::gguf::{Array, GgufError, RawString, Value};

/// Keys and values in file order.
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Value)>,
}

impl Default for Metadata {
    fn default() -> Self {
        Self::new()
    }
}

/// Equal when the entries are; where they came from does not count.
impl PartialEq for Metadata {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// An empty list.
    pub fn new() -> Self {
        Self {
            path: "<memory>".into(),
            entries: Vec::new(),
        }
    }

    /// Entries read from `path`, which errors name.
    pub(crate) fn from_file(path: &Path, entries: Vec<(String, Value)>) -> Self {
        Self {
            path: path.to_owned(),
            entries,
        }
    }

    /// The value of `key` as a `T`. Integers convert between widths, floats between f32 and f64,
    /// when nothing is lost.
    ///
    /// # Errors
    /// [`GgufError::MissingKey`], or [`GgufError::WrongType`] with what was wanted and found.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.get_opt(key)?.ok_or_else(|| GgufError::MissingKey {
            path: self.path.clone(),
            key: key.to_owned(),
            wanted: T::WANTED,
        })
    }

    /// As [`get`](Self::get), but an absent key is `None`.
    ///
    /// # Errors
    /// [`GgufError::WrongType`].
    pub fn get_opt<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match T::from_value(value) {
            Some(t) => Ok(Some(t)),
            None => Err(GgufError::WrongType {
                path: self.path.clone(),
                key: key.to_owned(),
                wanted: T::WANTED,
                found: value.describe(),
            }),
        }
    }

    /// The value of `key` as it is.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.iter().find(|(k, _)| *k == key).map(|(_, v)| v)
    }

    /// Replaces `key`'s value where it stands and returns the old one, or appends the key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> Option<Value> {
        let value = value.into();
        match self.entries.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => Some(std::mem::replace(old, value)),
            None => {
                self.entries.push((key.to_owned(), value));
                None
            }
        }
    }

    /// Takes `key` out; the others keep their order.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.entries.iter().position(|(k, _)| k == key)?;
        Some(self.entries.remove(at).1)
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// A Rust type that a metadata value may be read as.
pub trait FromValue<'a>: Sized {
    /// What an error message says was wanted.
    const WANTED: &'static str;
    /// The value as this type, if that loses nothing.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! integers {
    ($($t:ty => $one:literal, $many:literal;)*) => {$(
        impl FromValue<'_> for $t {
            const WANTED: &'static str = $one;
            fn from_value(value: &Value) -> Option<Self> {
                value.integer()?.try_into().ok()
            }
        }
        impl FromValue<'_> for Vec<$t> {
            const WANTED: &'static str = $many;
            fn from_value(value: &Value) -> Option<Self> {
                let Value::Array(a) = value else { return None };
                a.integers()?.into_iter().map(|n| n.try_into().ok()).collect()
            }
        }
    )*};
}

integers! {
    u8 => "u8", "an array of u8";
    i8 => "i8", "an array of i8";
    u16 => "u16", "an array of u16";
    i16 => "i16", "an array of i16";
    u32 => "u32", "an array of u32";
    i32 => "i32", "an array of i32";
    u64 => "u64", "an array of u64";
    i64 => "i64", "an array of i64";
}

/// `x` as f32 if that is the same number (any NaN counts as one).
fn narrow(x: f64) -> Option<f32> {
    let y = x as f32;
    (f64::from(y) == x || x.is_nan()).then_some(y)
}

/// A type read by matching variants: `type, "wanted": pattern => Option<type>`.
macro_rules! by_pattern {
    ($($t:ty, $wanted:literal: $($p:pat => $e:expr),+;)*) => {$(
        impl<'a> FromValue<'a> for $t {
            const WANTED: &'static str = $wanted;
            fn from_value(value: &'a Value) -> Option<Self> {
                match value {
                    $($p => $e,)+
                    _ => None,
                }
            }
        }
    )*};
}

by_pattern! {
    f32, "f32": Value::F32(x) => Some(*x), Value::F64(x) => narrow(*x);
    f64, "f64": Value::F64(x) => Some(*x), Value::F32(x) => Some(f64::from(*x));
    bool, "bool": Value::Bool(b) => Some(*b);
    &'a str, "a UTF-8 string": Value::String(s) => s.as_str().ok();
    String, "a UTF-8 string": Value::String(s) => s.as_str().ok().map(str::to_owned);
    &'a RawString, "a string": Value::String(s) => Some(s);
    &'a Array, "an array": Value::Array(a) => Some(a);
    Vec<f32>, "an array of f32":
        Value::Array(Array::F32(v)) => Some(v.clone()),
        Value::Array(Array::F64(v)) => v.iter().map(|&x| narrow(x)).collect();
    Vec<f64>, "an array of f64":
        Value::Array(Array::F64(v)) => Some(v.clone()),
        Value::Array(Array::F32(v)) => Some(v.iter().map(|&x| x.into()).collect());
    Vec<&'a str>, "an array of UTF-8 strings":
        Value::Array(Array::String(v)) => v.iter().map(|s| s.as_str().ok()).collect();
    Vec<String>, "an array of UTF-8 strings":
        Value::Array(Array::String(v)) => v.iter().map(|s| s.as_str().ok().map(str::to_owned)).collect();
    &'a [RawString], "an array of strings": Value::Array(Array::String(v)) => Some(v);
    &'a [bool], "an array of bool": Value::Array(Array::Bool(v)) => Some(v);
    &'a [u8], "an array of exactly u8": Value::Array(Array::U8(v)) => Some(v);
    &'a [i8], "an array of exactly i8": Value::Array(Array::I8(v)) => Some(v);
    &'a [u16], "an array of exactly u16": Value::Array(Array::U16(v)) => Some(v);
    &'a [i16], "an array of exactly i16": Value::Array(Array::I16(v)) => Some(v);
    &'a [u32], "an array of exactly u32": Value::Array(Array::U32(v)) => Some(v);
    &'a [i32], "an array of exactly i32": Value::Array(Array::I32(v)) => Some(v);
    &'a [u64], "an array of exactly u64": Value::Array(Array::U64(v)) => Some(v);
    &'a [i64], "an array of exactly i64": Value::Array(Array::I64(v)) => Some(v);
    &'a [f32], "an array of exactly f32": Value::Array(Array::F32(v)) => Some(v);
    &'a [f64], "an array of exactly f64": Value::Array(Array::F64(v)) => Some(v);
}

impl<'a> FromValue<'a> for &'a Value {
    const WANTED: &'static str = "a value";
    fn from_value(value: &'a Value) -> Option<Self> {
        Some(value)
    }
}
