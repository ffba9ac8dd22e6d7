//! Against updates that `tests/golden/peft.py` worked out, and one hostile adapter per field.

use super::*;
use crate::gguf::{GgmlType, GgufWriter, Metadata};
use crate::patch::is_peft;
use serde_json::{Value, json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A toy model of the shapes in peft.py, all zero.
fn toy(dir: &Path, arch: &str) -> Weights {
    let path = dir.join("toy.gguf");
    let zeros = vec![0u8; 24 * 16 * 4];
    let mut meta = Metadata::new();
    meta.set("general.architecture", arch);
    meta.set(&format!("{arch}.attention.head_count"), 4u32);
    meta.set(&format!("{arch}.attention.head_count_kv"), 2u32);
    let mut file = GgufWriter::new(&path, meta);
    let shapes = [
        ("attn_q", 16, 16),
        ("attn_k", 16, 8),
        ("attn_v", 16, 8),
        ("attn_output", 16, 16),
        ("ffn_gate", 16, 24),
        ("ffn_up", 16, 24),
        ("ffn_down", 24, 16),
    ];
    for block in 0..2 {
        for (name, n_in, n_out) in shapes {
            let bytes = &zeros[..n_in * n_out * 4];
            let ne = [n_in as u64, n_out as u64];
            let name = format!("blk.{block}.{name}.weight");
            file.tensor_from_bytes(&name, &ne, GgmlType::F32, bytes)
                .expect("a good tensor");
        }
    }
    file.save(true).expect("room");
    Weights::open(&path).expect("a good file")
}

/// Rows of s·B·A, in f64.
fn delta(u: &Update) -> Vec<f64> {
    let mut out = Vec::new();
    for b in u.lora_b.chunks_exact(u.rank) {
        for i in 0..u.n_in {
            let a = u.lora_a.iter().skip(i).step_by(u.n_in);
            let dot: f64 = b
                .iter()
                .zip(a)
                .map(|(b, a)| f64::from(*b) * f64::from(*a))
                .sum();
            out.push(f64::from(u.scale) * dot);
        }
    }
    out
}

#[test]
fn updates_are_those_the_script_worked_out() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let model = toy(dir.path(), "llama");
    let text = fs::read(golden().join("peft.json")).expect("beside its script");
    let golden_json: Value = serde_json::from_slice(&text).expect("JSON");
    for (name, tensors) in golden_json.as_object().expect("adapters") {
        let folder = golden().join("peft").join(name);
        assert!(is_peft(&folder));
        let patch = open(&folder, &model).expect("a good adapter");
        assert_eq!(
            patch,
            open(&folder.join(TENSORS), &model).expect("by its file")
        );
        patch.check_shapes(&model).expect("fits");
        patch
            .check_base(&model)
            .expect("no provenance to contradict");
        let tensors = tensors.as_object().expect("tensors");
        assert_eq!(patch.updates.len(), tensors.len(), "{name}");
        for u in &patch.updates {
            let wanted = tensors[&u.tensor].as_array().expect("values");
            assert_eq!(wanted.len(), u.n_in * u.n_out);
            for (i, (found, wanted)) in delta(u).iter().zip(wanted).enumerate() {
                let wanted = wanted.as_f64().expect("a number");
                // The script prints seven digits; the scale is kept as f32.
                let close = (found - wanted).abs() <= 1e-6 * (1.0 + wanted.abs());
                assert!(close, "{name} {} {i}: {found}, wanted {wanted}", u.tensor);
            }
        }
    }
}

#[test]
fn rows_of_other_architectures_stay() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let folder = golden().join("peft/plain");
    let llama = open(&folder, &toy(dir.path(), "llama")).expect("good");
    let qwen = open(&folder, &toy(dir.path(), "qwen2")).expect("good");
    for (l, q) in llama.updates.iter().zip(&qwen.updates) {
        let moved = l.tensor.contains("attn_q") || l.tensor.contains("attn_k");
        assert_eq!(l.lora_b != q.lora_b, moved, "{}", l.tensor);
        let sorted = |v: &[f32]| {
            let mut v = v.to_vec();
            v.sort_by(f32::total_cmp);
            v
        };
        assert_eq!(sorted(&l.lora_b), sorted(&q.lora_b));
    }
}

#[test]
fn modules_have_one_tensor_each_or_none() {
    let tensor = |arch, name| module(arch, name).map(|m| m.tensor);
    let q = Some("blk.12.attn_q.weight".to_owned());
    assert_eq!(tensor("llama", "model.layers.12.self_attn.q_proj"), q);
    assert_eq!(
        tensor("gemma3", "model.language_model.layers.12.self_attn.q_proj"),
        q
    );
    assert_eq!(
        tensor("gemma3", "language_model.model.layers.12.self_attn.q_proj"),
        q
    );
    assert_eq!(tensor("qwen3", "lm_head").as_deref(), Some("output.weight"));
    let up = tensor("phi3", "model.layers.0.mlp.gate_up_proj");
    assert_eq!(up.as_deref(), Some("blk.0.ffn_up.weight"));
    for (arch, name) in [
        ("llama", "model.layers.0.mlp.gate_up_proj"),
        ("phi3", "model.layers.0.mlp.up_proj"),
        ("llama", "model.layers.00.self_attn.q_proj"),
        ("llama", "model.layers.+1.self_attn.q_proj"),
        ("llama", "model.layers.0.block_sparse_moe.gate"),
        ("llama", "model.embed_tokens"),
        ("mamba", "model.layers.0.self_attn.q_proj"),
    ] {
        assert_eq!(tensor(arch, name), None, "{arch} {name}");
    }
}

