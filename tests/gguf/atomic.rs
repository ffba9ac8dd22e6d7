//! Files appear whole or not at all.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nepenthe::atomic::{AtomicError, write_atomic, write_atomic_verified};

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn put(path: &Path, force: bool, bytes: &[u8]) -> Result<(), AtomicError> {
    write_atomic(path, force, |out| {
        out.write_all(bytes).expect("the test's disk has room");
        Ok(())
    })
}

#[test]
fn writes_and_replaces_only_when_forced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    put(&path, false, b"one").unwrap();
    let error = put(&path, false, b"two").unwrap_err();
    assert!(matches!(error, AtomicError::Exists { .. }), "{error:?}");
    assert_eq!(fs::read(&path).unwrap(), b"one");
    put(&path, true, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(names(dir.path()), ["f"]);
}

#[test]
fn a_path_taken_meanwhile_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let error = write_atomic(&path, false, |_| {
        fs::write(&path, "theirs").unwrap();
        Ok::<_, AtomicError>(())
    });
    assert!(
        matches!(error, Err(AtomicError::Exists { .. })),
        "{error:?}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
    assert_eq!(names(dir.path()), ["f"]);
}

#[test]
fn an_error_or_a_failed_check_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let mine = || AtomicError::Exists {
        path: "mine".into(),
    };
    let failed = write_atomic::<(), _>(&path, false, |out| {
        out.write_all(&[0; 3 << 20]).unwrap();
        Err(mine())
    });
    assert!(failed.unwrap_err().to_string().starts_with("mine"));
    let rejected = write_atomic_verified(
        &path,
        false,
        |out| {
            out.write_all(b"bad").unwrap();
            Ok(())
        },
        |temp, ()| {
            assert_eq!(fs::read(temp).unwrap(), b"bad");
            Err(mine())
        },
    );
    assert!(rejected.is_err());
    assert!(names(dir.path()).is_empty());
}

#[test]
fn modes_are_those_of_an_ordinary_file_or_of_the_file_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let plain = dir.path().join("plain");
    fs::write(&plain, "").unwrap();
    let path = dir.path().join("f");
    put(&path, false, b"").unwrap();
    assert_eq!(mode(&path), mode(&plain));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    put(&path, true, b"").unwrap();
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn a_missing_directory_or_name_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = put(&dir.path().join("none/f"), false, b"").unwrap_err();
    assert!(matches!(error, AtomicError::Io { .. }), "{error:?}");
    let error = put(Path::new("/"), true, b"").unwrap_err();
    assert!(matches!(error, AtomicError::NoFileName { .. }), "{error:?}");
}

const CHILD_DIR: &str = "NEPENTHE_TEST_LIMITED_DIR";

/// Runs itself again under a file size limit: the disk then fails in the middle of a write.
#[test]
fn a_disk_that_fails_is_named_and_nothing_stays() {
    if let Some(dir) = std::env::var_os(CHILD_DIR) {
        let path = Path::new(&dir).join("f");
        let error = write_atomic::<(), AtomicError>(&path, false, |out| {
            // the closure's own error must not hide the disk's
            out.write_all(&vec![1; 4 << 20])
                .map_err(|_| AtomicError::Exists {
                    path: "hidden".into(),
                })
        });
        let error = error.unwrap_err();
        assert!(
            matches!(
                error,
                AtomicError::Io {
                    doing: "writing",
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(
            error.to_string().starts_with(path.to_str().unwrap()),
            "{error}"
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "atomic::a_disk_that_fails_is_named_and_nothing_stays",
        ])
        .env(CHILD_DIR, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{output:?}"
    );
    assert!(names(dir.path()).is_empty());
}
