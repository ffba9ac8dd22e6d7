//! One hostile file per field of the format, each stopped by its own error variant.

use nepenthe::gguf::{Gguf, GgufError};

use crate::build::{Bytes, one_record, one_value, small};

/// Asserts the variant and prints what a user would read.
macro_rules! rejects {
    ($bytes:expr, $pattern:pat $(if $guard:expr)?) => {{
        let error = $bytes.error();
        println!("{error}");
        assert!(matches!(&error, $pattern $(if $guard)?), "{error:?}");
    }};
}

#[test]
fn the_valid_file_they_are_made_from_opens() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = small().open_in(&dir).unwrap();
    assert_eq!(gguf.tensors().len(), 2);
    assert_eq!(gguf.data_offset() + 64 + 34, gguf.file_len());
}

#[test]
fn magic() {
    rejects!(Bytes(b"ggml\x03\0\0\0".to_vec()), GgufError::BadMagic { found, .. } if found == b"ggml");
    rejects!(
        Bytes(b"\x80\0PK\x03\0\0\0".to_vec()),
        GgufError::BadMagic { .. }
    );
}

#[test]
fn big_endian_magic_and_version() {
    rejects!(
        Bytes(b"FUGG\0\0\0\x03".to_vec()),
        GgufError::BigEndian { offset: 0, .. }
    );
    rejects!(
        Bytes(b"GGUF\0\0\0\x03".to_vec()),
        GgufError::BigEndian { offset: 4, .. }
    );
}

#[test]
fn version() {
    for version in [0, 1, 4, u32::MAX] {
        let bytes = Bytes::default().raw(b"GGUF").u32(version);
        rejects!(bytes, GgufError::UnsupportedVersion { found, .. } if *found == version);
    }
}

#[test]
fn tensor_count() {
    for n in [1, 1 << 40, u64::MAX] {
        rejects!(Bytes::header(n, 0), GgufError::TensorCount { found, max: 0, .. } if *found == n);
    }
}

#[test]
fn metadata_count() {
    for n in [1, 1 << 40, u64::MAX] {
        rejects!(Bytes::header(0, n), GgufError::KeyCount { found, max: 0, .. } if *found == n);
    }
}

#[test]
fn key_length() {
    let with_len = |n| Bytes::header(0, 1).u64(n).raw(&vec![b'k'; 70_000]);
    for n in [0, 65_536, u64::MAX] {
        rejects!(with_len(n), GgufError::KeyLength { offset: 24, found, .. } if *found == n);
    }
}

#[test]
fn key_longer_than_the_file() {
    let bytes = Bytes::header(0, 1).u64(1000).raw(&[b'k'; 20]);
    rejects!(
        bytes,
        GgufError::UnexpectedEnd {
            offset: 32,
            wanted: 1000,
            left: 20,
            ..
        }
    );
}

#[test]
fn key_text() {
    for key in [&b"k\xff"[..], b"k\0x"] {
        let bytes = Bytes::header(0, 1).string(key).raw(&[0; 64]);
        rejects!(bytes, GgufError::KeyText { .. });
    }
}

#[test]
fn duplicate_key() {
    let entry = |b: Bytes| b.string(b"k").u32(0).raw(&[7]);
    let bytes = entry(entry(Bytes::header(0, 2)));
    rejects!(bytes, GgufError::DuplicateKey { key, .. } if key == "k");
}

#[test]
fn value_type() {
    for ty in [13, u32::MAX] {
        rejects!(one_value(ty, &[]), GgufError::ValueType { found, .. } if *found == ty);
    }
}

#[test]
fn bool_value() {
    rejects!(one_value(7, &[2]), GgufError::BoolValue { found: 2, .. });
    let array = Bytes::default().u32(7).u64(3).raw(&[1, 0, 255]);
    rejects!(
        one_value(9, &array.0),
        GgufError::BoolValue {
            found: 255,
            offset: 51,
            ..
        }
    );
}

#[test]
fn string_length() {
    for n in [65, 1 << 62, u64::MAX] {
        let value = Bytes::default().u64(n);
        rejects!(one_value(8, &value.0), GgufError::StringLength { found, left: 64, .. } if *found == n);
    }
}

