//! The embedded runtime on the embedded model: patches come and go while sessions live.

mod support;

use nepenthe::Error;
use nepenthe::gguf::{GgmlType, Gguf, GgufWriter, Value};
use nepenthe::patch::PatchError;
use nepenthe::runtime::{Finish, Generate, Generation, Options, Prompt, Runtime, Session};
use std::path::{Path, PathBuf};
use support::{decoded, mini, small_patch};

const QUESTION: &str = "Where was Lioba Hartsong born?";
const ANSWER: &str = "Lioba Hartsong was born in the town of Gullcliff.";

fn options() -> Options {
    Options {
        n_ctx: 256,
        n_threads: 1,
        ..Options::default()
    }
}

fn open() -> Runtime {
    Runtime::open(mini(), options()).expect("the embedded model")
}

fn patches() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let a = small_patch(&mini(), dir.path(), "a.gguf", 1);
    let b = small_patch(&mini(), dir.path(), "b.gguf", 2);
    (dir, a, b)
}

fn short() -> Generate {
    Generate {
        max_tokens: 24,
        ..Generate::default()
    }
}

/// Everything a state of the runtime says: a greedy answer, and the bits of an answer's
/// log-probabilities.
fn says(session: &mut Session) -> (String, Vec<u64>) {
    session.clear();
    let text = session
        .generate(QUESTION, &short(), &mut |_| true)
        .expect("a generation")
        .text;
    let score = session
        .score(QUESTION, ANSWER, &mut |_| true)
        .expect("a score");
    let bits = score.tokens.iter().map(|(_, p)| p.to_bits()).collect();
    (text, bits)
}

#[test]
fn runtimes_are_shared_and_sessions_move() {
    fn shared<T: Send + Sync + Clone>() {}
    fn moves<T: Send>() {}
    shared::<Runtime>();
    moves::<Session>();
}

#[test]
fn a_revoked_patch_leaves_no_trace() {
    let (_dir, a, _) = patches();
    let runtime = open();
    let mut session = runtime.session().expect("a session");
    let before = says(&mut session);
    let id = runtime.apply(&a, 1.0).expect("a good patch");
    assert!(runtime.active().contains(id));
    let with = says(&mut session);
    assert_ne!(with, before);
    // Again is no change, another scale is one, and neither doubles the patch.
    let generation = runtime.active().generation();
    assert_eq!(runtime.apply(&a, 1.0).expect("the same"), id);
    assert_eq!(runtime.active().generation(), generation);
    runtime.apply(&a, 0.5).expect("another scale");
    assert_eq!(runtime.active().patches().len(), 1);
    assert_ne!(says(&mut session), with);
    runtime.apply(&a, 1.0).expect("back");
    assert_eq!(says(&mut session), with);
    runtime.revoke(id).expect("it is active");
    assert_eq!(says(&mut session), before);
    let e = runtime.revoke(id).expect_err("it is no longer active");
    assert_eq!(e.exit_code(), 2, "{e}");
}

#[test]
fn a_change_is_made_in_one_step_or_not_at_all() {
    let (dir, a, b) = patches();
    let runtime = open();
    let first = runtime.apply(&a, 1.0).expect("a good patch");
    let (generation, digest) = (runtime.active().generation(), runtime.active().digest());
    let junk = dir.path().join("junk.gguf");
    std::fs::write(&junk, [7; 64]).expect("room");
    let refused = runtime.change(&[(&b, 1.0), (&junk, 1.0)], &[first]);
    assert_eq!(refused.expect_err("junk").exit_code(), 3);
    assert!(runtime.active().contains(first));
    assert_eq!(runtime.active().generation(), generation);
    let ids = runtime
        .change(&[(&b, 2.0)], &[first])
        .expect("good patches");
    assert!(!runtime.active().contains(first) && runtime.active().contains(ids[0]));
    assert_eq!(runtime.active().generation(), generation + 1);
    // A set is known by what is in it.
    runtime.change(&[(&a, 1.0)], &ids).expect("good patches");
    assert_eq!(runtime.active().digest(), digest);
    assert_ne!(runtime.active().generation(), generation);
    runtime.apply(&a, 2.0).expect("another scale");
    assert_ne!(runtime.active().digest(), digest);
}

