//! Whole delta, there and back.

use super::*;
use crate::digest::of_file;
use crate::gguf::{GgmlType, GgufWriter, Metadata};
use crate::merge::MergeError;
use proptest::prelude::*;

/// A model file: keys, then tensors of (name, type, bytes).
pub(super) fn model(path: &Path, keys: &[&str], tensors: &[(&str, GgmlType, Vec<u8>)]) -> Gguf {
    let mut meta = Metadata::new();
    for key in keys {
        meta.set(key, format!("value of {key}"));
    }
    let mut file = GgufWriter::new(path, meta);
    for (name, ty, bytes) in tensors {
        let n = bytes.len() as u64 / ty.block_bytes() * ty.block_len();
        file.tensor_from_bytes(name, &[n], *ty, bytes)
            .expect("a good tensor");
    }
    file.save(true).expect("room on the disk");
    Gguf::open(path).expect("a good file")
}

/// Restored parts, from an undo file written for the two.
pub(super) fn there_and_back(dir: &Path, original: &[Gguf], merged: &[Gguf]) -> UndoSize {
    let path = dir.join("undo");
    let size = write(original, merged, &About::default(), &path, true).expect("written");
    let undo = Undo::open(&path).expect("just written");
    undo.check(merged).expect("made for it");
    let files: Vec<File> = merged
        .iter()
        .map(|p| open(p.path()).expect("readable"))
        .collect();
    let mut restore = undo.start(&files).expect("a body");
    for part in original {
        let mut out = Vec::new();
        restore.write_part(&mut out).expect("restored");
        assert!(out == std::fs::read(part.path()).expect("readable"));
    }
    assert_eq!(restore.finish().expect("no more").file_len, size.file_len);
    size
}

fn noise(n: usize, seed: u32) -> Vec<u8> {
    let mut x = 2 * seed + 1;
    let step = |_| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as u8
    };
    (0..n).map(step).collect()
}

#[test]
fn a_few_changed_codes_take_a_few_bytes() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bytes = noise(18 << 17, 7);
    let mut changed = bytes.clone();
    for i in 0..100 {
        changed[i * 20_011] ^= 0x10;
    }
    let a = model(
        &dir.path().join("a"),
        &["k"],
        &[("t", GgmlType::Q4_0, bytes)],
    );
    let b = model(
        &dir.path().join("b"),
        &["k", "new"],
        &[("t", GgmlType::Q4_0, changed)],
    );
    let size = there_and_back(dir.path(), &[a], &[b]);
    assert!(size.file_len < 1500, "{size:?}");
    assert!((100..300).contains(&size.changed), "{size:?}");
}

#[test]
fn keys_added_and_grown_leave_the_tokenizer_a_copy() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let long: Vec<String> = (0..5000).map(|i| format!("a key, long {i}")).collect();
    let keys: Vec<&str> = long.iter().map(String::as_str).collect();
    let tensors = [("t", GgmlType::F32, noise(256, 3))];
    let a = model(&dir.path().join("a"), &keys, &tensors);
    let more: Vec<&str> = keys.iter().copied().chain(["one", "two"]).collect();
    let b = model(&dir.path().join("b"), &more, &tensors);
    let size = there_and_back(dir.path(), &[a], &[b]);
    assert!(size.spelled + size.changed < 100, "{size:?}");
}

#[test]
fn a_promoted_tensor_is_spelled_out_and_the_others_are_copied() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (t, u) = (noise(18 * 64, 1), noise(4096, 2));
    let original = [("t", GgmlType::Q4_0, t), ("u", GgmlType::F32, u.clone())];
    let promoted = [
        ("t", GgmlType::Q8_0, noise(34 * 64, 5)),
        ("u", GgmlType::F32, u),
    ];
    let a = model(&dir.path().join("a"), &["k"], &original);
    let b = model(&dir.path().join("b"), &["k"], &promoted);
    let size = there_and_back(dir.path(), &[a], &[b]);
    assert!((18 * 64..18 * 64 + 64).contains(&size.spelled), "{size:?}");
    assert!(size.same >= 4096, "{size:?}");
}

#[test]
fn parts_joined_into_one_file_come_back_as_parts() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (t, u) = (noise(400, 1), noise(800, 2));
    let one = model(
        &dir.path().join("1"),
        &["k"],
        &[("t", GgmlType::F32, t.clone())],
    );
    let two = model(
        &dir.path().join("2"),
        &[],
        &[("u", GgmlType::F32, u.clone())],
    );
    let both = [("t", GgmlType::F32, t), ("u", GgmlType::F32, u)];
    let joined = model(&dir.path().join("j"), &["k"], &both);
    there_and_back(dir.path(), &[one, two], &[joined]);
}

#[test]
fn another_model_and_the_original_are_told_apart() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let one = |name: &str, seed| {
        model(
            &dir.path().join(name),
            &["k"],
            &[("t", GgmlType::F32, noise(64, seed))],
        )
    };
    let (a, b, c) = (one("a", 1), one("b", 2), one("c", 3));
    let path = dir.path().join("undo");
    let about = About {
        original: "a".into(),
        merged: "b".into(),
        patches: vec!["p.gguf".into()],
    };
    let parts = [a, b, c];
    write(&parts[..1], &parts[1..2], &about, &path, false).expect("written");
    let undo = Undo::open(&path).expect("good");
    assert_eq!(undo.about(), &about);
    assert_eq!(
        undo.merged()[0].digest,
        of_file(parts[1].path()).expect("readable")
    );
    assert!(undo.check(&parts[1..2]).is_ok());
    let e = undo.check(&parts[..1]).expect_err("the original");
    assert!(
        matches!(
            e,
            Error::Merge(MergeError::Undo(UndoError::Original { .. }))
        ),
        "{e}"
    );
    let e = undo.check(&parts[2..]).expect_err("another");
    assert!(
        matches!(e, Error::Merge(MergeError::Undo(UndoError::Other(_)))),
        "{e}"
    );
    assert!(e.to_string().contains("takes back p.gguf from b"), "{e}");
    assert_eq!(e.exit_code(), 4);
    // An undo file is never replaced unasked.
    let e = write(&parts[..1], &parts[1..2], &about, &path, false).expect_err("exists");
    assert_eq!(e.exit_code(), 2);
}

/// Bytes, and where and how some of them differ.
fn edits() -> impl Strategy<Value = (Vec<u8>, Vec<(usize, u8)>)> {
    (1usize..3000).prop_flat_map(|n| {
        let n = n * 4;
        (
            prop::collection::vec(any::<u8>(), n),
            prop::collection::vec((0..n, any::<u8>()), 0..60),
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_edit_comes_back((bytes, edits) in edits(), keys in 0usize..4) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut changed = bytes.clone();
        for (at, byte) in edits {
            changed[at] = byte;
        }
        let names = ["a", "bb", "ccc", "dddd"];
        let a = model(&dir.path().join("a"), &names[..2], &[("t", GgmlType::F32, bytes)]);
        let b = model(&dir.path().join("b"), &names[..keys], &[("t", GgmlType::F32, changed)]);
        there_and_back(dir.path(), &[a], &[b]);
    }
}