#[test]
fn array_element_type() {
    let value = Bytes::default().u32(13).u64(1);
    rejects!(
        one_value(9, &value.0),
        GgufError::ArrayType { found: 13, .. }
    );
}

#[test]
fn array_length() {
    for (ty, room) in [(0, 64), (4, 16), (10, 8), (8, 8), (9, 5)] {
        for n in [room + 1, 1 << 61, u64::MAX] {
            let value = Bytes::default().u32(ty).u64(n);
            rejects!(one_value(9, &value.0), GgufError::ArrayLength { found, max, .. } if *found == n && *max == room);
        }
    }
}

#[test]
fn array_depth() {
    let nested = |depth| {
        let outer = (1..depth).fold(Bytes::default(), |b, _| b.u32(9).u64(1));
        outer.u32(0).u64(1)
    };
    rejects!(
        one_value(9, &nested(5).0),
        GgufError::ArrayDepth { max: 4, .. }
    );
    rejects!(
        one_value(9, &nested(4000).0),
        GgufError::ArrayDepth { max: 4, .. }
    );
    let dir = tempfile::tempdir().unwrap();
    assert!(one_value(9, &nested(4).0).open_in(&dir).is_ok());
}

#[test]
fn alignment() {
    let file = |ty, value: &[u8]| {
        Bytes::header(0, 1)
            .string(b"general.alignment")
            .u32(ty)
            .raw(value)
    };
    for n in [0u32, 4, 24, 33, 2 << 20, u32::MAX] {
        rejects!(file(4, &n.to_le_bytes()), GgufError::AlignmentValue { found, .. } if *found == n);
    }
    rejects!(file(10, &32u64.to_le_bytes()), GgufError::AlignmentType { found, .. } if found == "u64 32");
    rejects!(
        file(5, &32u32.to_le_bytes()),
        GgufError::AlignmentType { .. }
    );
    let dir = tempfile::tempdir().unwrap();
    for n in [8u32, 32, 4096, 1 << 20] {
        let gguf = file(4, &n.to_le_bytes()).open_in(&dir).unwrap();
        assert_eq!(gguf.alignment(), u64::from(n));
    }
}

#[test]
fn tensor_name_length() {
    for n in [0, 64, u64::MAX] {
        let bytes = Bytes::header(1, 0).u64(n).raw(&[b'a'; 200]);
        rejects!(bytes, GgufError::TensorNameLength { offset: 24, found, .. } if *found == n);
    }
}

#[test]
fn tensor_name_text() {
    for name in [&b"a\xc3"[..], b"a\0b"] {
        let bytes = Bytes::header(1, 0).string(name).raw(&[0; 64]);
        rejects!(bytes, GgufError::TensorNameText { .. });
    }
}

#[test]
fn duplicate_tensor() {
    let bytes = Bytes::header(2, 0)
        .record("a", &[8], 0, 0)
        .record("a", &[8], 0, 32)
        .data(64);
    rejects!(bytes, GgufError::DuplicateTensor { tensor, .. } if tensor == "a");
}

#[test]
fn n_dims() {
    for n in [0, 5, u32::MAX] {
        let bytes = Bytes::header(1, 0).string(b"a").u32(n).raw(&[1; 64]);
        rejects!(bytes, GgufError::DimCount { found, .. } if *found == u64::from(n));
    }
}

#[test]
fn zero_dimension() {
    rejects!(one_record(&[8, 0], 0, 0), GgufError::ZeroDim { dim: 1, .. });
}

#[test]
fn shape_overflow() {
    let big = 1 << 32;
    for ne in [&[u64::MAX][..], &[1 << 62], &[big, big], &[big, big, 2, 8]] {
        rejects!(one_record(ne, 0, 0), GgufError::ShapeOverflow { .. });
    }
}

#[test]
fn row_not_whole_blocks() {
    rejects!(
        one_record(&[33], 8, 0),
        GgufError::RowNotBlocks { found: 33, .. }
    );
    rejects!(
        one_record(&[32, 8], 12, 0),
        GgufError::RowNotBlocks { found: 32, .. }
    );
}

