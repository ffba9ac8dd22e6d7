use super::*;
use crate::digest::Digest;
use crate::gguf::{GgufWriter, Metadata};
use crate::merge::inputs::{Input, Rows};
use crate::merge::spill::Spill;

const N: usize = 96;
const NAME: &str = "blk.3.ffn_down.weight";

/// Rows of three sets with a decaying spectrum and directions of their own, as if captured.
fn captured(n_tokens: usize) -> Captured {
    let mut spill = Spill::new(&std::env::temp_dir()).expect("a temporary file");
    let mut rng = SplitMix64(11);
    let mixing: Vec<f32> = (0..N * N)
        .map(|_| rng.normal() / (N as f32).sqrt())
        .collect();
    let mut input = Input {
        tensors: vec![NAME.into(), "blk.3.other.weight".into()],
        n_in: N,
        starts: Vec::new(),
        energy: [[0.0; 2]; 3],
    };
    let mut batches = Vec::new();
    for (s, set) in Set::ALL.into_iter().enumerate() {
        let rows: Vec<Vec<f32>> = (0..n_tokens)
            .map(|_| {
                let z: Vec<f32> = (0..N)
                    .map(|i| rng.normal() * 8.0 / (1.0 + ((i + 31 * s) % N) as f32))
                    .collect();
                mixing
                    .chunks(N)
                    .map(|m| m.iter().zip(&z).map(|(m, z)| m * z).sum())
                    .collect()
            })
            .collect();
        input.energy[s][0] = rows.iter().flatten().map(|&v| f64::from(v).powi(2)).sum();
        let start = spill.append(N, rows.iter().map(Vec::as_slice));
        input.starts.push(start.expect("written"));
        batches.push(Rows {
            set,
            n: [n_tokens, 0],
        });
    }
    Captured::new(vec![input], batches, spill)
}

fn config(max_rank: usize) -> SketchConfig {
    SketchConfig {
        max_rank,
        ..SketchConfig::default()
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v * v).sum::<f64>().sqrt()
}

fn minus(a: &[f32], b: &[f32]) -> f64 {
    norm(a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)))
}

fn eigenvalues(h: &[f32]) -> Vec<f64> {
    let h = Mat::from_fn(N, N, |i, j| f64::from(h[i * N + j]));
    eigen_descending(h.as_ref()).expect("converges").0
}

#[test]
fn the_error_is_the_tail_of_the_spectrum() {
    let captured = captured(200);
    let h = captured.combined(NAME, 0.5, Part::Fit).expect("H");
    let values = eigenvalues(&h);
    for m in [8, 24, 48] {
        let sketch = &sketch(&captured, &config(m)).expect("sketched")[0];
        assert_eq!((sketch.rank, sketch.tensors.len()), (m, 2));
        let share = values[..m].iter().sum::<f64>() / N as f64;
        assert!(
            (sketch.explained - share).abs() < 2e-3,
            "{} {share}",
            sketch.explained
        );
        // The best rank-m matrix leaves the tail; the diagonal can only help, Q8_0 costs 1%.
        let tail = norm(values[m..].iter().copied());
        let error = minus(&sketch.combined(0.5), &h);
        let rounding = 0.01 * norm(values.iter().copied());
        assert!(
            error <= tail + rounding,
            "m = {m}: {error} against {tail} + {rounding}"
        );
    }
}

#[test]
fn the_diagonal_is_kept_and_both_sides_are_psd() {
    let captured = captured(200);
    let sketch = &sketch(&captured, &config(24)).expect("sketched")[0];
    for (side, sets) in [
        (Side::Forget, &[Set::Forget][..]),
        (Side::Kept, &Set::KEPT[..]),
    ] {
        let h = sketch.moments(side);
        let wanted = captured.moments(NAME, sets, Part::Fit).expect("H");
        let trace: f64 = (0..N).map(|i| f64::from(wanted[i * (N + 1)])).sum();
        for i in 0..N {
            let (h, wanted) = (f64::from(h[i * (N + 1)]), f64::from(wanted[i * (N + 1)]));
            let wanted = wanted * N as f64 / trace;
            assert!(
                (h - wanted).abs() < 0.02 * (1.0 + wanted),
                "{i}: {h} {wanted}"
            );
        }
        assert!(eigenvalues(&h)[N - 1] > -1e-4);
        for i in 0..N {
            for j in 0..i {
                assert!((h[i * N + j] - h[j * N + i]).abs() < 1e-4);
            }
        }
    }
    // λ weighs the sides against each other.
    let (f, k) = (sketch.moments(Side::Forget), sketch.moments(Side::Kept));
    let combined = sketch.combined(3.0);
    let wanted: Vec<f32> = f.iter().zip(&k).map(|(f, k)| 0.75 * f + 0.25 * k).collect();
    assert!(minus(&combined, &wanted) < 1e-3);
}

