//! GGUF metadata values: the 13 types of the format, held without loss.

use std::fmt;
use std::str::Utf8Error;

/// Deepest nesting of arrays read or written. llama.cpp itself refuses nested arrays.
pub const MAX_ARRAY_DEPTH: usize = 4;

/// The type tag of a metadata value; the discriminant is the id in the file.
#[allow(missing_docs, reason = "the names are the types")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const BY_ID: [ValueType; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The type with this id, if there is one.
    pub fn from_u32(id: u32) -> Option<Self> {
        Self::BY_ID.get(id as usize).copied()
    }

    /// The id in the file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// Name, such as `u32`.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }

    /// Fewest bytes a value of this type takes in a file.
    pub(crate) fn min_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12, // element type and length
        }
    }
}

/// String bytes as the file holds them. Real tokenizers have tokens that are not UTF-8.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RawString(pub Vec<u8>);

impl RawString {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The text, if the bytes are UTF-8.
    pub fn as_str(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(&self.0)
    }
}

impl From<&str> for RawString {
    fn from(s: &str) -> Self {
        Self(s.as_bytes().to_vec())
    }
}

impl From<String> for RawString {
    fn from(s: String) -> Self {
        Self(s.into_bytes())
    }
}

impl From<Vec<u8>> for RawString {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for RawString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Display for RawString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// One metadata value.
#[allow(missing_docs, reason = "the variants are the types")]
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(RawString),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array value: its elements share one type. A nested array's rows may differ in type.
#[allow(missing_docs, reason = "the variants are the element types")]
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<RawString>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Runs one expression for whichever variant `$on` is; both enums have the same variant names.
macro_rules! each_variant {
    ($enum:ident, $on:expr, $v:ident, $ty:ident => $e:expr) => {
        each_variant!(@ $enum, $on, $v, $ty => $e;
            U8 I8 U16 I16 U32 I32 F32 Bool String Array U64 I64 F64)
    };
    (@ $enum:ident, $on:expr, $v:ident, $ty:ident => $e:expr; $($name:ident)*) => {
        match $on {
            $($enum::$name($v) => { let $ty = ValueType::$name; let _ = (&$v, $ty); $e })*
        }
    };
}

impl Value {
    /// The type tag.
    pub fn value_type(&self) -> ValueType {
        each_variant!(Value, self, v, ty => ty)
    }

    /// The value if it is an integer of any width.
    pub fn integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(n) => n.into(),
            Self::I8(n) => n.into(),
            Self::U16(n) => n.into(),
            Self::I16(n) => n.into(),
            Self::U32(n) => n.into(),
            Self::I32(n) => n.into(),
            Self::U64(n) => n.into(),
            Self::I64(n) => n.into(),
            _ => return None,
        })
    }

    /// What an error message says was found.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Array(a) => format!("an array of {} {}", a.len(), a.element_type().name()),
            Self::String(s) if s.as_str().is_err() => "a string that is not UTF-8".to_owned(),
            Self::F32(x) => format!("f32 {x}"),
            Self::F64(x) => format!("f64 {x}"),
            other => match other.integer() {
                Some(n) => format!("{} {n}", other.value_type().name()),
                None => other.value_type().name().to_owned(),
            },
        }
    }
}

impl Array {
    /// The type tag of the elements.
    pub fn element_type(&self) -> ValueType {
        each_variant!(Array, self, v, ty => ty)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        each_variant!(Array, self, v, ty => v.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements if they are integers of any width.
    pub fn integers(&self) -> Option<Vec<i128>> {
        fn widen<T: Copy + Into<i128>>(v: &[T]) -> Option<Vec<i128>> {
            Some(v.iter().map(|&n| n.into()).collect())
        }
        match self {
            Self::U8(v) => widen(v),
            Self::I8(v) => widen(v),
            Self::U16(v) => widen(v),
            Self::I16(v) => widen(v),
            Self::U32(v) => widen(v),
            Self::I32(v) => widen(v),
            Self::U64(v) => widen(v),
            Self::I64(v) => widen(v),
            _ => None,
        }
    }
}

macro_rules! from_scalars {
    ($($t:ty => $v:ident;)*) => {$(
        impl From<$t> for Value {
            fn from(v: $t) -> Self {
                Self::$v(v.into())
            }
        }
        impl From<Vec<$t>> for Value {
            fn from(v: Vec<$t>) -> Self {
                Self::Array(Array::$v(v.into_iter().map(Into::into).collect()))
            }
        }
    )*};
}

from_scalars! {
    u8 => U8;
    i8 => I8;
    u16 => U16;
    i16 => I16;
    u32 => U32;
    i32 => I32;
    f32 => F32;
    bool => Bool;
    u64 => U64;
    i64 => I64;
    f64 => F64;
    &str => String;
    String => String;
    RawString => String;
    Array => Array;
}
