//! Written files read back the same, and canonical files are rewritten byte for byte.

use std::io::{self, Write};

use nepenthe::gguf::{
    Array, GgmlType, Gguf, GgufError, GgufWriter, MappedGguf, Metadata, RawString, Value,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::build::{real_model, small};

fn rewrite(gguf: &Gguf) -> Vec<u8> {
    let mut writer = GgufWriter::new("<memory>", gguf.metadata().clone());
    for t in gguf.tensors() {
        writer.copy_tensor(gguf, &t.name).unwrap();
    }
    let mut out = Vec::new();
    let n = writer.write_to(&mut out).unwrap();
    assert_eq!(n, out.len() as u64);
    out
}

fn array() -> impl Strategy<Value = Array> {
    let string = vec(any::<u8>(), 0..12).prop_map(RawString);
    let leaf = prop_oneof![
        vec(any::<u8>(), 0..5).prop_map(Array::U8),
        vec(any::<i8>(), 0..5).prop_map(Array::I8),
        vec(any::<u16>(), 0..5).prop_map(Array::U16),
        vec(any::<i16>(), 0..5).prop_map(Array::I16),
        vec(any::<u32>(), 0..5).prop_map(Array::U32),
        vec(any::<i32>(), 0..5).prop_map(Array::I32),
        vec(any::<u64>(), 0..5).prop_map(Array::U64),
        vec(any::<i64>(), 0..5).prop_map(Array::I64),
        vec(any::<u32>().prop_map(f32::from_bits), 0..5).prop_map(Array::F32),
        vec(any::<u64>().prop_map(f64::from_bits), 0..5).prop_map(Array::F64),
        vec(any::<bool>(), 0..5).prop_map(Array::Bool),
        vec(string, 0..5).prop_map(Array::String),
    ];
    leaf.prop_recursive(3, 24, 3, |inner| vec(inner, 0..3).prop_map(Array::Array))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<u32>().prop_map(|bits| Value::F32(f32::from_bits(bits))),
        any::<u64>().prop_map(|bits| Value::F64(f64::from_bits(bits))),
        any::<bool>().prop_map(Value::Bool),
        vec(any::<u8>(), 0..40).prop_map(|s| Value::String(RawString(s))),
        array().prop_map(Value::Array),
    ]
}

prop_compose! {
    /// Keys are numbered, so that no two are equal.
    fn metadata()(values in vec((".{0,9}", value()), 0..8), align in 3u32..13, set in any::<bool>()) -> Metadata {
        let mut meta = Metadata::new();
        for (i, (key, value)) in values.into_iter().enumerate() {
            meta.set(&format!("{i}{}", key.replace('\0', "")), value);
        }
        if set {
            meta.set("general.alignment", 1u32 << align);
        }
        meta
    }
}

/// Shape, type and a seed for the data.
fn tensor() -> impl Strategy<Value = (Vec<u64>, GgmlType, u8)> {
    let ty = prop::sample::select(GgmlType::ALL);
    (vec(1u64..4, 1..=4), ty, any::<u8>()).prop_map(|(mut ne, ty, seed)| {
        ne[0] *= ty.block_len();
        (ne, ty, seed)
    })
}

fn data(ne: &[u64], ty: GgmlType, seed: u8) -> Vec<u8> {
    let n = ty.row_bytes(ne[0]).unwrap() * ne[1..].iter().product::<u64>();
    (0..n).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_written_is_read_back(meta in metadata(), tensors in vec(tensor(), 0..6)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("random.gguf");
        let mut writer = GgufWriter::new(&path, meta.clone());
        for (i, (ne, ty, seed)) in tensors.iter().enumerate() {
            let bytes = data(ne, *ty, *seed);
            writer.tensor_from_reader(&format!("t{i}"), ne, *ty, io::Cursor::new(bytes)).unwrap();
        }
        let layout = writer.layout().unwrap();
        prop_assert_eq!(writer.save(false).unwrap(), layout.file_len);

        let gguf = Gguf::open(&path).unwrap();
        prop_assert_eq!(gguf.tensors(), &layout.tensors[..]);
        prop_assert!(gguf.is_canonical());
        prop_assert_eq!(gguf.metadata().len(), meta.len());
        for ((key, value), (key2, value2)) in meta.iter().zip(gguf.metadata().iter()) {
            prop_assert_eq!(key, key2);
            prop_assert_eq!(value.value_type(), value2.value_type());
        }
        let mapped = MappedGguf::open(&path).unwrap();
        for (i, (ne, ty, seed)) in tensors.iter().enumerate() {
            let name = format!("t{i}");
            let t = gguf.tensor(&name).unwrap();
            prop_assert_eq!((t.dims(), t.ty), (&ne[..], *ty));
            prop_assert_eq!(t.row_bytes() * t.n_rows(), t.n_bytes);
            prop_assert_eq!(t.n_elements(), ne.iter().product::<u64>());
            let wanted = data(ne, *ty, *seed);
            prop_assert_eq!(mapped.tensor_bytes(&name).unwrap(), &wanted[..]);
            prop_assert_eq!(gguf.read_tensor(&name).unwrap(), wanted);
        }
        // NaN is not equal to itself, so the values are compared as bytes
        prop_assert_eq!(rewrite(&gguf), std::fs::read(&path).unwrap());
    }

    #[test]
    fn random_bytes_after_a_good_start_never_panic(tail in vec(any::<u8>(), 0..300), n in 0u64..4, m in 0u64..4) {
        let dir = tempfile::tempdir().unwrap();
        let _ = crate::build::Bytes::header(n, m).raw(&tail).open_in(&dir);
    }
}

