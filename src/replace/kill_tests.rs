//! A process killed at every change of the disk leaves the old files or the new ones.
//!
//! The test runs itself as a child that commits and is killed at point 1, 2, 3, ... until one
//! run survives; after each kill the directory is looked at as it is, and again after
//! [`settle`], as the next run finds it.

use super::*;
use crate::fault::KILL_AT;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

const CHILD: &str = "NEPENTHE_TEST_COMMIT";

/// Old and new content of part `no`: more than one buffer, so that a write can be torn.
fn content(new: bool, no: usize) -> Vec<u8> {
    let byte = (2 * no + usize::from(new)) as u8;
    vec![byte; BUFFER_BYTES + 1000 * (no + 1)]
}

/// Put the new content of every part in place.
fn commit(targets: &[PathBuf], mode: Mode) -> Result<(), Error> {
    settle(&targets[0])?;
    let mut staging = Staging::new(targets.to_vec(), mode)?;
    for no in 0..targets.len() {
        staging.write(no, |out| {
            // In pieces, as tensors come.
            for piece in content(true, no).chunks(300_000) {
                out.write_all(piece).expect("room on the disk");
            }
            Ok(())
        })?;
    }
    Ok(staging.commit()?)
}

/// The child's side of the tests: commit what the variables say. Returns whether this is one.
fn as_child() -> bool {
    let Some(what) = std::env::var_os(CHILD) else {
        return false;
    };
    let what = what.into_string().expect("plain text");
    let (kind, path) = what.split_once(':').expect("kind:path");
    let targets = siblings(Path::new(path));
    match kind {
        "restore" => {
            settle(&targets[0]).expect("settled");
            restore(&targets[0]).expect("restored");
        }
        "new" => commit(&targets, Mode::New { force: true }).expect("committed"),
        _ => commit(&targets, Mode::InPlace).expect("committed"),
    }
    true
}

/// Run the child for `kind` on `path`, to be killed at `point`; whether it was.
fn killed(test: &str, kind: &str, path: &Path, point: u64) -> bool {
    let output = Command::new(std::env::current_exe().expect("a test binary"))
        .args(["--exact", &format!("replace::kill_tests::{test}")])
        .env(CHILD, format!("{kind}:{}", path.display()))
        .env(KILL_AT, point.to_string())
        .output()
        .expect("the test binary runs");
    let killed = output.status.signal() == Some(9);
    assert!(killed || output.status.success(), "{output:?}");
    killed
}

fn fresh(targets: &[PathBuf]) {
    for (no, target) in targets.iter().enumerate() {
        fs::write(target, content(false, no)).expect("room");
    }
}

/// What stands at each target: Some(new?), None for anything else.
fn state(targets: &[PathBuf]) -> Vec<Option<bool>> {
    let of = |(no, target): (usize, &PathBuf)| {
        let found = fs::read(target).ok()?;
        [false, true]
            .into_iter()
            .find(|new| found == content(*new, no))
    };
    targets.iter().enumerate().map(of).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory");
    let name = |e: io::Result<fs::DirEntry>| e.expect("an entry").file_name().into_string();
    let mut names: Vec<String> = entries.map(|e| name(e).expect("plain text")).collect();
    names.sort();
    names
}