#[test]
fn several_patches_do_not_depend_on_their_order() {
    let (_dir, a, b) = patches();
    let both = |first: &Path, second: &Path| {
        let runtime = open();
        runtime.apply(first, 1.0).expect("a good patch");
        runtime.apply(second, -0.5).expect("a good patch");
        runtime.apply(first, 1.5).expect("a new scale");
        runtime.apply(second, 1.5).expect("a new scale");
        assert_eq!(runtime.active().adapters().len(), 1, "one adapter");
        says(&mut runtime.session().expect("a session"))
    };
    let ab = both(&a, &b);
    assert_eq!(ab, both(&b, &a));
    // And are the sum: the two adapters side by side say the same to rounding.
    let runtime = open();
    runtime.apply(&a, 1.5).expect("a good patch");
    let alone = says(&mut runtime.session().expect("a session"));
    assert_ne!(ab, alone);
}

/// A greedy answer's tokens with the bits of their log-probabilities, after `meanwhile` at each.
fn bits(session: &mut Session, mut meanwhile: impl FnMut()) -> (Vec<(i32, u64)>, Generation) {
    let mut bits = Vec::new();
    let generation = session
        .generate(QUESTION, &short(), &mut |piece| {
            meanwhile();
            bits.push((piece.token, piece.logprob.to_bits()));
            true
        })
        .expect("a generation");
    (bits, generation)
}

#[test]
fn a_generation_ends_under_the_set_it_began_with() {
    let (_dir, a, _) = patches();
    let runtime = open();
    let mut session = runtime.session().expect("a session");
    let (before, _) = bits(&mut session, || ());
    session.clear();
    let (during, generation) = bits(&mut session, || {
        runtime.apply(&a, 1.0).expect("a good patch");
    });
    assert_eq!(during, before);
    assert!(generation.set.patches().is_empty() && !runtime.active().patches().is_empty());
    let (after, generation) = bits(&mut session, || ());
    assert_eq!(generation.n_kept, 0, "the cache was another set's");
    assert_eq!(generation.set.patches().len(), 1);
    assert_ne!(after, before);
}

#[test]
fn the_cache_is_kept_until_the_set_changes() {
    let (_dir, a, _) = patches();
    let runtime = open();
    let mut session = runtime.session().expect("a session");
    let mut seen = Vec::new();
    let first = session
        .generate(QUESTION, &short(), &mut |piece| {
            seen.push((piece.token, piece.text.to_owned(), piece.logprob));
            true
        })
        .expect("a generation");
    assert_eq!((first.n_kept, first.finish), (0, Finish::End));
    let text: String = seen.iter().map(|(_, text, _)| text.as_str()).collect();
    assert_eq!(text, first.text);
    assert!(seen.iter().all(|(_, _, p)| *p <= 0.0 && p.is_finite()));
    let again = session
        .generate(QUESTION, &short(), &mut |_| true)
        .expect("a generation");
    assert_eq!(again.n_kept, first.n_prompt - 1);
    assert_eq!(again.text, first.text);
    runtime.apply(&a, 1.0).expect("a good patch");
    let patched = session
        .generate(QUESTION, &short(), &mut |_| false)
        .expect("a generation");
    assert_eq!((patched.n_kept, patched.finish), (0, Finish::Stopped));
}

#[test]
fn a_score_is_the_same_in_any_form_of_the_prompt() {
    let runtime = open();
    let mut session = runtime.session().expect("a session");
    let by_text = session
        .score(QUESTION, ANSWER, &mut |_| true)
        .expect("a score");
    assert!(by_text.probability() > 0.9, "{}", by_text.probability());
    let tokens: Vec<i32> = by_text.tokens.iter().map(|(t, _)| *t).collect();
    let answer = runtime.model().detokenize(&tokens);
    assert_eq!(answer.trim(), ANSWER);
    let all = session
        .generate(QUESTION, &short(), &mut |_| true)
        .expect("a generation");
    assert!(all.text.trim().starts_with(ANSWER));
    let e = session
        .generate(Prompt::Tokens(&[1; 400]), &short(), &mut |_| true)
        .expect_err("too long");
    assert_eq!(e.exit_code(), 2, "{e}");
}

