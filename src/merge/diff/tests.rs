//! Against counts worked out by hand.

use super::*;
use crate::ggml::quantize;
use crate::gguf::{GgmlType, GgufWriter, Metadata};
use std::path::Path;

type Tensor<'a> = (&'a str, GgmlType, Vec<u8>);

fn set(dir: &Path, name: &str, keys: &[(&str, u32)], tensors: &[Tensor]) -> GgufSet {
    let path = dir.join(name);
    let mut meta = Metadata::new();
    for (key, value) in keys {
        meta.set(key, *value);
    }
    let mut file = GgufWriter::new(&path, meta);
    for (name, ty, bytes) in tensors {
        let n = bytes.len() as u64 / ty.block_bytes() * ty.block_len();
        file.tensor_from_bytes(name, &[n], *ty, bytes)
            .expect("good");
    }
    file.save(true).expect("room");
    GgufSet::open(path).expect("good")
}

fn values(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0)
        .collect()
}

#[test]
fn keys_and_tensors_are_sorted_into_what_happened_to_them() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let f = |v: &[f32]| bytemuck::cast_slice(v).to_vec();
    let a = set(
        dir.path(),
        "a",
        &[("same", 1), ("gone", 2), ("other", 3)],
        &[
            ("same", GgmlType::F32, f(&[1.0, 2.0])),
            ("gone", GgmlType::F32, f(&[1.0])),
            ("moved", GgmlType::F32, f(&[3.0, 4.0])),
            ("retyped", GgmlType::F32, f(&[1.0, 2.0])),
        ],
    );
    let halves: Vec<half::f16> = [1.0, 2.0].map(half::f16::from_f32).to_vec();
    let b = set(
        dir.path(),
        "b",
        &[("same", 1), ("other", 4), ("new", 5)],
        &[
            ("moved", GgmlType::F32, f(&[3.0, 4.5])),
            ("new", GgmlType::F32, f(&[1.0])),
            ("same", GgmlType::F32, f(&[1.0, 2.0])),
            (
                "retyped",
                GgmlType::F16,
                bytemuck::cast_slice(&halves).to_vec(),
            ),
        ],
    );
    let d = diff(&a, &b).expect("readable");
    assert!(!d.identical);
    assert_eq!(d.keys_added, ["new"]);
    assert_eq!(d.keys_removed, ["gone"]);
    assert_eq!(d.keys_changed, ["other"]);
    assert_eq!(d.tensors_added, ["new"]);
    assert_eq!(d.tensors_removed, ["gone"]);
    assert_eq!(d.n_same, 1);
    let [moved, retyped] = &d.tensors[..] else {
        panic!("{:?}", d.tensors)
    };
    assert_eq!(moved.values_changed, Some(1));
    assert_eq!(moved.bytes_changed, Some(1)); // 4.0 and 4.5 differ in one byte
    assert_eq!(moved.relative_norm, Some(0.1)); // 0.5 of 5
    assert!(retyped.is_retyped());
    assert_eq!(
        (retyped.values_changed, retyped.relative_norm),
        (Some(0), Some(0.0))
    );
    let same = diff(&a, &a).expect("readable");
    assert!(same.identical && same.n_same == 4);
}

/// For every type that separates them: scale bytes alone change no code, and one code alone
/// changes one value and no scale.
#[test]
fn codes_and_scales_are_told_apart_in_every_type() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // Type, a scale byte, and a code byte with a bit that belongs to one code.
    let cases = [
        (GgmlType::Q4_0, 0, 2),
        (GgmlType::Q4_1, 2, 4),
        (GgmlType::Q5_0, 1, 2),
        (GgmlType::Q5_1, 3, 8),
        (GgmlType::Q8_0, 0, 2),
        (GgmlType::Q2_K, 3, 16),
        (GgmlType::Q3_K, 97, 0),
        (GgmlType::Q4_K, 13, 16),
        (GgmlType::Q5_K, 7, 16),
        (GgmlType::Q6_K, 200, 128),
    ];
    for (ty, scale, code) in cases {
        let bytes = quantize(ty.id(), &values(512), 256, None).expect("ggml writes it");
        let with = |name: &str, at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            set(dir.path(), name, &[], &[("t", ty, bytes)])
        };
        let a = set(dir.path(), "a", &[], &[("t", ty, bytes.clone())]);
        let d = diff(&a, &with("scale", scale)).expect("readable").tensors;
        assert_eq!(d[0].codes_changed, Some(0), "{ty}");
        assert_eq!(d[0].scale_bytes_changed, Some(1), "{ty}");
        assert_eq!(d[0].bytes_changed, Some(1), "{ty}");
        let d = diff(&a, &with("code", code)).expect("readable").tensors;
        assert_eq!(d[0].codes_changed, Some(1), "{ty}");
        assert_eq!(d[0].scale_bytes_changed, Some(0), "{ty}");
        assert_eq!(d[0].values_changed, Some(1), "{ty}");
        assert!(d[0].relative_norm.is_some_and(|r| r > 0.0), "{ty}");
    }
}
