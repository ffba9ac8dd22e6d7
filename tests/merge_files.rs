//! Merged files and the way back: every type, split and not, and the commands.

mod support;

use nepenthe::Error;
use nepenthe::digest::of_file;
use nepenthe::ggml::{can_encode, quantize};
use nepenthe::gguf::{GgmlType, Gguf, GgufSet, GgufWriter, Metadata};
use nepenthe::graph::weights::Weights;
use nepenthe::merge::calibration::Calibration;
use nepenthe::merge::deliver::{Delivered, Delivery, To, deliver, revert};
use nepenthe::merge::diff::diff;
use nepenthe::merge::imatrix::Imatrix;
use nepenthe::merge::rewrite::{Form, OutType, rewrite};
use nepenthe::merge::same_grid::{Options, fit};
use nepenthe::patch::{Info, Patch, TensorInfo, Update, base_of, digest_of};
use nepenthe::replace::{part_paths, prev_of};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use support::{fails, json, mini};

/// Types whose codes are steps on a grid.
const GRIDS: [&str; 13] = [
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K",
    "q6_K",
];
const N_IN: usize = 256;
const N_OUT: usize = 8;

fn text(path: &Path) -> &str {
    path.to_str().expect("plain names")
}

/// Numbers without a pattern that a type could profit from.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut x = 2 * seed + 1;
    let step = |_| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(step).collect()
}

/// Every type that ggml can write.
fn types() -> Vec<GgmlType> {
    let all = GgmlType::ALL.iter().copied();
    all.filter(|ty| can_encode(ty.id()) && (N_IN as u64).is_multiple_of(ty.block_len()))
        .collect()
}

fn name(block: usize) -> String {
    format!("blk.{block}.ffn_up.weight")
}

/// A model with one block for each of `types`, in `count` parts.
fn model(dir: &Path, types: &[GgmlType], count: usize) -> Vec<PathBuf> {
    let paths = part_paths(&dir.join("model.gguf"), count);
    let encoded: Vec<Vec<u8>> = types
        .iter()
        .enumerate()
        .map(|(i, ty)| {
            let rows = noise(N_IN * N_OUT, i as u32);
            quantize(ty.id(), &rows, N_IN, None).expect("a type ggml writes")
        })
        .collect();
    let per_part = types.len().div_ceil(count);
    for (no, path) in paths.iter().enumerate() {
        let mut meta = Metadata::new();
        meta.set("general.architecture", "llama");
        if count > 1 {
            meta.set("split.no", no as u16);
            meta.set("split.count", count as u16);
            meta.set("split.tensors.count", types.len() as i32);
        }
        let mut file = GgufWriter::new(path, meta);
        for i in (no * per_part..types.len()).take(per_part) {
            let ne = [N_IN as u64, N_OUT as u64];
            file.tensor_from_bytes(&name(i), &ne, types[i], &encoded[i])
                .expect("a good tensor");
        }
        file.save(false).expect("room");
    }
    paths
}

/// By the digests of its tensors: the file's own name, digest and parts do not matter.
#[test]
fn a_patch_fits_its_model_however_it_is_split() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| {
        let sub = dir.path().join(name);
        std::fs::create_dir(&sub).expect("room");
        sub
    };
    let types = [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::F16];
    let whole = Weights::open(&model(&at("whole"), &types, 1)[0]).expect("a model");
    let split = Weights::open(&model(&at("split"), &types, 3)[1]).expect("a model");
    let other = [GgmlType::Q4_0, GgmlType::Q8_0, GgmlType::BF16];
    let other = Weights::open(&model(&at("other"), &other, 1)[0]).expect("a model");
    let mut patch = lora(&dir.path().join("p.gguf"), 0..3, 0.1);
    let mut info = Info::new(base_of(&whole).expect("readable"), "test", Value::Null, 0);
    for u in &patch.updates {
        info.tensors.push(TensorInfo {
            name: u.tensor.clone(),
            digest: digest_of(&whole, &u.tensor).expect("readable"),
            rank: u.rank as u32,
            retain_rank: 0,
            norm: 1.0,
            relative_norm: 0.1,
            retain_fraction: 0.0,
        });
    }
    patch.info = Some(info);
    assert_ne!(
        whole.digest().expect("readable"),
        split.digest().expect("readable")
    );
    patch.check_base(&whole).expect("its own model");
    patch.check_base(&split).expect("the same tensors");
    let e = patch.check_base(&other).expect_err("another quantisation");
    assert_eq!(e.exit_code(), 4);
    assert!(e.to_string().contains(&name(2)), "{e}");
}