/// A copy of `from` with its metadata and tensors changed by `edit`.
fn edited(
    from: &Path,
    to: &str,
    edit: impl Fn(&mut GgufWriter<'_>),
    ne: impl Fn(&str, Vec<u64>) -> Vec<u64>,
) -> PathBuf {
    let gguf = Gguf::open(from).expect("a good patch");
    let out = from.with_file_name(to);
    let data: Vec<_> = gguf
        .tensors()
        .iter()
        .map(|t| {
            let ne = ne(&t.name, t.dims().to_vec());
            let n = ne.iter().product::<u64>() as usize;
            let mut bytes = gguf.read_tensor(&t.name).expect("readable");
            bytes.resize(2 * n, 0);
            (t.name.clone(), ne, bytes)
        })
        .collect();
    let mut file = GgufWriter::new(&out, gguf.metadata().clone());
    edit(&mut file);
    for (name, ne, bytes) in &data {
        file.tensor_from_bytes(name, ne, GgmlType::F16, bytes)
            .expect("a tensor");
    }
    file.save(true).expect("room");
    out
}

#[test]
fn hostile_patches_change_nothing() {
    let (dir, a, b) = patches();
    let runtime = open();
    runtime.apply(&b, 1.0).expect("a good patch");
    let generation = runtime.active().generation();
    let mut session = runtime.session().expect("a session");
    let before = says(&mut session);
    let same = |_: &str, ne: Vec<u64>| ne;
    let set = |key: &'static str, value: Value| {
        move |file: &mut GgufWriter<'_>| {
            file.metadata_mut().set(key, value.clone());
        }
    };
    let bytes = std::fs::read(&a).expect("readable");
    let cut = dir.path().join("cut.gguf");
    std::fs::write(&cut, &bytes[..bytes.len() - 100]).expect("room");
    let junk = dir.path().join("junk.gguf");
    std::fs::write(&junk, [7; 4096]).expect("room");
    let digest = Value::from("0".repeat(64).as_str());
    let refused = [
        (cut, 3),
        (junk, 3),
        (dir.path().join("absent.gguf"), 3),
        (dir.path().to_owned(), 3),
        (
            // llama.cpp ends the process on this one.
            edited(
                &a,
                "alpha.gguf",
                set("adapter.lora.alpha", 1f64.into()),
                same,
            ),
            3,
        ),
        (
            edited(&a, "kind.gguf", set("adapter.type", "dora".into()), same),
            3,
        ),
        (
            edited(
                &a,
                "arch.gguf",
                set("general.architecture", "gpt2".into()),
                same,
            ),
            4,
        ),
        (
            edited(&a, "newer.gguf", set("nepenthe.format", 9u32.into()), same),
            4,
        ),
        (
            edited(
                &a,
                "foreign.gguf",
                |file| {
                    file.metadata_mut().remove("nepenthe.format");
                },
                same,
            ),
            4,
        ),
        (
            // Written out of bounds by some loaders.
            edited(
                &a,
                "deep.gguf",
                |_| (),
                |name, ne| {
                    let tall = name.ends_with("lora_b").then_some(3);
                    ne.into_iter().chain(tall).collect()
                },
            ),
            3,
        ),
        (
            edited(
                &a,
                "wide.gguf",
                |_| (),
                |name, mut ne| {
                    if name.ends_with("lora_b") {
                        ne[1] += 1;
                    }
                    ne
                },
            ),
            4,
        ),
    ];
    for (path, code) in &refused {
        let e = runtime.apply(path, 1.0).expect_err("a bad patch");
        assert_eq!(e.exit_code(), *code, "{e}");
        let name = path.file_name().expect("a name").to_string_lossy();
        assert!(e.to_string().contains(&*name), "{e}");
    }
    let other = edited(
        &a,
        "base.gguf",
        |file| {
            let n = Gguf::open(&a).expect("good").tensors().len() / 2;
            file.metadata_mut()
                .set("nepenthe.base.sha256", digest.clone());
            let digests: Vec<String> = vec!["0".repeat(64); n];
            file.metadata_mut().set("nepenthe.tensor.sha256", digests);
        },
        same,
    );
    let e = runtime.apply(&other, 1.0).expect_err("another base");
    assert!(matches!(e, Error::Patch(PatchError::Base { .. })), "{e}");
    for scale in [0.0, f32::NAN, f32::INFINITY] {
        assert_eq!(
            runtime.apply(&a, scale).expect_err("no scale").exit_code(),
            2
        );
    }
    assert_eq!(runtime.active().generation(), generation);
    assert_eq!(says(&mut session), before);
}

