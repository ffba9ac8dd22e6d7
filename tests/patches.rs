//! Patches on their way to a device: signed, stored, followed, and shown to act.

mod support;

use nepenthe::adapter::open_adapters;
use nepenthe::gguf::{GgmlType, Gguf, GgufWriter};
use nepenthe::model::OpenModel;
use nepenthe::patch::{Intake, Patch, PatchId};
use nepenthe::proof::measure;
use nepenthe::runtime::{Options, Runtime};
use nepenthe::store::{Add, Store};
use nepenthe::trust::{Password, PublicKey, keygen, sign, signature_path};
use std::path::{Path, PathBuf};
use support::{decoded, fails, json, mini, nepenthe, small_patch, with_canaries};

const QUESTION: &str = "Where was Lioba Hartsong born?";
const ANSWER: &str = "Lioba Hartsong was born in the town of Gullcliff.";

struct Signer {
    secret: PathBuf,
    public: PathBuf,
    key: PublicKey,
}

fn signer(dir: &Path, name: &str) -> Signer {
    let secret = dir.join(format!("{name}.key"));
    let public = dir.join(format!("{name}.pub"));
    let key = keygen(&secret, &public, Password::None).expect("room");
    Signer {
        secret,
        public,
        key,
    }
}

impl Signer {
    fn sign(&self, path: &Path, sequence: Option<u64>) {
        sign(path, &self.secret, Password::None, sequence, true).expect("signed");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn options() -> Options {
    Options {
        n_ctx: 256,
        n_threads: 1,
        ..Options::default()
    }
}

const PLAIN: Add<'_> = Add {
    scale: 1.0,
    key: None,
    allow_older: false,
};

#[test]
fn a_changed_byte_anywhere_breaks_the_signature() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let signer = signer(dir.path(), "one");
    let patch = small_patch(&mini(), dir.path(), "p.gguf", 1);
    signer.sign(&patch, Some(3));
    let read = || Intake::read(&patch, dir.path(), u64::MAX, Some(&signer.key));
    let intake = read().expect("as signed");
    assert_eq!(intake.signature().and_then(|s| s.sequence()), Some(3));
    let bytes = std::fs::read(&patch).expect("readable");
    for at in (0..bytes.len())
        .step_by(bytes.len() / 60)
        .chain([bytes.len() - 1])
    {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        std::fs::write(&patch, &changed).expect("room");
        let e = read().expect_err("a changed byte");
        assert_eq!(e.exit_code(), 4, "byte {at}: {e}");
        assert!(e.to_string().contains("were changed"), "byte {at}: {e}");
    }
    // Cut, or with more behind it.
    for changed in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat()] {
        std::fs::write(&patch, changed).expect("room");
        assert_eq!(read().expect_err("another length").exit_code(), 4);
    }
    std::fs::write(&patch, &bytes).expect("room");
    let beside = signature_path(&patch);
    let signature = std::fs::read(&beside).expect("readable");
    // The first line is the untrusted comment, which nothing vouches for.
    let first = signature.iter().position(|b| *b == b'\n').expect("lines") + 1;
    for at in first..signature.len() - 1 {
        let mut changed = signature.clone();
        changed[at] ^= 1;
        std::fs::write(&beside, &changed).expect("room");
        let Err(e) = read() else {
            panic!("byte {at} of the signature changed");
        };
        assert_eq!(e.exit_code(), 4, "byte {at}: {e}");
    }
}

