//! The tensor types of ggml 0.26 and what a tensor record says about one tensor.
//!
//! Ids and names follow `enum ggml_type` in `ggml.h` and `type_traits` in `ggml.c`; block sizes
//! follow the structs in `ggml-common.h`. `tests/gguf/block_sizes.c` prints the sizes the C
//! compiler gives those structs, and a test compares them with this table.

use std::fmt;
use std::path::Path;

use crate::gguf::GgufError;

/// Longest tensor name in bytes that llama.cpp loads (`GGML_MAX_NAME` less its final NUL).
pub const MAX_TENSOR_NAME: u64 = 63;

macro_rules! ggml_types {
    ($($variant:ident = $id:literal, $name:literal, $len:literal, $bytes:literal;)*) => {
        /// A tensor's element encoding. Removed ids (4, 5, 31..=33, 36..=38) have no variant.
        #[allow(non_camel_case_types, reason = "spelled as in ggml")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        #[repr(u32)]
        pub enum GgmlType {
            $(#[doc = concat!("`", $name, "`: blocks of ", $len, " in ", $bytes, " bytes.")] $variant = $id,)*
        }

        impl GgmlType {
            /// Every type, by rising id.
            pub const ALL: &[GgmlType] = &[$(GgmlType::$variant,)*];

            /// The type with this id in a GGUF tensor record, if ggml still has one.
            pub fn from_u32(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// llama.cpp's spelling, such as `q4_K`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Elements in one block (1 for unquantised types).
            pub fn block_len(self) -> u64 {
                match self { $(Self::$variant => $len,)* }
            }

            /// Bytes in one block.
            pub fn block_bytes(self) -> u64 {
                match self { $(Self::$variant => $bytes,)* }
            }
        }
    };
}

ggml_types! {
    F32 = 0, "f32", 1, 4;
    F16 = 1, "f16", 1, 2;
    Q4_0 = 2, "q4_0", 32, 18;
    Q4_1 = 3, "q4_1", 32, 20;
    Q5_0 = 6, "q5_0", 32, 22;
    Q5_1 = 7, "q5_1", 32, 24;
    Q8_0 = 8, "q8_0", 32, 34;
    Q8_1 = 9, "q8_1", 32, 36;
    Q2_K = 10, "q2_K", 256, 84;
    Q3_K = 11, "q3_K", 256, 110;
    Q4_K = 12, "q4_K", 256, 144;
    Q5_K = 13, "q5_K", 256, 176;
    Q6_K = 14, "q6_K", 256, 210;
    Q8_K = 15, "q8_K", 256, 292;
    IQ2_XXS = 16, "iq2_xxs", 256, 66;
    IQ2_XS = 17, "iq2_xs", 256, 74;
    IQ3_XXS = 18, "iq3_xxs", 256, 98;
    IQ1_S = 19, "iq1_s", 256, 50;
    IQ4_NL = 20, "iq4_nl", 32, 18;
    IQ3_S = 21, "iq3_s", 256, 110;
    IQ2_S = 22, "iq2_s", 256, 82;
    IQ4_XS = 23, "iq4_xs", 256, 136;
    I8 = 24, "i8", 1, 1;
    I16 = 25, "i16", 1, 2;
    I32 = 26, "i32", 1, 4;
    I64 = 27, "i64", 1, 8;
    F64 = 28, "f64", 1, 8;
    IQ1_M = 29, "iq1_m", 256, 56;
    BF16 = 30, "bf16", 1, 2;
    TQ1_0 = 34, "tq1_0", 256, 54;
    TQ2_0 = 35, "tq2_0", 256, 66;
    MXFP4 = 39, "mxfp4", 32, 17;
    NVFP4 = 40, "nvfp4", 64, 36;
    Q1_0 = 41, "q1_0", 128, 18;
    Q2_0 = 42, "q2_0", 64, 18;
}

impl GgmlType {
    /// The id stored in a GGUF tensor record.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The type whose name this is, in either case (`q4_K` and `Q4_K` are one type).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|ty| ty.name().eq_ignore_ascii_case(name))
    }

    /// The spelling file names use, such as `Q4_K`.
    pub fn file_name(self) -> String {
        self.name().to_ascii_uppercase()
    }

    /// Whether blocks hold more than one element.
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes in a row of `ne0` elements; `None` if that is no whole number of blocks or overflows.
    pub fn row_bytes(self, ne0: u64) -> Option<u64> {
        if !ne0.is_multiple_of(self.block_len()) {
            return None;
        }
        (ne0 / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One tensor record, already checked: the sizes below never overflow and lie inside the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Dimensions the file declares, 1 to 4.
    pub n_dims: u32,
    /// Shape in ggml order (`ne[0]` is the row length); 1 past `n_dims`.
    pub ne: [u64; 4],
    /// Element encoding.
    pub ty: GgmlType,
    /// Start in bytes from the data section's start.
    pub offset: u64,
    /// Data size in bytes, without padding.
    pub n_bytes: u64,
}

impl TensorInfo {
    /// Elements in the tensor.
    pub fn n_elements(&self) -> u64 {
        self.ne.iter().product()
    }

    /// Rows of `ne[0]` elements.
    pub fn n_rows(&self) -> u64 {
        self.ne[1..].iter().product()
    }

    /// Bytes in one row.
    pub fn row_bytes(&self) -> u64 {
        self.n_bytes / self.n_rows()
    }

    /// The dimensions the file declares.
    pub fn dims(&self) -> &[u64] {
        &self.ne[..self.n_dims as usize]
    }

    /// Start in bytes from the file's start, given where the data section starts.
    pub fn absolute_offset(&self, data_offset: u64) -> u64 {
        data_offset + self.offset
    }

    /// First byte after the data, from the data section's start.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.n_bytes
    }
}

/// Checks name and shape and works out `ne` and the size in bytes: all that reader and writer
/// must agree on. `offset` is left at 0.
pub(crate) fn checked_tensor(
    path: &Path,
    name: &str,
    dims: &[u64],
    ty: GgmlType,
) -> Result<TensorInfo, GgufError> {
    let tensor = || name.to_owned();
    let path = || path.to_owned();
    if dims.is_empty() || dims.len() > 4 {
        return Err(GgufError::DimCount {
            path: path(),
            tensor: tensor(),
            found: dims.len() as u64,
        });
    }
    if let Some(dim) = dims.iter().position(|&n| n == 0) {
        return Err(GgufError::ZeroDim {
            path: path(),
            tensor: tensor(),
            dim,
        });
    }
    let mut ne = [1; 4];
    ne[..dims.len()].copy_from_slice(dims);
    let too_big = || GgufError::ShapeOverflow {
        path: path(),
        tensor: tensor(),
        ne: Box::new(ne),
    };
    // ggml counts elements and bytes in int64_t
    let fits = |n: &u64| *n <= i64::MAX as u64;
    ne.iter()
        .try_fold(1u64, |n, &dim| n.checked_mul(dim))
        .filter(fits)
        .ok_or_else(too_big)?;
    if !ne[0].is_multiple_of(ty.block_len()) {
        return Err(GgufError::RowNotBlocks {
            path: path(),
            tensor: tensor(),
            ty,
            found: ne[0],
        });
    }
    let n_bytes = ty
        .row_bytes(ne[0])
        .and_then(|row| row.checked_mul(ne[1..].iter().product()))
        .filter(fits)
        .ok_or_else(too_big)?;
    Ok(TensorInfo {
        name: tensor(),
        n_dims: dims.len() as u32,
        ne,
        ty,
        offset: 0,
        n_bytes,
    })
}

/// Rounds up to a multiple of `alignment` (a power of two).
pub(crate) fn pad(n: u64, alignment: u64) -> Option<u64> {
    Some(n.checked_add(alignment - 1)? & !(alignment - 1))
}