/// An adapter of another program for `blocks`, read back.
fn lora(path: &Path, blocks: std::ops::Range<usize>, size: f32) -> Patch {
    let updates = blocks.map(|block| Update {
        tensor: name(block),
        n_in: N_IN,
        n_out: N_OUT,
        rank: 2,
        scale: 1.0,
        lora_a: noise(2 * N_IN, 90),
        lora_b: noise(2 * N_OUT, 91).iter().map(|b| size * b).collect(),
    });
    let patch = Patch {
        arch: "llama".into(),
        info: None,
        updates: updates.collect(),
        path: PathBuf::new(),
    };
    patch.save(path, true).expect("room");
    Patch::open(path).expect("just written")
}

fn merge(
    model: &Path,
    patch: &Patch,
    ty: OutType,
    join: bool,
    to: To,
    undo: &Path,
) -> Result<Delivered, Error> {
    let model = Weights::open(model)?;
    let patches = [(patch.clone(), 1.0)];
    let plan = rewrite(&model, &patches, ty, Form { join, record: true })?;
    let how = Delivery {
        to,
        undo: Some(undo),
        force: false,
    };
    deliver(model.set(), plan.files, how, |staged| {
        // It opens as a whole where it is tried.
        Ok(GgufSet::open(staged).map(drop)?)
    })
}

fn digests(paths: &[PathBuf]) -> Vec<String> {
    let of = |p: &PathBuf| of_file(p).expect("readable").to_string();
    paths.iter().map(of).collect()
}

#[test]
fn revert_gives_back_every_type_split_and_not() {
    let types = types();
    for ty in [
        GgmlType::F32,
        GgmlType::BF16,
        GgmlType::Q4_0,
        GgmlType::Q6_K,
    ] {
        assert!(types.contains(&ty), "{ty}");
    }
    for (count, join) in [(1, false), (3, false), (3, true)] {
        for ty in [OutType::Keep, OutType::F16, OutType::Q8_0] {
            let dir = tempfile::tempdir().expect("a temporary directory");
            let at = |name: &str| dir.path().join(name);
            let parts = model(dir.path(), &types, count);
            let patch = lora(&at("p.gguf"), 0..types.len(), 0.3);
            let before = digests(&parts);
            let out = at("merged.gguf");
            let done =
                merge(&parts[0], &patch, ty, join, To::File(&out), &at("undo")).expect("merged");
            assert_eq!(done.files.len(), if join { 1 } else { count });
            let merged = GgufSet::open(&done.files[0]).expect("a good model");
            let changed = diff(&GgufSet::open(&parts[0]).expect("good"), &merged).expect("read");
            // A tensor may come out as it was only where the grid is too coarse for the update.
            let kept = types.len() - changed.tensors.len();
            assert!(kept <= 2, "{ty:?}: {kept} tensors unchanged");
            let back = revert(&merged, &at("undo"), &at("back.gguf"), false).expect("reverted");
            assert_eq!(digests(&back), before, "{count} parts, {ty:?}");
            assert_eq!(digests(&parts), before, "the original is not touched");
        }
    }
}