#[test]
fn a_hand_made_file_is_rewritten_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = small();
    let unpadded = bytes.open_in(&dir).unwrap();
    assert!(
        !unpadded.is_canonical(),
        "the last tensor's padding is missing"
    );
    bytes.0.resize(bytes.0.len().next_multiple_of(32), 0);
    assert_eq!(rewrite(&unpadded), bytes.0);
    let gguf = bytes.open_in(&dir).unwrap();
    assert!(gguf.is_canonical());
    assert_eq!(rewrite(&gguf), bytes.0);
}

#[test]
fn a_real_file_is_rewritten_byte_for_byte() {
    let Some(path) = real_model() else { return };
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(
        gguf.metadata().get::<&str>("general.architecture").unwrap(),
        "llama"
    );
    assert_eq!(gguf.tensors().len(), 48);
    assert!(rewrite(&gguf) == std::fs::read(&path).unwrap());
    let mapped = MappedGguf::open(&path).unwrap();
    for t in gguf.tensors() {
        assert!(mapped.tensor_bytes(&t.name).unwrap() == gguf.read_tensor(&t.name).unwrap());
    }
}

#[test]
fn part_of_a_tensor_is_read_within_its_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = small().open_in(&dir).unwrap();
    let mut out = [0; 4];
    gguf.read_tensor_at("a", 60, &mut out).unwrap();
    assert_eq!(out, [60, 61, 62, 63]);
    for start in [61, 64, u64::MAX] {
        let error = gguf.read_tensor_at("a", start, &mut out).unwrap_err();
        assert!(matches!(error, GgufError::TensorRange { .. }), "{error:?}");
    }
    assert!(matches!(
        gguf.read_tensor("none"),
        Err(GgufError::MissingTensor { .. })
    ));
}

fn written(fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<u64, GgufError> {
    let mut writer = GgufWriter::new("out.gguf", Metadata::new());
    writer
        .tensor("t", &[8], GgmlType::F32, |out| Ok(fill(out)?))
        .unwrap();
    writer.write_to(&mut Vec::new())
}

#[test]
fn a_source_must_yield_exactly_the_declared_bytes() {
    assert!(written(|out| out.write_all(&[0; 32])).is_ok());
    let short = written(|out| out.write_all(&[0; 31])).unwrap_err();
    assert!(
        matches!(
            short,
            GgufError::TensorData {
                wanted: 32,
                found: 31,
                ..
            }
        ),
        "{short:?}"
    );
    let long = written(|out| out.write_all(&[0; 33])).unwrap_err();
    assert!(
        matches!(
            long,
            GgufError::TensorData {
                wanted: 32,
                found: 33,
                ..
            }
        ),
        "{long:?}"
    );
    let failed = written(|_| Err(io::Error::other("no data"))).unwrap_err();
    assert!(
        matches!(failed, GgufError::TensorSource { .. }),
        "{failed:?}"
    );
}

/// Takes this many bytes more, then the disk is full.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0 -= bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_output_is_an_io_error_wherever_it_strikes() {
    // header, data, and padding in turn
    for room in [0, 63, 64, 92] {
        let mut writer = GgufWriter::new("out.gguf", Metadata::new());
        writer
            .tensor_from_bytes("t", &[7], GgmlType::F32, &[0; 28])
            .unwrap();
        let error = writer.write_to(&mut Full(room)).unwrap_err();
        match error {
            GgufError::Io { path, source, .. } => {
                assert_eq!(path.to_str(), Some("out.gguf"));
                assert_eq!(source.kind(), io::ErrorKind::StorageFull);
            }
            other => panic!("room {room}: {other:?}"),
        }
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let mut w = GgufWriter::new("out.gguf", Metadata::new());
    let mut add = |name: &str, ne: &[u64], ty| w.tensor_from_bytes(name, ne, ty, &[]).map(|_| ());
    assert!(matches!(
        add("", &[8], GgmlType::F32),
        Err(GgufError::TensorNameLength { .. })
    ));
    assert!(matches!(
        add("a\0", &[8], GgmlType::F32),
        Err(GgufError::TensorNameText { .. })
    ));
    assert!(matches!(
        add("a", &[], GgmlType::F32),
        Err(GgufError::DimCount { .. })
    ));
    assert!(matches!(
        add("a", &[0], GgmlType::F32),
        Err(GgufError::ZeroDim { .. })
    ));
    assert!(matches!(
        add("a", &[8], GgmlType::Q8_0),
        Err(GgufError::RowNotBlocks { .. })
    ));
    assert!(matches!(
        add("a", &[1 << 62], GgmlType::F32),
        Err(GgufError::ShapeOverflow { .. })
    ));
    add("a", &[8], GgmlType::F32).unwrap();
    assert!(matches!(
        add("a", &[8], GgmlType::F32),
        Err(GgufError::DuplicateTensor { .. })
    ));

    let layout = |key: &str, value: Value| {
        let mut meta = Metadata::new();
        meta.set(key, value);
        GgufWriter::new("out.gguf", meta).layout().map(|_| ())
    };
    assert!(matches!(
        layout("", Value::U8(1)),
        Err(GgufError::KeyLength { .. })
    ));
    assert!(matches!(
        layout("k\0", Value::U8(1)),
        Err(GgufError::KeyText { .. })
    ));
    assert!(matches!(
        layout("general.alignment", Value::U32(7)),
        Err(GgufError::AlignmentValue { .. })
    ));
    assert!(matches!(
        layout("general.alignment", Value::U8(8)),
        Err(GgufError::AlignmentType { .. })
    ));
    let deep = (0..4).fold(Array::U8(vec![]), |inner, _| Array::Array(vec![inner]));
    assert!(matches!(
        layout("k", Value::Array(deep)),
        Err(GgufError::ArrayDepth { .. })
    ));
}
