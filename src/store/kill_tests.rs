//! A process killed at every change of the disk leaves the old set or the new one, whole.

use super::*;
use crate::digest::Digest;
use crate::fault::KILL_AT;
use crate::patch::{Base, Info, Patch, Update};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

const CHILD: &str = "NEPENTHE_TEST_STORE";
const PLAIN: Add<'_> = Add {
    scale: 1.0,
    key: None,
    allow_older: false,
};

/// A patch file that differs for every `seed`.
pub(super) fn patch(dir: &Path, name: &str, seed: u64) -> PathBuf {
    let base = Base {
        digest: Digest([7; 32]),
        name: "model.gguf".into(),
    };
    let update = Update {
        tensor: "blk.0.attn_q.weight".into(),
        n_in: 4,
        n_out: 4,
        rank: 1,
        scale: 1.0,
        lora_a: vec![1.0; 4],
        lora_b: vec![seed as f32; 4],
    };
    let info = Info::new(base, "test", serde_json::Value::Null, seed);
    let path = dir.join(name);
    let patch = Patch::new("llama", info, vec![update]);
    patch.save(&path, false).expect("room");
    path
}

fn names(index: &Index) -> Vec<&str> {
    let mut names: Vec<&str> = index.patches.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    names
}

/// A store as it is before the change of this kind: one patch, or two.
fn prepare(kind: &str, dir: &Path) -> Store {
    let store = Store::create(&dir.join("store")).expect("room");
    let a = patch(dir, "a.gguf", 1);
    let b = patch(dir, "b.gguf", 2);
    store.add(&a, &PLAIN).expect("a good patch");
    if kind != "add" {
        store.add(&b, &PLAIN).expect("a good patch");
    }
    store
}

fn change(kind: &str, dir: &Path) {
    let store = Store::open(&dir.join("store")).expect("a store");
    match kind {
        "add" => drop(store.add(&dir.join("b.gguf"), &PLAIN).expect("added")),
        "remove" => {
            let index = store.index().expect("readable");
            let a = index.patches.iter().find(|e| e.name == "a.gguf");
            // The child of a second run may find it done.
            store.remove(a.expect("it is there").id).expect("removed");
        }
        _ => drop(store.rollback(1).expect("kept")),
    }
}

fn killed(kind: &str, dir: &Path, point: u64) -> bool {
    let output = Command::new(std::env::current_exe().expect("a test binary"))
        .args([
            "--exact",
            "store::kill_tests::a_killed_change_leaves_one_of_two_sets",
        ])
        .env(CHILD, format!("{kind}:{}", dir.display()))
        .env(KILL_AT, point.to_string())
        .output()
        .expect("the test binary runs");
    let killed = output.status.signal() == Some(9);
    assert!(killed || output.status.success(), "{output:?}");
    killed
}

#[test]
fn a_killed_change_leaves_one_of_two_sets() {
    if let Ok(what) = std::env::var(CHILD) {
        let (kind, dir) = what.split_once(':').expect("kind:directory");
        return change(kind, Path::new(dir));
    }
    let kinds: [(&str, &[&str], &[&str]); 3] = [
        ("add", &["a.gguf"], &["a.gguf", "b.gguf"]),
        ("remove", &["a.gguf", "b.gguf"], &["b.gguf"]),
        ("rollback", &["a.gguf", "b.gguf"], &["a.gguf"]),
    ];
    for (kind, old, new) in kinds {
        let mut seen = [false; 2];
        let mut points = 0;
        for point in 1.. {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let store = prepare(kind, dir.path());
            let before = store.index().expect("readable").sequence;
            let was_killed = killed(kind, dir.path(), point);
            let index = store.index().expect("whole");
            let is_new = index.sequence > before;
            assert_eq!(
                names(&index),
                if is_new { new } else { old },
                "{kind} {point}"
            );
            for entry in &index.patches {
                store.verify(entry.id, None).expect("whole");
            }
            seen[usize::from(is_new)] = true;
            if !is_new {
                change(kind, dir.path());
                assert_eq!(names(&store.index().expect("whole")), new, "{kind} {point}");
                let left = fs::read_dir(store.patches()).expect("a directory").count();
                assert_eq!(
                    left, 2,
                    "{kind} {point}: what the killed process left is gone"
                );
            }
            if !was_killed {
                points = point - 1;
                break;
            }
        }
        assert_eq!(
            seen,
            [true, true],
            "{kind}: kills on both sides of the commit"
        );
        assert!(points >= 4, "{kind}: {points} points");
    }
}