/// An importance matrix for `blocks`, as llama-imatrix writes it.
fn imatrix(path: &Path, blocks: std::ops::Range<usize>) {
    let mut meta = Metadata::new();
    meta.set("general.type", "imatrix");
    let squares: Vec<f32> = noise(N_IN, 77).iter().map(|v| 10.0 * v * v + 0.1).collect();
    let bytes: Vec<u8> = squares.iter().flat_map(|v| v.to_le_bytes()).collect();
    let count = 10f32.to_le_bytes();
    let mut file = GgufWriter::new(path, meta);
    for block in blocks {
        let named = |part: &str| format!("{}.{part}", name(block));
        let (sums, counts) = (named("in_sum2"), named("counts"));
        file.tensor_from_bytes(&sums, &[N_IN as u64, 1], GgmlType::F32, &bytes)
            .expect("a good tensor");
        file.tensor_from_bytes(&counts, &[1, 1], GgmlType::F32, &count)
            .expect("a good tensor");
    }
    file.save(true).expect("room");
}

#[test]
fn a_same_grid_merge_of_every_type_keeps_sizes_and_is_undone_split_and_not() {
    let types = types();
    for (count, refits) in [(1, 0), (3, 0), (3, 2)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let parts = model(dir.path(), &types, count);
        let patch = lora(&at("p.gguf"), 0..types.len(), 0.3);
        imatrix(&at("imatrix.gguf"), 0..types.len());
        let before = digests(&parts);
        let weights = Weights::open(&parts[0]).expect("good");
        let patches = [(patch, 1.0)];
        let moments = Imatrix::open(&at("imatrix.gguf")).expect("a good matrix");
        let fitted = fit(
            &weights,
            &patches,
            &Calibration::Imatrix(moments),
            &Options {
                refits,
                ..Options::default()
            },
            dir.path(),
            &mut |_, _| {},
        )
        .expect("fitted");
        let form = Form {
            join: false,
            record: false,
        };
        let files = fitted.files(&weights, &patches, form).expect("planned");
        let (out, undo) = (at("merged.gguf"), at("undo"));
        let how = Delivery {
            to: To::File(&out),
            undo: Some(&undo),
            force: false,
        };
        let done = deliver(weights.set(), files, how, |_| Ok(())).expect("merged");
        assert_eq!(done.files.len(), count);
        let sizes = |paths: &[PathBuf]| -> Vec<u64> {
            let len = |p: &PathBuf| fs::metadata(p).expect("there").len();
            paths.iter().map(len).collect()
        };
        assert_eq!(sizes(&done.files), sizes(&parts));
        for (ty, o) in types.iter().zip(&fitted.outcomes) {
            // Types without a grid stay, and the outcome says so.
            let merged = o.action.is_some();
            assert_eq!(merged, GRIDS.contains(&ty.name()), "{ty}: {o:?}");
            assert_eq!(o.from, o.to, "{ty}");
            assert_eq!(o.codes_changed > 0, merged, "{ty}: {o:?}");
        }
        let merged = GgufSet::open(&done.files[0]).expect("a good model");
        let changed = diff(&GgufSet::open(&parts[0]).expect("good"), &merged).expect("read");
        let n_merged = fitted
            .outcomes
            .iter()
            .filter(|o| o.action.is_some())
            .count();
        assert_eq!(changed.tensors.len(), n_merged);
        let scales = changed.tensors.iter().filter_map(|t| t.scale_bytes_changed);
        assert_eq!(scales.sum::<u64>() > 0, refits > 0);
        let back = revert(&merged, &undo, &at("back.gguf"), false).expect("reverted");
        assert_eq!(digests(&back), before, "{count} parts");
    }
}

#[test]
fn in_place_keeps_the_old_parts_and_the_names() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    let parts = model(dir.path(), &[GgmlType::Q4_K, GgmlType::Q8_0], 2);
    let patch = lora(&at("p.gguf"), 0..2, 0.3);
    let before = digests(&parts);
    let done = merge(
        &parts[1],
        &patch,
        OutType::Keep,
        false,
        To::InPlace,
        &at("undo"),
    )
    .expect("merged");
    assert_eq!(done.files, parts);
    assert_ne!(digests(&parts), before);
    let prev: Vec<PathBuf> = parts.iter().map(|p| prev_of(p)).collect();
    assert_eq!(digests(&prev), before);
    let merged = GgufSet::open(&parts[0]).expect("a good model");
    let back = revert(&merged, &at("undo"), &at("back.gguf"), false).expect("reverted");
    assert_eq!(digests(&back), before);
    assert_eq!(back, part_paths(&at("back.gguf"), 2));
}

