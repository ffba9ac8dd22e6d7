//! ggml's own decoders and reference encoders, on slices.

use super::decode::Decoder;
use ggml_sys::ggml_type;
use thiserror::Error;

/// Why a run of weights could not be decoded or encoded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QuantError {
    /// The type number is unknown to ggml or has no decoder or encoder.
    #[error("tensor type {ty} cannot be {action}")]
    Unsupported {
        /// ggml's type number.
        ty: u32,
        /// "decoded" or "encoded".
        action: &'static str,
    },
    /// A slice has another length than the type and the row ask for.
    #[error("wanted {wanted} {what}, found {found}")]
    Length {
        /// What is counted.
        what: &'static str,
        /// As the type and row length ask.
        wanted: usize,
        /// As given.
        found: usize,
    },
}

/// Bytes of `n` elements of `ty`, or `None` when `n` is not a multiple of its block.
fn row_bytes(ty: ggml_type, n: usize) -> Option<usize> {
    if ty >= ggml_sys::llama::GGML_TYPE_COUNT {
        return None;
    }
    // SAFETY: the type number is in range.
    let (block, size) = unsafe {
        (
            usize::try_from(ggml_sys::ggml_blck_size(ty)).ok()?,
            ggml_sys::ggml_type_size(ty),
        )
    };
    (block > 0 && n.is_multiple_of(block)).then(|| n / block * size)
}

/// Decode `bytes` of type `ty` into `out` (as many elements as `out` holds).
///
/// # Errors
/// An unknown type, or a byte count other than `out.len()` elements take.
pub fn dequantize(ty: u32, bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    let Some((decoder, wanted)) =
        Decoder::of(ty).and_then(|d| d.bytes(out.len()).map(|wanted| (d, wanted)))
    else {
        return Err(QuantError::Unsupported {
            ty,
            action: "decoded",
        });
    };
    if bytes.len() != wanted {
        return Err(QuantError::Length {
            what: "bytes",
            wanted,
            found: bytes.len(),
        });
    }
    decoder.decode(bytes, out);
    Ok(())
}

/// What ggml makes of activations only: it has a row encoder, but `ggml_quantize_chunk` ends the
/// process when asked for it.
const Q8_1: ggml_type = 9;

/// Whether [`quantize`] can write `ty` without an imatrix.
pub fn can_encode(ty: u32) -> bool {
    if ty == ggml_sys::GGML_TYPE_F32 {
        return true;
    }
    if ty == Q8_1 {
        return false;
    }
    // SAFETY: `row_bytes` answers for known type numbers only; the table is static.
    row_bytes(ty, 256).is_some()
        && unsafe {
            !ggml_sys::ggml_quantize_requires_imatrix(ty)
                && (*ggml_sys::ggml_get_type_traits(ty))
                    .from_float_ref
                    .is_some()
        }
}

/// Encode rows of `n_per_row` floats as `ty` with ggml's reference encoder.
/// `imatrix`: one weight per column, or none.
///
/// # Errors
/// A type without encoder (or one that needs an imatrix and got none), a row that is not
/// a multiple of the block, or a length that is not whole rows.
pub fn quantize(
    ty: u32,
    rows: &[f32],
    n_per_row: usize,
    imatrix: Option<&[f32]>,
) -> Result<Vec<u8>, QuantError> {
    let unsupported = QuantError::Unsupported {
        ty,
        action: "encoded",
    };
    let Some(per_row) = row_bytes(ty, n_per_row) else {
        return Err(unsupported);
    };
    if n_per_row == 0 || !rows.len().is_multiple_of(n_per_row) {
        return Err(QuantError::Length {
            what: "elements (whole rows)",
            wanted: n_per_row,
            found: rows.len(),
        });
    }
    if let Some(w) = imatrix
        && w.len() != n_per_row
    {
        return Err(QuantError::Length {
            what: "imatrix weights",
            wanted: n_per_row,
            found: w.len(),
        });
    }
    if ty == ggml_sys::GGML_TYPE_F32 {
        return Ok(bytemuck::cast_slice(rows).to_vec());
    }
    // SAFETY: the type number is in range (row_bytes).
    let (needs, has) = unsafe {
        (
            ggml_sys::ggml_quantize_requires_imatrix(ty),
            (*ggml_sys::ggml_get_type_traits(ty))
                .from_float_ref
                .is_some(),
        )
    };
    if !has || ty == Q8_1 || (needs && imatrix.is_none()) {
        return Err(unsupported);
    }
    let n_rows = rows.len() / n_per_row;
    let mut out = vec![0u8; per_row * n_rows];
    let weights = imatrix.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: `out` holds n_rows encoded rows, `rows` n_rows·n_per_row floats, and
    // n_per_row is a multiple of the block; weights are null or n_per_row long.
    unsafe {
        ggml_sys::ggml_quantize_chunk(
            ty,
            rows.as_ptr(),
            out.as_mut_ptr().cast(),
            0,
            n_rows as i64,
            n_per_row as i64,
            weights,
        );
    }
    Ok(out)
}
