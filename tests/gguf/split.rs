//! Models in several files.

use std::path::{Path, PathBuf};

use nepenthe::gguf::{GgmlType, GgufError, GgufSet, GgufWriter, Metadata, SplitName};

use crate::build::{real_model, small};

/// Writes part `no` of 3 with one tensor `t{no}` of bytes `no`, after `edit` has had its way.
fn part(dir: &Path, no: u16, edit: impl FnOnce(&mut Metadata)) -> PathBuf {
    let path = dir.join(format!("model-{:05}-of-00003.gguf", no + 1));
    let mut meta = Metadata::new();
    if no == 0 {
        meta.set("general.architecture", "llama");
    }
    meta.set("split.no", no);
    meta.set("split.count", 3u16);
    meta.set("split.tensors.count", 3i32);
    edit(&mut meta);
    let name = meta
        .remove("test.tensor")
        .map_or(format!("t{no}"), |_| "t0".into());
    let bytes = [no as u8; 32];
    let mut writer = GgufWriter::new(&path, meta);
    writer
        .tensor_from_bytes(&name, &[8], GgmlType::F32, &bytes)
        .unwrap();
    writer.save(true).unwrap();
    path
}

/// Opens a set whose part `no` has been edited.
fn edited(no: u16, edit: impl FnOnce(&mut Metadata)) -> Result<GgufSet, GgufError> {
    let dir = tempfile::tempdir().unwrap();
    let first = part(dir.path(), 0, |_| {});
    part(dir.path(), 1, |_| {});
    part(dir.path(), 2, |_| {});
    part(dir.path(), no, edit);
    GgufSet::open(first)
}

#[test]
fn names_are_parsed_and_made() {
    let path = Path::new("/m/a-00001-of-00002-00002-of-00012.gguf");
    let name = SplitName::parse(path).unwrap();
    assert_eq!((name.no, name.count), (1, 12));
    assert_eq!(name.prefix, Path::new("/m/a-00001-of-00002"));
    assert_eq!(name.path_of(1), path);
    for bad in [
        "a.gguf",
        "a-00000-of-00002.gguf",
        "a-00003-of-00002.gguf",
        "a-1-of-2.gguf",
        "a-+0001-of-00002.gguf",
        "-00001-of-00002.gguf",
        "a-00001-of-00002.bin",
    ] {
        assert_eq!(SplitName::parse(Path::new(bad)), None, "{bad}");
    }
}

#[test]
fn any_part_opens_all_parts() {
    let dir = tempfile::tempdir().unwrap();
    let paths = [0, 1, 2].map(|no| part(dir.path(), no, |_| {}));
    for path in &paths {
        let set = GgufSet::open(path).unwrap();
        assert_eq!(set.parts().len(), 3);
        assert_eq!(
            set.metadata().get::<&str>("general.architecture").unwrap(),
            "llama"
        );
        let names: Vec<_> = set.tensors().map(|(_, t)| t.name.as_str()).collect();
        assert_eq!(names, ["t0", "t1", "t2"]);
        let (part, t) = set.tensor("t2").unwrap();
        assert_eq!((part.path(), t.n_bytes), (paths[2].as_path(), 32));
        assert_eq!(set.read_tensor("t1").unwrap(), [1; 32]);
        assert!(matches!(
            set.read_tensor("t9"),
            Err(GgufError::MissingTensor { .. })
        ));
    }
}

#[test]
fn a_single_file_is_a_set_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = small().open_in(&dir).unwrap().path().to_owned();
    assert_eq!(GgufSet::open(&path).unwrap().parts().len(), 1);
    let alone = dir.path().join("m-00001-of-00001.gguf");
    std::fs::rename(&path, &alone).unwrap();
    assert_eq!(GgufSet::open(&alone).unwrap().parts().len(), 1);
    if let Some(path) = real_model() {
        assert_eq!(GgufSet::open(path).unwrap().parts().len(), 1);
    }
}

#[test]
fn a_missing_part_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let first = part(dir.path(), 0, |_| {});
    part(dir.path(), 2, |_| {});
    let error = GgufSet::open(first).unwrap_err();
    assert!(
        matches!(
            error,
            GgufError::SplitPartMissing {
                no: 2,
                count: 3,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("model-00002-of-00003.gguf"),
        "{error}"
    );
}

#[test]
fn a_split_file_needs_a_split_name() {
    let dir = tempfile::tempdir().unwrap();
    let renamed = dir.path().join("model.gguf");
    std::fs::rename(part(dir.path(), 0, |_| {}), &renamed).unwrap();
    let error = GgufSet::open(renamed).unwrap_err();
    assert!(
        matches!(error, GgufError::SplitName { count: 3, .. }),
        "{error:?}"
    );
}

#[test]
fn a_split_name_needs_split_keys() {
    for key in ["split.count", "split.no", "split.tensors.count"] {
        let error = edited(0, |m| drop(m.remove(key))).unwrap_err();
        assert!(
            matches!(&error, GgufError::MissingKey { key: k, .. } if k == key),
            "{error:?}"
        );
    }
    let error = edited(0, |m| drop(m.set("split.count", "3"))).unwrap_err();
    assert!(matches!(error, GgufError::WrongType { .. }), "{error:?}");
    assert!(edited(1, |m| drop(m.remove("split.tensors.count"))).is_ok());
}

#[test]
fn parts_that_disagree_are_refused() {
    let cases: [(u16, &str, u16); 6] = [
        (0, "split.count", 1),
        (0, "split.count", 4),
        (1, "split.count", 2),
        (0, "split.no", 1),
        (2, "split.no", 1),
        (1, "split.tensors.count", 4),
    ];
    for (no, key, value) in cases {
        let error = edited(no, |m| drop(m.set(key, value))).unwrap_err();
        assert!(
            matches!(error, GgufError::SplitMismatch { key: k, .. } if k == key),
            "{error:?}"
        );
    }
    let error = edited(1, |m| drop(m.set("general.architecture", "qwen3"))).unwrap_err();
    assert!(
        matches!(error, GgufError::SplitMismatch { .. }),
        "{error:?}"
    );
}

#[test]
fn a_tensor_in_two_parts_is_refused() {
    let error = edited(1, |m| drop(m.set("test.tensor", true))).unwrap_err();
    assert!(
        matches!(error, GgufError::DuplicateTensor { .. }),
        "{error:?}"
    );
}