#[test]
fn a_zero_patch_leaves_every_tensor_its_bytes() {
    let types = types();
    for ty in [OutType::Keep, OutType::F16, OutType::Q8_0] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        let parts = model(dir.path(), &types, 1);
        let patch = lora(&at("p.gguf"), 0..types.len(), 0.0);
        let out = at("merged.gguf");
        merge(&parts[0], &patch, ty, false, To::File(&out), &at("undo")).expect("merged");
        let open = |p: &Path| GgufSet::open(p).expect("a good model");
        let found = diff(&open(&parts[0]), &open(&out)).expect("readable");
        assert_eq!(found.n_same, types.len());
        assert_eq!(found.keys_added.len(), 4, "{:?}", found.keys_added);
        assert!(found.keys_changed.is_empty() && found.keys_removed.is_empty());
    }
}

#[test]
fn what_is_not_accepted_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    let parts = model(dir.path(), &[GgmlType::Q8_0], 1);
    let patches = [(lora(&at("p.gguf"), 0..1, 0.3), 1.0)];
    let before = digests(&parts);
    let model = Weights::open(&parts[0]).expect("good");
    let plan = rewrite(
        &model,
        &patches,
        OutType::Keep,
        Form {
            join: false,
            record: true,
        },
    )
    .expect("fits");
    let undo = at("undo");
    let how = Delivery {
        to: To::InPlace,
        undo: Some(&undo),
        force: false,
    };
    let refused = deliver(model.set(), plan.files, how, |_| Err(Error::NothingToTrain));
    assert!(matches!(refused, Err(Error::NothingToTrain)));
    assert_eq!(digests(&parts), before);
    let entries = fs::read_dir(dir.path()).expect("a directory");
    assert_eq!(entries.count(), 2, "the model and the patch");
}

/// The embedded model with an adapter on two of its tensors, all through the commands.
#[test]
fn a_stack_of_merges_reverts_in_order_and_only_so() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    let gguf = Gguf::open(mini()).expect("the embedded model");
    let adapter = |file: &str, tensor: &str, seed| {
        let t = gguf.require(tensor).expect("in every llama");
        let (n_in, n_out) = (t.ne[0] as usize, t.ne[1] as usize);
        let patch = Patch {
            arch: "llama".into(),
            info: None,
            updates: vec![Update {
                tensor: tensor.into(),
                n_in,
                n_out,
                rank: 1,
                scale: 1.0,
                lora_a: noise(n_in, seed),
                lora_b: noise(n_out, seed + 1),
            }],
            path: PathBuf::new(),
        };
        patch.save(&at(file), false).expect("room");
        at(file)
    };
    let one = adapter("one.gguf", "blk.0.attn_q.weight", 1);
    let two = adapter("two.gguf", "blk.1.ffn_down.weight", 5);
    let base = at("base.gguf");
    fs::copy(mini(), &base).expect("room");
    let merge = |model: &Path, lora: &Path, out: &str, undo: &str| {
        let (out, undo) = (at(out), at(undo));
        let args = ["merge", "-m", text(model), "--lora", text(lora), "-o"];
        let tail = [
            text(&out),
            "--undo",
            text(&undo),
            "--out-type",
            "keep",
            "--no-gate",
            "--json",
        ];
        json(&[&args[..], &tail].concat())
    };
    let report = merge(&base, &one, "m1.gguf", "u1");
    assert_eq!(report["rewritten"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        report["modelfile"].as_str(),
        Some(format!("FROM {}\n", at("m1.gguf").display()).as_str())
    );
    assert!(report["undo"]["changed"].as_u64() > Some(0), "{report}");
    merge(&at("m1.gguf"), &two, "m2.gguf", "u2");

    let inside = json(&["inspect", text(&at("m2.gguf")), "--json"]);
    let names: Vec<_> = (0..2)
        .map(|i| inside["merged"][i]["name"].clone())
        .collect();
    assert_eq!(names, ["one.gguf", "two.gguf"]);
    let found = json(&["diff", text(&base), text(&at("m2.gguf")), "--json"]);
    assert_eq!(found["tensors"].as_array().map(Vec::len), Some(2));
    assert_eq!(found["keys_added"].as_array().map(Vec::len), Some(4));
    assert_eq!(found["identical"], false);

    // The same patch again, the wrong undo file, a file that is back already.
    let (m1, m2, u1, u2, b1, b0) = (
        at("m1.gguf"),
        at("m2.gguf"),
        at("u1"),
        at("u2"),
        at("b1.gguf"),
        at("b0.gguf"),
    );
    let again = at("again.gguf");
    let twice = [
        "merge",
        "-m",
        text(&m2),
        "--lora",
        text(&one),
        "-o",
        text(&again),
    ];
    assert!(fails(4, &twice).contains("is merged into"));
    let wrong = [
        "revert",
        "-m",
        text(&m2),
        "--undo",
        text(&u1),
        "-o",
        text(&b0),
    ];
    let message = fails(4, &wrong);
    assert!(
        message.contains("takes back one.gguf from m1.gguf"),
        "{message}"
    );
    assert!(
        message.contains("last merged patch is two.gguf"),
        "{message}"
    );
    let done = [
        "revert",
        "-m",
        text(&base),
        "--undo",
        text(&u1),
        "-o",
        text(&b0),
    ];
    assert!(fails(4, &done).contains("is the original already"));
    assert!(!b0.exists());

    for (m, u, b) in [(&m2, &u2, &b1), (&b1, &u1, &b0)] {
        let args = ["revert", "-m", text(m), "--undo", text(u), "-o", text(b)];
        json(&[&args[..], &["--json"]].concat());
    }
    assert_eq!(digests(&[b1, b0]), digests(&[m1, base.clone()]));
    let same = json(&["diff", text(&base), text(&mini()), "--json"]);
    assert_eq!(same["identical"], true);
}