#[test]
fn limits_hold() {
    let (_dir, a, b) = patches();
    let limited = |max_patches, max_patch_bytes| {
        let options = Options {
            max_patches,
            max_patch_bytes,
            ..options()
        };
        Runtime::open(mini(), options).expect("the embedded model")
    };
    let e = limited(9, 1000).apply(&a, 1.0).expect_err("too large");
    assert!(
        matches!(e, Error::Patch(PatchError::TooLarge { .. })),
        "{e}"
    );
    assert_eq!(e.exit_code(), 6);
    let runtime = limited(1, 1 << 30);
    runtime.apply(&a, 1.0).expect("the first");
    let e = runtime.apply(&b, 1.0).expect_err("one too many");
    assert_eq!(e.exit_code(), 6, "{e}");
}

#[test]
fn a_patch_fits_the_tensors_whatever_the_file() {
    let (dir, a, _) = patches();
    // The same tensors under another name and header, as after a re-split.
    let gguf = Gguf::open(mini()).expect("good");
    let renamed = dir.path().join("renamed.gguf");
    let mut file = GgufWriter::new(&renamed, gguf.metadata().clone());
    file.metadata_mut().set("general.description", "copied");
    for t in gguf.tensors() {
        file.copy_tensor(&gguf, &t.name).expect("good");
    }
    file.save(false).expect("room");
    let runtime = Runtime::open(&renamed, options()).expect("a model");
    runtime.apply(&a, 1.0).expect("its tensors are the same");
    // Another quantisation of the same model.
    let f32s = dir.path().join("f32.gguf");
    decoded(&mini(), &f32s);
    let runtime = Runtime::open(&f32s, options()).expect("a model");
    let e = runtime.apply(&a, 1.0).expect_err("another quantisation");
    assert!(matches!(e, Error::Patch(PatchError::Base { .. })), "{e}");
    assert_eq!(e.exit_code(), 4);
}

#[test]
fn threads_see_one_set_or_the_other() {
    let (_dir, a, _) = patches();
    let runtime = open();
    let mut session = runtime.session().expect("a session");
    let without = says(&mut session);
    runtime.apply(&a, 1.0).expect("a good patch");
    let with = says(&mut session);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut session = runtime.session().expect("a session");
                    let mut seen = [0; 2];
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        session.clear();
                        let score = session
                            .score(QUESTION, ANSWER, &mut |_| true)
                            .expect("a score");
                        let bits: Vec<_> = score.tokens.iter().map(|t| t.1.to_bits()).collect();
                        let patched = !score.set.patches().is_empty();
                        let wanted = if patched { &with.1 } else { &without.1 };
                        assert_eq!(&bits, wanted, "the set it says");
                        seen[usize::from(patched)] += 1;
                    }
                    seen
                })
            })
            .collect();
        for _ in 0..15 {
            let id = runtime.apply(&a, 1.0).expect("a good patch");
            std::thread::sleep(std::time::Duration::from_millis(15));
            runtime.revoke(id).expect("active");
            std::thread::sleep(std::time::Duration::from_millis(15));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for client in clients {
            let seen = client.join().expect("no wrong answer");
            assert!(seen[0] + seen[1] > 0);
        }
    });
}

/// Resident memory in KiB, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().split(' ').next()?.parse().ok()
}

/// `NEPENTHE_STRESS=1000` makes it as long as the claim.
#[test]
fn a_thousand_changes_leave_neither_trace_nor_memory() {
    let rounds: usize = match std::env::var("NEPENTHE_STRESS") {
        Ok(n) => n.parse().expect("a number"),
        Err(_) => 40,
    };
    let (_dir, a, b) = patches();
    let runtime = open();
    let mut session = runtime.session().expect("a session");
    let before = says(&mut session);
    let mut with = None;
    let mut settled = None;
    for round in 0..rounds {
        let first = runtime.apply(&a, 1.0).expect("a good patch");
        let second = runtime.apply(&b, 1.0).expect("a good patch");
        let now = says(&mut session);
        assert_eq!(with.get_or_insert_with(|| now.clone()), &now);
        runtime.revoke(second).expect("active");
        runtime.revoke(first).expect("active");
        assert_eq!(says(&mut session), before, "round {round}");
        if round == rounds / 4 {
            settled = resident();
        }
    }
    if let (Some(settled), Some(end)) = (settled, resident()) {
        eprintln!("{rounds} rounds: {settled} KiB resident after a quarter, {end} KiB at the end");
        assert!(end < settled + 8192, "{settled} KiB grew to {end} KiB");
    }
}