/// Kill at every point; `check` sees the targets after each kill and settling, with whether the
/// files are the new ones. Returns how many points there were.
fn at_every_point(test: &str, kind: &str, name: &str, check: impl Fn(&[PathBuf], bool)) -> u64 {
    let mut seen = [false; 2];
    for point in 1.. {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(name);
        let targets = siblings(&path);
        fresh(&targets);
        if kind == "restore" {
            commit(&targets, Mode::InPlace).expect("committed");
        }
        let was_killed = killed(test, kind, &path, point);
        // As it is: every part whole, and mixed only if that shows.
        let found = state(&targets);
        assert!(
            found.iter().all(Option::is_some),
            "point {point}: {found:?}"
        );
        let mixed = found.iter().any(|part| *part != found[0]);
        if mixed {
            let e = pending(&path).expect_err("an interrupted commit");
            assert!(matches!(e, ReplaceError::Pending { .. }), "{e}");
        }
        // As the next run finds it.
        settle(&path).expect("settled");
        pending(&path).expect("nothing left to do");
        let found = state(&targets);
        assert!(
            found.iter().all(|part| *part == found[0]),
            "point {point}: {found:?}"
        );
        let new = found[0].expect("whole");
        seen[usize::from(new)] = true;
        check(&targets, new);
        let left = names(dir.path());
        let known = |n: &String| n.starts_with(name.split('-').next().unwrap_or(name));
        assert!(left.iter().all(known), "point {point}: {left:?}");
        // And once more, to the end.
        if kind != "restore" {
            commit(&targets, Mode::InPlace).expect("committed");
            assert!(state(&targets).iter().all(|part| *part == Some(true)));
        }
        if !was_killed {
            assert_eq!(seen, [true, true], "kills on both sides of the commit");
            return point - 1;
        }
    }
    unreachable!("the child has an end")
}

/// Before the commit there is no need of a `.prev`, after it there is one with the old bytes.
fn old_is_kept(targets: &[PathBuf], new: bool) {
    for (no, target) in targets.iter().enumerate() {
        let prev = fs::read(prev_of(target)).ok();
        if new {
            assert!(prev == Some(content(false, no)));
        } else {
            assert!(prev.is_none_or(|p| p == content(false, no)));
        }
    }
}

#[test]
fn one_file_in_place() {
    if !as_child() {
        let n = at_every_point("one_file_in_place", "in-place", "model.gguf", old_is_kept);
        assert!(n > 15, "{n} points");
    }
}

#[test]
fn split_in_place() {
    if !as_child() {
        let name = "model-00001-of-00003.gguf";
        let n = at_every_point("split_in_place", "in-place", name, old_is_kept);
        assert!(n > 25, "{n} points");
    }
}

#[test]
fn split_over_other_files() {
    if !as_child() {
        let name = "model-00001-of-00002.gguf";
        at_every_point("split_over_other_files", "new", name, |targets, _| {
            assert!(targets.iter().all(|t| !prev_of(t).exists()));
        });
    }
}

#[test]
fn restore_of_a_split() {
    if !as_child() {
        let name = "model-00001-of-00002.gguf";
        at_every_point("restore_of_a_split", "restore", name, |targets, new| {
            // Still to be put back: then nothing of it may be lost.
            if new {
                old_is_kept(targets, true);
            }
        });
    }
}

#[test]
fn the_old_file_keeps_its_inode_as_prev() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let targets = [dir.path().join("m")];
    fresh(&targets);
    let inode = |path: &Path| fs::metadata(path).expect("there").ino();
    let old = inode(&targets[0]);
    commit(&targets, Mode::InPlace).expect("committed");
    assert_eq!(inode(&prev_of(&targets[0])), old, "a link, not a copy");
    assert_eq!(restore(&targets[0]).expect("restored"), targets);
    assert_eq!(inode(&targets[0]), old);
    assert_eq!(names(dir.path()), ["m"]);
    assert!(matches!(
        restore(&targets[0]),
        Err(Error::Replace(ReplaceError::NoPrev { .. }))
    ));
    commit(&targets, Mode::InPlace).expect("committed");
    assert_eq!(confirm(&targets[0]).expect("confirmed").len(), 1);
    assert_eq!(names(dir.path()), ["m"]);
}