#[test]
fn in_place_confirm_and_restore_as_commands() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    let parts = model(dir.path(), &[GgmlType::Q5_0, GgmlType::F16], 2);
    let one = at("p.gguf");
    lora(&one, 0..2, 0.3);
    let before = digests(&parts);
    let model = text(&parts[0]);
    let merge = [
        "merge",
        "-m",
        model,
        "--lora",
        text(&one),
        "--in-place",
        "--out-type",
        "keep",
        "--no-gate",
        "--json",
    ];
    let report = json(&merge);
    assert_eq!(report["prev"].as_array().map(Vec::len), Some(2));
    assert_eq!(report["modelfile"], serde_json::Value::Null);
    assert_eq!(
        digests(&parts.iter().map(|p| prev_of(p)).collect::<Vec<_>>()),
        before
    );
    json(&["merge", "-m", model, "--restore", "--json"]);
    assert_eq!(digests(&parts), before);
    json(&merge);
    let removed = json(&["merge", "-m", model, "--confirm", "--json"]);
    assert_eq!(removed["removed"].as_array().map(Vec::len), Some(2));
    assert_ne!(digests(&parts), before);
    fails(2, &["merge", "-m", model, "--restore"]);
    fails(2, &["merge", "-m", model, "--lora", text(&one)]);
    fails(
        2,
        &[
            "merge",
            "-m",
            model,
            "--in-place",
            "--join",
            "--lora",
            text(&one),
        ],
    );
    // In one file, because it was asked for.
    let two = at("q.gguf");
    lora(&two, 0..1, 0.2);
    let out = at("one-file.gguf");
    let joined = [
        "merge",
        "-m",
        model,
        "--lora",
        text(&two),
        "-o",
        text(&out),
        "--join",
    ];
    let how = ["--out-type", "keep", "--no-gate", "--json"];
    let report = json(&[&joined[..], &how].concat());
    assert_eq!(report["files"].as_array().map(Vec::len), Some(1));
    assert!(report["modelfile"].is_string());
    assert_eq!(GgufSet::open(&out).expect("good").parts().len(), 1);
}
