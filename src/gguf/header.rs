//! The fields of a GGUF header in file order, each checked as it is read.

use std::collections::{HashMap, HashSet};
use std::io::Read;
use std::path::Path;

use crate::gguf::cursor::{Cursor, text};
use crate::gguf::types::{checked_tensor, pad};
use crate::gguf::{GgmlType, GgufError, MAGIC, MAX_TENSOR_NAME, Metadata, TensorInfo, VERSION};

/// Fewest bytes of a tensor record: name length, 1 name byte, n_dims, 1 dim, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;
/// Fewest bytes of a metadata entry: key length, 1 key byte, type, 1 value byte.
const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;

/// Magic, version and the two counts: (version, tensors, metadata entries).
pub(crate) fn read_fixed<R: Read>(
    cursor: &mut Cursor<'_, R>,
) -> Result<(u32, u64, u64), GgufError> {
    let path = cursor.path;
    let big_endian = |what, offset| GgufError::BigEndian {
        path: path.to_owned(),
        offset,
        what,
    };
    let magic: [u8; 4] = cursor.array()?;
    if magic != MAGIC {
        let mut swapped = magic;
        swapped.reverse();
        if swapped == MAGIC {
            return Err(big_endian("magic", 0));
        }
        return Err(GgufError::BadMagic {
            path: path.to_owned(),
            found: magic,
        });
    }
    let version = cursor.u32()?;
    if !(2..=VERSION).contains(&version) {
        if (1..=VERSION).contains(&version.swap_bytes()) {
            return Err(big_endian("version", 4));
        }
        return Err(GgufError::UnsupportedVersion {
            path: path.to_owned(),
            found: version,
        });
    }
    let n_tensors = cursor.u64()?;
    let max = cursor.left() / MIN_TENSOR_BYTES;
    if n_tensors > max {
        return Err(GgufError::TensorCount {
            path: path.to_owned(),
            found: n_tensors,
            max,
        });
    }
    let n_entries = cursor.u64()?;
    let max = cursor.left().saturating_sub(n_tensors * MIN_TENSOR_BYTES) / MIN_ENTRY_BYTES;
    if n_entries > max {
        return Err(GgufError::KeyCount {
            path: path.to_owned(),
            found: n_entries,
            max,
        });
    }
    Ok((version, n_tensors, n_entries))
}

pub(crate) fn read_metadata<R: Read>(
    cursor: &mut Cursor<'_, R>,
    n: u64,
) -> Result<Metadata, GgufError> {
    let mut entries = Vec::new();
    let mut seen = HashSet::new();
    for i in 0..n {
        cursor.what = format!("metadata key {i} of {n}");
        let offset = cursor.pos;
        let key = cursor.key()?;
        if !seen.insert(key.clone()) {
            return Err(GgufError::DuplicateKey {
                path: cursor.path.to_owned(),
                key,
                offset,
            });
        }
        cursor.what = format!("the value of key `{key}`");
        let value = cursor.value(&key)?;
        entries.push((key, value));
    }
    Ok(Metadata::from_file(cursor.path, entries))
}

/// Records in file order, and the index of each name.
pub(crate) type Records = (Vec<TensorInfo>, HashMap<String, usize>);

pub(crate) fn read_records<R: Read>(
    cursor: &mut Cursor<'_, R>,
    n: u64,
    alignment: u64,
) -> Result<Records, GgufError> {
    let path = cursor.path;
    let mut tensors: Vec<TensorInfo> = Vec::new();
    let mut by_name = HashMap::new();
    for i in 0..n {
        cursor.what = format!("tensor record {i} of {n}");
        let offset = cursor.pos;
        let len = cursor.u64()?;
        check_name_len(path, offset, len)?;
        let bytes = cursor.bytes(len)?;
        let tensor = text(bytes).map_err(|found| GgufError::TensorNameText {
            path: path.to_owned(),
            offset,
            found,
        })?;
        if by_name.insert(tensor.clone(), tensors.len()).is_some() {
            return Err(GgufError::DuplicateTensor {
                path: path.to_owned(),
                tensor,
            });
        }
        cursor.what = format!("the record of tensor `{tensor}`");
        let n_dims = cursor.u32()?;
        if !(1..=4).contains(&n_dims) {
            return Err(GgufError::DimCount {
                path: path.to_owned(),
                tensor,
                found: n_dims.into(),
            });
        }
        let mut ne = [1; 4];
        for dim in &mut ne[..n_dims as usize] {
            *dim = cursor.u64()?;
        }
        let id = cursor.u32()?;
        let ty = GgmlType::from_u32(id).ok_or_else(|| GgufError::TensorType {
            path: path.to_owned(),
            tensor: tensor.clone(),
            found: id,
        })?;
        let mut info = checked_tensor(path, &tensor, &ne[..n_dims as usize], ty)?;
        info.offset = cursor.u64()?;
        if !info.offset.is_multiple_of(alignment) {
            return Err(GgufError::OffsetUnaligned {
                path: path.to_owned(),
                tensor,
                alignment,
                found: info.offset,
            });
        }
        tensors.push(info);
    }
    Ok((tensors, by_name))
}

pub(crate) fn check_name_len(path: &Path, offset: u64, found: u64) -> Result<(), GgufError> {
    if (1..=MAX_TENSOR_NAME).contains(&found) {
        return Ok(());
    }
    Err(GgufError::TensorNameLength {
        path: path.to_owned(),
        offset,
        found,
    })
}

/// No tensor overlaps another, and the file is long enough for all of them.
pub(crate) fn check_layout(
    path: &Path,
    tensors: &[TensorInfo],
    alignment: u64,
    data_offset: u64,
    file_len: u64,
) -> Result<(), GgufError> {
    // what the tensors take when laid end to end: an offset past that, and past the file, is no
    // sign of a truncated file but of a wrong offset
    let packed = tensors
        .iter()
        .try_fold(0u64, |sum, t| sum.checked_add(pad(t.n_bytes, alignment)?));
    for t in tensors {
        let end = t.offset.checked_add(t.n_bytes);
        let in_file = end
            .and_then(|end| end.checked_add(data_offset))
            .is_some_and(|end| end <= file_len);
        let plausible = end.zip(packed).is_some_and(|(end, max)| end <= max);
        if !in_file && !plausible {
            return Err(GgufError::TensorOutside {
                path: path.to_owned(),
                tensor: t.name.clone(),
                found: t.offset,
                n_bytes: t.n_bytes,
                max: packed.unwrap_or(u64::MAX),
            });
        }
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_by_key(|t| t.offset);
    for pair in by_offset.windows(2) {
        if pair[1].offset < pair[0].end() {
            return Err(GgufError::TensorsOverlap {
                path: path.to_owned(),
                tensor: pair[1].name.clone(),
                other: pair[0].name.clone(),
                wanted: pair[0].end(),
                found: pair[1].offset,
            });
        }
    }
    match by_offset.last() {
        // packed fits u64 and data_offset is small, but their sum may still not
        Some(last) if data_offset.saturating_add(last.end()) > file_len => {
            Err(GgufError::Truncated {
                path: path.to_owned(),
                tensor: last.name.clone(),
                expected: data_offset.saturating_add(last.end()),
                actual: file_len,
            })
        }
        _ => Ok(()),
    }
}