#[test]
fn tensor_type() {
    for ty in [4, 5, 31, 33, 36, 38, 43, u32::MAX] {
        rejects!(one_record(&[8], ty, 0), GgufError::TensorType { found, .. } if *found == ty);
    }
}

#[test]
fn offset_unaligned() {
    for offset in [1, 16, u64::MAX] {
        rejects!(one_record(&[8], 0, offset), GgufError::OffsetUnaligned { found, .. } if *found == offset);
    }
}

#[test]
fn offset_outside() {
    for offset in [64, 1 << 40, u64::MAX - 31] {
        rejects!(one_record(&[8], 0, offset), GgufError::TensorOutside { found, .. } if *found == offset);
    }
}

#[test]
fn tensors_overlap() {
    let file = |first, second| {
        Bytes::header(2, 0)
            .record("a", &[16], 0, first)
            .record("b", &[8], 0, second)
            .data(96)
    };
    rejects!(file(0, 0), GgufError::TensorsOverlap { .. });
    rejects!(file(0, 32), GgufError::TensorsOverlap { tensor, other, wanted: 64, found: 32, .. } if tensor == "b" && other == "a");
    let dir = tempfile::tempdir().unwrap();
    assert!(file(0, 64).open_in(&dir).is_ok());
    assert!(file(32, 0).open_in(&dir).is_ok(), "file order is free");
}

#[test]
fn data_section_truncated() {
    let mut bytes = small();
    let whole = bytes.0.len() as u64;
    bytes.0.truncate(bytes.0.len() - 40);
    rejects!(bytes, GgufError::Truncated { expected, actual, tensor, .. }
        if *expected == whole && *actual == whole - 40 && tensor == "b");
    // a shape that claims more than the file holds is refused before anything is allocated
    rejects!(one_record(&[1 << 50], 0, 0), GgufError::Truncated { .. });
}

#[test]
fn truncated_at_any_byte_is_an_error() {
    let whole = small();
    for n in 0..whole.0.len() {
        let error = Bytes(whole.0[..n].to_vec()).error();
        assert!(!matches!(error, GgufError::Io { .. }), "at {n}: {error:?}");
    }
}

#[test]
fn any_single_byte_change_is_an_error_or_a_consistent_file() {
    let whole = small();
    let dir = tempfile::tempdir().unwrap();
    for at in 0..whole.0.len() {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes.0[at] = value;
            let Ok(gguf) = bytes.open_in(&dir) else {
                continue;
            };
            for t in gguf.tensors() {
                assert_eq!(gguf.read_tensor(&t.name).unwrap().len() as u64, t.n_bytes);
            }
        }
    }
}

#[test]
fn header_larger_than_the_limit() {
    // a sparse file: 1 GiB that takes no disk space
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.gguf");
    for ty in [8, 9] {
        let element = if ty == 9 { vec![8, 0, 0, 0] } else { vec![] };
        let bytes = Bytes::header(0, 1).string(b"k").u32(ty).raw(&element);
        std::fs::write(&path, bytes.u64(100 << 20).0).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        let result = Gguf::open(&path);
        match ty {
            8 => assert!(result.is_ok(), "100 MiB is within the limit"),
            _ => assert!(
                matches!(result, Err(GgufError::HeaderTooLarge { .. })),
                "{result:?}"
            ),
        }
    }
}

#[test]
fn not_a_file() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Gguf::open(dir.path()),
        Err(GgufError::NotAFile { .. })
    ));
    let missing = Gguf::open(dir.path().join("none.gguf")).unwrap_err();
    assert!(
        matches!(
            missing,
            GgufError::Io {
                doing: "opening",
                ..
            }
        ),
        "{missing:?}"
    );
}

#[test]
fn file_that_shrinks_after_opening() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = small().open_in(&dir).unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(gguf.path())
        .unwrap();
    file.set_len(gguf.data_offset() + 8).unwrap();
    assert!(matches!(
        gguf.read_tensor("a"),
        Err(GgufError::FileChanged { .. })
    ));
    let error = nepenthe::gguf::MappedGguf::new(gguf).unwrap_err();
    assert!(matches!(error, GgufError::FileChanged { .. }), "{error:?}");
}
