//! GGUF files in pure Rust: in, a path; out, checked metadata and tensor records, and files
//! written back byte for byte.
//!
//! Layout (all little-endian): `GGUF`, version u32, tensor count u64, metadata count u64, the
//! metadata, the tensor records, zeros up to `general.alignment`, the data section. Format:
//! ggml's `docs/gguf.md`. Unix only: files are read with `pread`.
//!
//! Nothing the file says is trusted before it is checked against the file's size: a tensor that
//! [`Gguf`] lists lies inside the file, apart from every other tensor. Merging reads with
//! [`Gguf::read_tensor`]; [`MappedGguf`] is for fast read-only use.

mod cursor;
mod error;
mod header;
mod mapped;
mod metadata;
mod reader;
mod split;
mod types;
mod value;
mod writer;

pub use error::{GgufError, SourceError};
pub use mapped::MappedGguf;
pub use metadata::{FromValue, Metadata};
pub use reader::{Gguf, TensorReader};
pub use split::{GgufSet, SplitName};
pub use types::{GgmlType, MAX_TENSOR_NAME, TensorInfo};
pub use value::{Array, MAX_ARRAY_DEPTH, RawString, Value, ValueType};
pub use writer::{GgufWriter, Layout};

/// The first four bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version written; 2 is read too.
pub const VERSION: u32 = 3;
/// Alignment of a file without `general.alignment`.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Longest metadata key in bytes.
pub const MAX_KEY_LEN: u64 = 65_535;
/// Largest header read, in bytes: real ones stay below 50 MiB, and this bounds the memory that
/// a sparse hostile file can make the reader take.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;

const KEY_ALIGNMENT: &str = "general.alignment";

/// The alignment that `metadata` sets, if it is sane.
fn alignment_of(path: &std::path::Path, metadata: &Metadata) -> Result<u64, GgufError> {
    match metadata.value(KEY_ALIGNMENT) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(n)) if n.is_power_of_two() && (8..=1 << 20).contains(n) => {
            Ok(u64::from(*n))
        }
        Some(Value::U32(n)) => Err(GgufError::AlignmentValue {
            path: path.to_owned(),
            found: *n,
        }),
        Some(other) => Err(GgufError::AlignmentType {
            path: path.to_owned(),
            found: other.describe(),
        }),
    }
}