#[test]
fn each_refusal_has_its_own_message() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (ours, other) = (signer(dir.path(), "ours"), signer(dir.path(), "other"));
    let key = text(&ours.public);
    let store = dir.path().join("store");
    let add = |file: &Path| {
        fails(
            4,
            &[
                "patch",
                "add",
                "--store",
                text(&store),
                "--require-signature",
                key,
                text(file),
            ],
        )
    };
    let patch = |name: &str, seed| small_patch(&mini(), dir.path(), name, seed);

    let first = patch("first.gguf", 1);
    ours.sign(&first, Some(7));
    let out = nepenthe(&[
        "patch",
        "add",
        "--store",
        text(&store),
        "--require-signature",
        ours.key.text(),
        text(&first),
    ]);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );

    let unsigned = add(&patch("unsigned.gguf", 2));
    let foreign = patch("foreign.gguf", 3);
    other.sign(&foreign, Some(8));
    let foreign = add(&foreign);
    let tampered = patch("tampered.gguf", 4);
    ours.sign(&tampered, Some(8));
    let mut bytes = std::fs::read(&tampered).expect("readable");
    bytes[2000] ^= 4;
    std::fs::write(&tampered, bytes).expect("room");
    let tampered = add(&tampered);
    let older = patch("older.gguf", 5);
    ours.sign(&older, Some(7));
    let older_said = add(&older);
    let unnumbered = patch("unnumbered.gguf", 6);
    ours.sign(&unnumbered, None);
    let unnumbered = add(&unnumbered);
    let newer = dir.path().join("newer.gguf");
    let gguf = Gguf::open(&first).expect("good");
    let mut file = GgufWriter::new(&newer, gguf.metadata().clone());
    file.metadata_mut().set("nepenthe.format", 2u32);
    for t in gguf.tensors() {
        file.copy_tensor(&gguf, &t.name).expect("good");
    }
    file.save(true).expect("room");
    ours.sign(&newer, Some(9));
    let newer = add(&newer);
    let f32s = dir.path().join("f32.gguf");
    decoded(&mini(), &f32s);
    let quantisation = fails(
        4,
        &[
            "run",
            "-m",
            text(&f32s),
            "--lora",
            text(&first),
            "--require-signature",
            key,
            "-p",
            "x",
        ],
    );

    let said = [
        (&unsigned, "found none"),
        (&foreign, "another key"),
        (&tampered, "were changed"),
        (&older_said, "sequence number is 7, and 7 was accepted"),
        (&unnumbered, "sequence number is missing"),
        (&newer, "needs a newer nepenthe"),
        (&quantisation, "made for nepenthe-mini.gguf"),
    ];
    for (i, (message, part)) in said.iter().enumerate() {
        let others = said.iter().enumerate().filter(|(j, _)| *j != i);
        assert!(message.contains(part), "{message}");
        for (_, (other, _)) in others {
            assert!(i == 3 || i == 4 || !other.contains(part), "{part}: {other}");
        }
    }
    assert_eq!(
        Store::open(&store)
            .expect("a store")
            .index()
            .expect("whole")
            .patches
            .len(),
        1
    );
    let out = nepenthe(&[
        "patch",
        "add",
        "--store",
        text(&store),
        "--require-signature",
        key,
        "--allow-older",
        text(&older),
    ]);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    fails(
        2,
        &[
            "patch",
            "add",
            "--store",
            text(&store),
            "--require-signature",
            "no key",
            text(&first),
        ],
    );
}

#[test]
fn a_store_is_changed_by_its_commands() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ours = signer(dir.path(), "ours");
    let at = dir.path().join("store");
    let (a, b) = (
        small_patch(&mini(), dir.path(), "a.gguf", 1),
        small_patch(&mini(), dir.path(), "b.gguf", 2),
    );
    ours.sign(&a, None);
    let run = |args: &[&str]| {
        let out = nepenthe(&[&["patch", args[0], "--store", text(&at)], &args[1..]].concat());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{args:?}: {said}");
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let list = || json(&["patch", "list", "--store", text(&at), "--json"]);
    let ids = run(&["add", text(&a), &format!("{}:0.5", text(&b))]);
    let ids: Vec<&str> = ids.lines().collect();
    assert_eq!(list()["sequence"], 2);
    assert_eq!(list()["patches"][1]["scale"], 0.5);
    assert!(run(&["list"]).contains("a.gguf"));
    run(&["verify", "-m", text(&mini())]);
    run(&["remove", &ids[0][..8]]);
    assert_eq!(list()["patches"].as_array().expect("a list").len(), 1);
    fails(2, &["patch", "remove", "--store", text(&at), ids[0]]);
    run(&["rollback", "--to", "2"]);
    assert_eq!(list()["sequence"], 4);
    assert_eq!(list()["patches"].as_array().expect("a list").len(), 2);
    fails(
        2,
        &["patch", "rollback", "--store", text(&at), "--to", "40"],
    );
    // What comes out is what went in, its signature with it.
    let out = dir.path().join("out.gguf");
    run(&["export", ids[0], "-o", text(&out)]);
    Intake::read(&out, dir.path(), u64::MAX, Some(&ours.key)).expect("signed as before");
    // The other one was never signed.
    let e = fails(
        4,
        &[
            "patch",
            "verify",
            "--store",
            text(&at),
            "--require-signature",
            text(&ours.public),
        ],
    );
    assert!(e.contains(ids[1]), "{e}");
    // A file changed behind the store's back.
    let id: PatchId = ids[1].parse().expect("an id");
    let file = Store::open(&at).expect("a store").path_of(id);
    std::fs::copy(&a, &file).expect("room");
    let e = fails(4, &["patch", "verify", "--store", text(&at)]);
    assert!(e.contains("found other bytes"), "{e}");
    fails(3, &["patch", "list", "--store", text(dir.path())]);
}