#[test]
fn a_failed_write_and_a_drop_leave_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let targets = vec![dir.path().join("m")];
    let mut staging = Staging::new(targets.clone(), Mode::New { force: false }).expect("free");
    let refused = staging.write(0, |out| {
        out.write_all(b"half").expect("room");
        Err::<(), _>(Error::NothingToTrain)
    });
    assert!(matches!(refused, Err(Error::NothingToTrain)));
    // Another process, as it would see it.
    let busy = Staging::new(targets.clone(), Mode::New { force: false });
    assert!(matches!(busy, Err(ReplaceError::Busy { .. })), "{busy:?}");
    drop(staging);
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn existing_files_links_and_directories_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| vec![dir.path().join(name)];
    fs::write(&at("m")[0], "old").expect("room");
    std::os::unix::fs::symlink("m", &at("link")[0]).expect("links");
    fs::create_dir(&at("d")[0]).expect("room");
    let new = |name, force| Staging::new(at(name), Mode::New { force }).expect_err("refused");
    let in_place = |name| Staging::new(at(name), Mode::InPlace).expect_err("refused");
    assert!(matches!(new("m", false), ReplaceError::Exists { .. }));
    assert!(matches!(new("d", true), ReplaceError::NotAFile { .. }));
    assert!(matches!(in_place("link"), ReplaceError::Symlink { .. }));
    assert!(matches!(in_place("d"), ReplaceError::NotAFile { .. }));
    assert!(matches!(in_place("none"), ReplaceError::Io { .. }));
    // Taken between the start and the commit.
    let mut staging = Staging::new(at("free"), Mode::New { force: false }).expect("free");
    staging.write(0, |_| Ok(())).expect("written");
    fs::write(&at("free")[0], "theirs").expect("room");
    assert!(matches!(staging.commit(), Err(ReplaceError::Exists { .. })));
    assert_eq!(fs::read(&at("free")[0]).expect("theirs"), b"theirs");
}

#[test]
fn hostile_journals_are_refused() {
    let bad = [
        "",
        "[]",
        r#"{"format":2,"keep_prev":true,"parts":[]}"#,
        r#"{"format":1,"keep_prev":true,"parts":[{"name":"../m","len":1,"sha256":"00"}]}"#,
    ];
    let outside = format!(
        r#"{{"format":1,"keep_prev":true,"parts":[{{"name":"../m","len":1,"sha256":"{}"}}]}}"#,
        "0".repeat(64)
    );
    for text in bad.into_iter().chain([outside.as_str()]) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let target = dir.path().join("m");
        let staging = staging_dir(&target).expect("a name");
        fs::create_dir(&staging).expect("room");
        fs::write(journal::path(&staging), text).expect("room");
        let e = settle(&target).expect_err("hostile");
        assert!(matches!(e, ReplaceError::Journal { .. }), "{text}: {e}");
    }
}

#[test]
fn a_commit_whose_staged_file_was_damaged_is_not_completed() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let target = dir.path().join("m");
    fs::write(&target, "old").expect("room");
    let staging = staging_dir(&target).expect("a name");
    fs::create_dir(&staging).expect("room");
    let id = FileDigest {
        len: 3,
        digest: Digest([1; 32]),
    };
    Journal::new(true, [(target.as_path(), id)].into_iter())
        .write(&staging)
        .expect("written");
    fs::write(staging.join("m"), "bad").expect("room");
    let e = settle(&target).expect_err("damaged");
    assert!(matches!(e, ReplaceError::Lost { .. }), "{e}");
    assert_eq!(fs::read(&target).expect("there"), b"old");
}

#[test]
fn parts_are_named_after_the_output() {
    let names = |out: &str, n| -> Vec<String> {
        let paths = part_paths(Path::new(out), n);
        paths.iter().map(|p| p.display().to_string()).collect()
    };
    assert_eq!(names("d/x.gguf", 1), ["d/x.gguf"]);
    let two = ["d/x-00001-of-00002.gguf", "d/x-00002-of-00002.gguf"];
    assert_eq!(names("d/x.gguf", 2), two);
    assert_eq!(names("d/x-00002-of-00002.gguf", 2), two);
    assert_eq!(
        names("x-00001-of-00003.gguf", 2)[0],
        "x-00001-of-00003-00001-of-00002.gguf"
    );
}
