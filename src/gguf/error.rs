//! What can be wrong with a GGUF file, one variant per failure.
//!
//! Every message names the file, the place in it, what was wanted and what was found.

use std::io;
use std::path::PathBuf;

use crate::atomic::AtomicError;
use crate::gguf::GgmlType;

/// An error a tensor's data source may return: any error at all.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Why a GGUF file could not be read or written.
#[allow(missing_docs, reason = "the messages say what each field holds")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    // the file itself
    #[error("{}: {doing} failed", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
    #[error("{}: wanted a regular file, found something else", path.display())]
    NotAFile { path: PathBuf },
    #[error("{}: the file ends inside {what}: wanted {wanted} bytes at byte {offset}, found {left}", path.display())]
    UnexpectedEnd {
        path: PathBuf,
        offset: u64,
        what: String,
        wanted: u64,
        left: u64,
    },
    #[error("{}: {what} at byte {offset} would take the header past {limit} bytes, the most this reader accepts", path.display())]
    HeaderTooLarge {
        path: PathBuf,
        offset: u64,
        what: String,
        limit: u64,
    },
    #[error("{}: wanted {expected} bytes (the end of tensor `{tensor}`), found {actual}: the file is truncated", path.display())]
    Truncated {
        path: PathBuf,
        tensor: String,
        expected: u64,
        actual: u64,
    },
    #[error("{}: the file was {expected} bytes when it was opened and is {actual} bytes now", path.display())]
    FileChanged {
        path: PathBuf,
        expected: u64,
        actual: u64,
    },

    // the fixed header
    #[error("{}: wanted the magic `GGUF` at byte 0, found `{}`", path.display(), found.escape_ascii())]
    BadMagic { path: PathBuf, found: [u8; 4] },
    #[error("{}: the {what} at byte {offset} is byte-swapped: this is a big-endian GGUF file, wanted little-endian", path.display())]
    BigEndian {
        path: PathBuf,
        offset: u64,
        what: &'static str,
    },
    #[error("{}: wanted GGUF version 2 or 3 at byte 4, found {found}", path.display())]
    UnsupportedVersion { path: PathBuf, found: u32 },
    #[error("{}: the tensor count at byte 8 is {found}, but the file has room for at most {max}", path.display())]
    TensorCount { path: PathBuf, found: u64, max: u64 },
    #[error("{}: the metadata count at byte 16 is {found}, but the file has room for at most {max}", path.display())]
    KeyCount { path: PathBuf, found: u64, max: u64 },

    // metadata
    #[error("{}: {what} has a string of {found} bytes at byte {offset}, but {left} bytes are left in the file", path.display())]
    StringLength {
        path: PathBuf,
        what: String,
        offset: u64,
        found: u64,
        left: u64,
    },
    #[error("{}: wanted a key of 1 to 65535 bytes at byte {offset}, found {found} bytes", path.display())]
    KeyLength {
        path: PathBuf,
        offset: u64,
        found: u64,
    },
    #[error("{}: wanted a UTF-8 key without NUL at byte {offset}, found `{}`", path.display(), found.escape_ascii())]
    KeyText {
        path: PathBuf,
        offset: u64,
        found: Vec<u8>,
    },
    #[error("{}: key `{key}` at byte {offset} appears twice", path.display())]
    DuplicateKey {
        path: PathBuf,
        key: String,
        offset: u64,
    },
    #[error("{}: key `{key}`: wanted a value type from 0 to 12 at byte {offset}, found {found}", path.display())]
    ValueType {
        path: PathBuf,
        key: String,
        offset: u64,
        found: u32,
    },
    #[error("{}: key `{key}`: wanted a bool of 0 or 1 at byte {offset}, found {found}", path.display())]
    BoolValue {
        path: PathBuf,
        key: String,
        offset: u64,
        found: u8,
    },
    #[error("{}: key `{key}`: wanted an array element type from 0 to 12 at byte {offset}, found {found}", path.display())]
    ArrayType {
        path: PathBuf,
        key: String,
        offset: u64,
        found: u32,
    },
    #[error("{}: key `{key}`: the array length at byte {offset} is {found}, but the file has room for at most {max}", path.display())]
    ArrayLength {
        path: PathBuf,
        key: String,
        offset: u64,
        found: u64,
        max: u64,
    },
    #[error("{}: key `{key}`: wanted arrays nested at most {max} deep, found deeper ones at byte {offset}", path.display())]
    ArrayDepth {
        path: PathBuf,
        key: String,
        offset: u64,
        max: usize,
    },
    #[error("{}: key `general.alignment`: wanted a u32, found {found}", path.display())]
    AlignmentType { path: PathBuf, found: String },
    #[error("{}: key `general.alignment`: wanted a power of two from 8 to 1048576, found {found}", path.display())]
    AlignmentValue { path: PathBuf, found: u32 },
    #[error("{}: key `{key}`: wanted {wanted}, found no such key", path.display())]
    MissingKey {
        path: PathBuf,
        key: String,
        wanted: &'static str,
    },
    #[error("{}: key `{key}`: wanted {wanted}, found {found}", path.display())]
    WrongType {
        path: PathBuf,
        key: String,
        wanted: &'static str,
        found: String,
    },

    // tensor records
    #[error("{}: wanted a tensor name of 1 to 63 bytes at byte {offset}, found {found} bytes", path.display())]
    TensorNameLength {
        path: PathBuf,
        offset: u64,
        found: u64,
    },
    #[error("{}: wanted a UTF-8 tensor name without NUL at byte {offset}, found `{}`", path.display(), found.escape_ascii())]
    TensorNameText {
        path: PathBuf,
        offset: u64,
        found: Vec<u8>,
    },
    #[error("{}: tensor `{tensor}` appears twice", path.display())]
    DuplicateTensor { path: PathBuf, tensor: String },
    #[error("{}: tensor `{tensor}`: wanted 1 to 4 dimensions, found {found}", path.display())]
    DimCount {
        path: PathBuf,
        tensor: String,
        found: u64,
    },
    #[error("{}: tensor `{tensor}`: wanted dimensions above 0, found ne[{dim}] = 0", path.display())]
    ZeroDim {
        path: PathBuf,
        tensor: String,
        dim: usize,
    },
    #[error("{}: tensor `{tensor}`: wanted a size below 2^63, found shape {ne:?}", path.display())]
    ShapeOverflow {
        path: PathBuf,
        tensor: String,
        ne: Box<[u64; 4]>,
    },
    #[error("{}: tensor `{tensor}`: wanted rows of whole {ty} blocks of {}, found rows of {found}", path.display(), ty.block_len())]
    RowNotBlocks {
        path: PathBuf,
        tensor: String,
        ty: GgmlType,
        found: u64,
    },
    #[error("{}: tensor `{tensor}`: wanted a tensor type known to ggml, found id {found}", path.display())]
    TensorType {
        path: PathBuf,
        tensor: String,
        found: u32,
    },
    #[error("{}: tensor `{tensor}`: wanted an offset that is a multiple of {alignment}, found {found}", path.display())]
    OffsetUnaligned {
        path: PathBuf,
        tensor: String,
        alignment: u64,
        found: u64,
    },
    #[error("{}: tensor `{tensor}`: offset {found} and size {n_bytes} put it outside the data section, which all tensors together fill to {max} bytes", path.display())]
    TensorOutside {
        path: PathBuf,
        tensor: String,
        found: u64,
        n_bytes: u64,
        max: u64,
    },
    #[error("{}: tensor `{tensor}`: wanted an offset of at least {wanted}, where tensor `{other}` ends, found {found}", path.display())]
    TensorsOverlap {
        path: PathBuf,
        tensor: String,
        other: String,
        wanted: u64,
        found: u64,
    },

    // tensor data
    #[error("{}: wanted tensor `{tensor}`, found no such tensor", path.display())]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{}: tensor `{tensor}`: wanted {wanted} bytes from byte {start} of its data, found {n_bytes} bytes in all", path.display())]
    TensorRange {
        path: PathBuf,
        tensor: String,
        start: u64,
        wanted: u64,
        n_bytes: u64,
    },
    #[error("{}: tensor `{tensor}`: wanted {wanted} bytes of memory, found less", path.display())]
    OutOfMemory {
        path: PathBuf,
        tensor: String,
        wanted: u64,
    },
    #[error("{}: tensor `{tensor}`: wanted {wanted} bytes of data from its source, found {}{found}", path.display(), if found > wanted { "at least " } else { "" })]
    TensorData {
        path: PathBuf,
        tensor: String,
        wanted: u64,
        found: u64,
    },
    #[error("{}: tensor `{tensor}`: its data source failed", path.display())]
    TensorSource {
        path: PathBuf,
        tensor: String,
        source: SourceError,
    },

    // split files
    #[error("{}: key `split.count` says {count} parts: wanted a file name ending in `-NNNNN-of-{count:05}.gguf`", path.display())]
    SplitName { path: PathBuf, count: u32 },
    #[error("{}: wanted part {no} of {count} here, found no such file", path.display())]
    SplitPartMissing { path: PathBuf, no: u32, count: u32 },
    #[error("{}: key `{key}`: wanted {wanted} to agree with {with}, found {found}", path.display())]
    SplitMismatch {
        path: PathBuf,
        key: &'static str,
        wanted: String,
        with: &'static str,
        found: String,
    },

    /// The file could not be put in place.
    #[error(transparent)]
    Atomic(#[from] AtomicError),
}