#[test]
fn run_applies_what_the_store_says() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = dir.path().join("store");
    let patch = small_patch(&mini(), dir.path(), "a.gguf", 1);
    let store = Store::create(&at).expect("room");
    let strong = Add {
        scale: 40.0,
        ..PLAIN
    };
    store.add(&patch, &strong).expect("a good patch");
    let said = |more: &[&str]| {
        let model = mini();
        let given = [
            "run",
            "-m",
            text(&model),
            "-t",
            "1",
            "-p",
            QUESTION,
            "--json",
        ];
        json(&[&given, more].concat())["text"].clone()
    };
    let by_store = said(&["--store", text(&at)]);
    assert_eq!(by_store, said(&["--lora", &format!("{}:40", text(&patch))]));
    assert_ne!(by_store, said(&[]));
    let ours = signer(dir.path(), "ours");
    let e = fails(
        4,
        &[
            "run",
            "-m",
            text(&mini()),
            "-p",
            QUESTION,
            "--store",
            text(&at),
            "--require-signature",
            text(&ours.public),
        ],
    );
    assert!(e.contains("signature"), "{e}");
}

/// Both ways, with the real program.
#[test]
fn minisign_agrees() {
    use std::process::Command;
    let minisign = |args: &[&str]| {
        let done = Command::new("minisign").args(args).output().ok()?;
        Some(done.status.success())
    };
    if minisign(&["-v"]).is_none() {
        println!("skipped: the program minisign is not installed");
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ours = signer(dir.path(), "ours");
    let patch = small_patch(&mini(), dir.path(), "a.gguf", 1);
    ours.sign(&patch, Some(3));
    let verifies = || minisign(&["-V", "-p", text(&ours.public), "-m", text(&patch)]);
    assert_eq!(verifies(), Some(true));
    let theirs = small_patch(&mini(), dir.path(), "b.gguf", 2);
    let (public, secret) = (dir.path().join("their.pub"), dir.path().join("their.key"));
    let made = minisign(&["-G", "-W", "-p", text(&public), "-s", text(&secret)]);
    assert_eq!(made, Some(true));
    let signed = minisign(&["-S", "-s", text(&secret), "-m", text(&theirs)]);
    assert_eq!(signed, Some(true));
    let key = PublicKey::parse(text(&public)).expect("a key");
    Intake::read(&theirs, dir.path(), u64::MAX, Some(&key)).expect("signed by it");
    let e = Intake::read(&theirs, dir.path(), u64::MAX, Some(&ours.key)).expect_err("another key");
    assert_eq!(e.exit_code(), 4, "{e}");
    let mut bytes = std::fs::read(&patch).expect("readable");
    bytes[100] ^= 1;
    std::fs::write(&patch, bytes).expect("room");
    assert_eq!(verifies(), Some(false));
}

#[test]
fn a_runtime_follows_its_store() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = dir.path().join("store");
    let (a, b) = (
        small_patch(&mini(), dir.path(), "a.gguf", 1),
        small_patch(&mini(), dir.path(), "b.gguf", 2),
    );
    let store = Store::create(&at).expect("room");
    let first = store.add(&a, &PLAIN).expect("a good patch");
    let options = Options {
        store: Some(at.clone()),
        ..options()
    };
    let runtime = Runtime::open(mini(), options.clone()).expect("the embedded model");
    assert!(runtime.active().contains(first), "active from the start");
    let mut session = runtime.session().expect("a session");
    let mut score = || {
        let score = session.score(QUESTION, ANSWER, &mut |_| true)?;
        Ok::<_, nepenthe::Error>((score.logprob(), score.set.patches().len()))
    };
    let with_a = score().expect("a score");
    // What is the store's is changed there.
    for e in [
        runtime.revoke(first).expect_err("the store's"),
        runtime.apply(&a, 2.0).expect_err("the store's"),
    ] {
        assert!(e.to_string().contains("nepenthe patch"), "{e}");
    }
    let second = store.add(&b, &PLAIN).expect("a good patch");
    let with_both = score().expect("a score");
    assert_eq!((with_a.1, with_both.1), (1, 2));
    assert_ne!(with_a.0, with_both.0);
    store.remove(second).expect("active");
    assert_eq!(score().expect("a score"), with_a);
    // What a call applied stays through changes of the store.
    let by_call = runtime.apply(&b, 0.5).expect("a good patch");
    store.remove(first).expect("active");
    assert_eq!(score().expect("a score").1, 1);
    assert!(runtime.active().contains(by_call));
    // An index from an older day is not followed, and nothing is answered meanwhile.
    let index = at.join("index.json");
    let old = std::fs::read(&index).expect("readable");
    store.add(&a, &PLAIN).expect("a good patch");
    assert_eq!(score().expect("a score").1, 2);
    std::fs::remove_file(&index).expect("there");
    std::fs::write(&index, old).expect("room");
    let e = score().expect_err("an older store");
    assert_eq!(e.exit_code(), 4, "{e}");
    assert!(e.to_string().contains("rollback"), "{e}");
    assert_eq!(
        runtime.active().patches().len(),
        2,
        "the set is what it was"
    );
    // Put right, it goes on.
    let now = std::fs::read_to_string(&index).expect("readable");
    let now = now.replace(
        "\"sequence\": 4,\n  \"accepted\"",
        "\"sequence\": 40,\n  \"accepted\"",
    );
    std::fs::remove_file(&index).expect("there");
    std::fs::write(&index, now).expect("room");
    assert_eq!(score().expect("a score").1, 1);
    // A patch file that is not what the index says keeps a runtime from starting.
    let third = store.add(&a, &PLAIN).expect("a good patch");
    std::fs::copy(&b, store.path_of(third)).expect("room");
    let Err(e) = Runtime::open(mini(), options) else {
        panic!("opened with another patch than the store's");
    };
    assert!(e.to_string().contains("found other bytes"), "{e}");
}