#[test]
fn a_sketch_survives_its_file() {
    let captured = captured(200);
    let sketches = sketch(&captured, &config(16)).expect("sketched");
    let dir = tempfile::tempdir().expect("a directory");
    let path = companion(&dir.path().join("patch.gguf"));
    assert!(path.ends_with("patch.moments.gguf"));
    let digest = Digest([7; 32]);
    let size = save(&path, &sketches, &[digest], false).expect("saved");
    assert!(size >= sketches[0].bytes() && size < sketches[0].bytes() + 2048);
    let file = SketchFile::open(&path).expect("opened");
    assert_eq!(file.groups().len(), 1);
    assert_eq!(file.check_patches(&[digest]), Ok(()));
    assert!(file.check_patches(&[]).is_err_and(|e| e.is_mismatch()));
    let mut back = file.input("blk.3.other.weight", N).expect("read");
    assert!((back.explained - sketches[0].explained).abs() < 1e-6);
    back.explained = sketches[0].explained;
    assert_eq!(back, sketches[0]);
    assert!(file.input(NAME, 64).is_err());
    assert!(file.input("x", N).is_err());
    // Nothing of it depends on the number of threads or on chance.
    assert_eq!(sketch(&captured, &config(16)).expect("again"), sketches);
}

#[test]
fn budget_and_tokens_bound_the_rank() {
    let small = SketchConfig {
        max_bytes: bytes(N, 10),
        ..SketchConfig::default()
    };
    assert_eq!(rank_within(&small, &[N], 1000), 10);
    assert_eq!(rank_within(&small, &[N, N], 1000), 4);
    assert_eq!(rank_within(&config(64), &[N], 100), 25);
    assert_eq!(rank_within(&config(64), &[16, N], 1000), 64);
    assert_eq!(rank_within(&config(0), &[N], 0), 1);
}

#[test]
fn private_blocks_hold_general_text_alone() {
    let captured = captured(200);
    let private = SketchConfig {
        n_private_blocks: 4,
        ..config(24)
    };
    let sketch = &sketch(&captured, &private).expect("sketched")[0];
    assert_eq!(sketch.halves[0], sketch.halves[1]);
    let general = captured
        .moments(NAME, &[Set::General], Part::Fit)
        .expect("H");
    let trace: f64 = (0..N).map(|i| f64::from(general[i * (N + 1)])).sum();
    let general: Vec<f32> = general
        .iter()
        .map(|v| v * (N as f64 / trace) as f32)
        .collect();
    let forget = captured.combined(NAME, 1e9, Part::Fit).expect("H");
    let found = sketch.moments(Side::Forget);
    assert!(minus(&found, &general) < 0.2 * minus(&found, &forget));
    assert_eq!(
        (block_of("blk.12.attn_q.weight"), block_of("output.weight")),
        (Some(12), None)
    );
}

#[test]
fn hostile_files_are_refused_by_field() {
    let captured = captured(100);
    let sketches = sketch(&captured, &config(8)).expect("sketched");
    let dir = tempfile::tempdir().expect("a directory");
    let good = dir.path().join("good.gguf");
    save(&good, &sketches, &[Digest([1; 32])], false).expect("saved");
    let gguf = crate::gguf::Gguf::open(&good).expect("good");
    let bad = dir.path().join("bad.gguf");
    let refused = |change: &dyn Fn(&mut Metadata), poison: Option<&str>, part: &str| {
        let mut meta = gguf.metadata().clone();
        change(&mut meta);
        let mut file = GgufWriter::new(&bad, meta);
        for t in gguf.tensors() {
            let mut data = gguf.read_tensor(&t.name).expect("readable");
            if poison == Some(t.name.as_str()) {
                // An f16 NaN; of a Q8_0 block, its scale.
                data[..2].copy_from_slice(&[0xff, 0x7f]);
            }
            file.tensor(&t.name, t.dims(), t.ty, move |w| Ok(w.write_all(&data)?))
                .expect("a good tensor");
        }
        file.save(true).expect("saved");
        let e = SketchFile::open(&bad)
            .and_then(|f| f.input(NAME, N))
            .expect_err("a hostile file");
        assert!(matches!(e.exit_code(), 3 | 4), "{e}");
        assert!(e.to_string().contains(part), "{e}");
    };
    let set_type = |m: &mut Metadata| drop(m.set("general.type", "model"));
    refused(&set_type, None, "found model");
    let newer = |m: &mut Metadata| drop(m.set("nepenthe.moments.format", 2u32));
    refused(&newer, None, "format 1, found 2");
    let digest = |m: &mut Metadata| drop(m.set(KEY_OF_PATCHES, vec!["ff"]));
    refused(&digest, None, "digests");
    let gap = |m: &mut Metadata| drop(m.set("nepenthe.moments.input", vec![0u32, 9]));
    refused(&gap, None, "in order");
    let short = |m: &mut Metadata| drop(m.set("nepenthe.moments.input", vec![0u32]));
    refused(&short, None, "2 entries");
    let twice = |m: &mut Metadata| drop(m.set("nepenthe.moments.tensor", vec![NAME, NAME]));
    refused(&twice, None, "each tensor once");
    let none = |_: &mut Metadata| ();
    for part in ["basis", "forget", "kept", "rest"] {
        refused(&none, Some(&format!("{NAME}.{part}")), "finite values");
    }
}

const KEY_OF_PATCHES: &str = "nepenthe.moments.patch";