/// A copy of the plain adapter whose configuration `edit` has changed.
fn edited(edit: impl FnOnce(&mut Value)) -> Result<Patch, Error> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let from = golden().join("peft/plain");
    let text = fs::read(from.join(CONFIG)).expect("beside its script");
    let mut config: Value = serde_json::from_slice(&text).expect("JSON");
    edit(&mut config);
    fs::write(dir.path().join(CONFIG), config.to_string()).expect("room");
    fs::copy(from.join(TENSORS), dir.path().join(TENSORS)).expect("room");
    open(dir.path(), &toy(dir.path(), "llama"))
}

fn refused(edit: impl FnOnce(&mut Value)) -> PeftError {
    match edited(edit) {
        Err(Error::Peft(e)) => e,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_plain_product_is_refused_by_name() {
    assert!(edited(|_| ()).is_ok());
    for (key, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("layer_replication", json!([[0, 1]])),
        ("trainable_token_indices", json!([1])),
        ("init_lora_weights", json!("pissa")),
        ("peft_type", json!("LOHA")),
        ("rank_pattern", json!({ "q_proj|k_proj": 4 })),
        ("alpha_pattern", json!({ "q_proj": "8" })),
        ("alpha_pattern", json!([1])),
    ] {
        let e = refused(|c| c[key] = value.clone());
        assert!(
            matches!(&e, PeftError::Unsupported { key: k, .. } if k == key),
            "{e}"
        );
    }
}

#[test]
fn bad_configurations_are_refused() {
    for (key, value) in [
        ("r", json!(0)),
        ("r", json!(2.5)),
        ("r", json!(1e9)),
        ("r", json!("4")),
        ("lora_alpha", json!(null)),
        ("use_rslora", json!(1)),
        ("rank_pattern", json!({ "q_proj": 0 })),
    ] {
        let e = refused(|c| c[key] = value.clone());
        assert!(matches!(e, PeftError::Config { .. }), "{key}: {e}");
    }
    // A rank other than the tensors'.
    let e = refused(|c| c["r"] = json!(5));
    assert!(matches!(e, PeftError::Tensor { .. }), "{e}");
}

/// The error of an adapter with these safetensors bytes.
fn tensors_error(bytes: &[u8]) -> Error {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = json!({ "peft_type": "LORA", "r": 1, "lora_alpha": 1 });
    fs::write(dir.path().join(CONFIG), config.to_string()).expect("room");
    fs::write(dir.path().join(TENSORS), bytes).expect("room");
    open(dir.path(), &toy(dir.path(), "llama")).expect_err("hostile")
}

/// A safetensors file: (name, dtype, shape), all data zero bytes or `fill`.
fn file(tensors: &[(&str, &str, &[usize])], fill: u8) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, dtype, shape) in tensors {
        let size = if *dtype == "F32" || *dtype == "I32" {
            4
        } else {
            8
        };
        let n = shape.iter().product::<usize>() * size;
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, at + n] });
        header.insert((*name).to_owned(), entry);
        at += n;
    }
    let text = Value::Object(header).to_string();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.bytes());
    out.resize(out.len() + at, fill);
    out
}

#[test]
fn bad_tensors_are_refused() {
    let a = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight";
    let b = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight";
    let other = "base_model.model.model.layers.0.conv.lora_A.weight";
    let embedding = "base_model.model.model.embed_tokens.lora_embedding_A";
    let peft = |e: Error| match e {
        Error::Peft(e) => e,
        other => panic!("{other:?}"),
    };
    let good: [(&str, &str, &[usize]); 2] = [(a, "F32", &[1, 16]), (b, "F32", &[8, 1])];
    for bytes in [&b""[..], &[255; 64], &file(&good, 0)[..100]] {
        let e = peft(tensors_error(bytes));
        assert!(matches!(e, PeftError::Tensors { .. }), "{e}");
    }
    assert!(matches!(
        peft(tensors_error(&file(&[], 0))),
        PeftError::Empty { .. }
    ));
    let e = peft(tensors_error(&file(&[(other, "F32", &[1, 16])], 0)));
    assert!(e.to_string().contains("model.layers.0.conv"), "{e}");
    assert!(matches!(e, PeftError::Module { .. }), "{e}");
    type Tensors<'a> = &'a [(&'a str, &'a str, &'a [usize])];
    let cases: [(Tensors<'_>, u8, &str); 6] = [
        (&[(a, "F32", &[1, 16])], 0, "one of them"),
        (&[(embedding, "F32", &[1, 16])], 0, "lora_embedding_A"),
        (&[(a, "F64", &[1, 16]), (b, "F64", &[8, 1])], 0, "F64"),
        (&[(a, "F32", &[16]), (b, "F32", &[8, 1])], 0, "two matrices"),
        (
            &[(a, "F32", &[1, 16]), (b, "F32", &[8, 2])],
            0,
            "2 in lora_B",
        ),
        (&good, 0xff, "NaN"),
    ];
    for (tensors, fill, wanted) in cases {
        let e = peft(tensors_error(&file(tensors, fill)));
        assert!(matches!(e, PeftError::Tensor { .. }), "{e}");
        assert!(e.to_string().contains(wanted), "{e}");
    }
}