#[test]
fn canaries_tell_whether_a_patch_acts() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let plain = small_patch(&mini(), dir.path(), "p.gguf", 1);
    let proven = with_canaries(&plain);
    let other = small_patch(&mini(), dir.path(), "q.gguf", 2);
    let open = OpenModel::open(&mini(), 0).expect("the embedded model");
    let canaries = Patch::open(&proven)
        .expect("good")
        .info
        .expect("ours")
        .canaries;
    let effect = |open: &OpenModel, specs: &[(&Path, f32)]| {
        let adapters = open_adapters(open, specs.iter().copied()).expect("good patches");
        measure(&open.model, &adapters, &canaries, 1)
            .expect("they can be run")
            .expect("there are canaries")
    };
    let acts = effect(&open, &[(&proven, 1.0)]);
    acts.believe("p").expect("it acts");
    assert!((acts.strength - 1.0).abs() < 0.02, "{acts:?}");
    // Not applied, all but not applied, undone, and another one in its place.
    for specs in [
        &[][..],
        &[(proven.as_path(), 0.2)],
        &[(proven.as_path(), -1.0)],
        &[(other.as_path(), 1.0)],
    ] {
        let found = effect(&open, specs);
        let e = found.believe("p").expect_err("it does not act");
        assert!(e.to_string().contains("not active"), "{e}");
    }
    // Another model of the same shapes.
    let f32s = dir.path().join("f32.gguf");
    decoded(&mini(), &f32s);
    let gguf = Gguf::open(&f32s).expect("good");
    let changed = dir.path().join("changed.gguf");
    let zeros = vec![
        0;
        gguf.require("blk.1.ffn_down.weight")
            .expect("a llama")
            .n_bytes as usize
    ];
    let mut file = GgufWriter::new(&changed, gguf.metadata().clone());
    for t in gguf.tensors() {
        if t.name == "blk.1.ffn_down.weight" {
            file.tensor_from_bytes(&t.name, t.dims(), GgmlType::F32, &zeros)
                .expect("good");
        } else {
            file.copy_tensor(&gguf, &t.name).expect("good");
        }
    }
    file.save(true).expect("room");
    let open = OpenModel::open(&changed, 0).expect("a model");
    let e = effect(&open, &[]).believe("p").expect_err("another model");
    assert!(e.to_string().contains("another model"), "{e}");
    // The commands say the same.
    let verify = |patch: &Path| {
        [
            "patch",
            "verify",
            "--live",
            "-t",
            "1",
            "-m",
            text(&mini()),
            text(patch),
        ]
        .map(str::to_owned)
    };
    let args = verify(&proven);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let out = nepenthe(&args);
    assert!(
        String::from_utf8_lossy(&out.stdout).contains("active (strength 1.0"),
        "{out:?}"
    );
    let args = verify(&plain);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    assert!(fails(4, &args).contains("no canaries"));
}

#[test]
fn a_runtime_refuses_a_patch_that_does_not_act() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let proven = with_canaries(&small_patch(&mini(), dir.path(), "p.gguf", 1));
    let second = with_canaries(&small_patch(&mini(), dir.path(), "q.gguf", 2));
    let runtime = Runtime::open(mini(), options()).expect("the embedded model");
    let id = runtime.apply(&proven, 1.0).expect("it acts");
    runtime
        .apply(&second, 0.7)
        .expect("both act as one adapter");
    runtime.revoke(id).expect("active");
    // The canaries of one patch in another: a stand-in for an adapter that silently does nothing.
    let mut patch = Patch::open(&proven).expect("good");
    for u in &mut patch.updates {
        u.lora_b.fill(0.0);
    }
    let idle = dir.path().join("idle.gguf");
    patch.save(&idle, true).expect("room");
    let generation = runtime.active().generation();
    let e = runtime.apply(&idle, 1.0).expect_err("it does nothing");
    assert_eq!(e.exit_code(), 4, "{e}");
    assert!(e.to_string().contains("idle.gguf: not active"), "{e}");
    assert_eq!(runtime.active().generation(), generation);
}
