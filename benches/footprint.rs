//! What the runtime takes beside llama.cpp's own: peak memory of `nepenthe run`, and of a process
//! that does the same through llama.cpp's C API with none of our code in between.
//!
//! `cargo bench --bench footprint -- [--model GGUF] [--nepenthe FILE] [--patch P.gguf]`
//!
//! Both map the model, make a context of 2,048 tokens (batches of 512, fused attention, no
//! repacked weights, one thread), and continue one prompt greedily by up to 64 tokens; the texts
//! must be equal. Each is a process of its own, watched in `/proc/PID/status`: the kernel's peak
//! (`VmHWM`), and the most not mapped from files (`RssAnon`), sampled. With `--patch` the program
//! runs a third time, with it.
#![allow(unsafe_code, reason = "stock llama.cpp is its C API")]

use llama_cpp_sys_2 as c;
use std::ffi::CString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const STOCK: &str = "NEPENTHE_STOCK_MODEL";
const PROMPT: &str = "The sea is";
const N_CTX: u32 = 2048;
const N_BATCH: u32 = 512;
const N_PREDICT: usize = 64;
const INTERVAL: Duration = Duration::from_millis(2);

fn main() -> Fallible<()> {
    if let Some(model) = std::env::var_os(STOCK) {
        print!("{}", stock(Path::new(&model)));
        return Ok(());
    }
    let args: Vec<String> = std::env::args().collect();
    let value = |flag: &str| {
        let at = args.iter().position(|a| a == flag)?;
        args.get(at + 1).map(PathBuf::from)
    };
    let cached = std::env::var_os("HOME")
        .map(PathBuf::from)
        .unwrap_or_default();
    let cached = cached.join(".cache/nepenthe/SmolLM2-135M-Instruct.Q4_1.gguf");
    let model = value("--model").unwrap_or(cached);
    if !model.is_file() {
        println!(
            "skipped: {} is not at hand (models/fetch.sh gets it)",
            model.display()
        );
        return Ok(());
    }
    let program = value("--nepenthe").unwrap_or_else(|| env!("CARGO_BIN_EXE_nepenthe").into());
    let mut ours = Command::new(&program);
    ours.args(["run", "--raw", "-t", "1", "-p", PROMPT, "-m"])
        .arg(&model);
    ours.args(["-n", &N_PREDICT.to_string(), "-c", &N_CTX.to_string()]);
    let alone = watch(Command::new(std::env::current_exe()?).env(STOCK, &model))?;
    let run = watch(&mut ours)?;
    if alone.said.trim_end() != run.said.trim_end() {
        return Err(format!("they say other things: {:?}, {:?}", alone.said, run.said).into());
    }
    println!("{:<26} {:>9} {:>9}", "MB", "peak", "its own");
    let line = |name: &str, used: &Used| {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        println!("{name:<26} {:>9.1} {:>9.1}", mb(used.peak), mb(used.anon));
    };
    line("llama.cpp alone", &alone);
    line("nepenthe run", &run);
    if let Some(patch) = value("--patch") {
        line(
            "nepenthe run --lora",
            &watch(ours.arg("--lora").arg(patch))?,
        );
    }
    let file = std::fs::metadata(&model)?.len();
    println!("model file: {:.1} MB", file as f64 / 1e6);
    Ok(())
}

struct Used {
    said: String,
    /// Most pages of all kinds at a time, bytes.
    peak: u64,
    /// Most pages that are not a file's, bytes.
    anon: u64,
}

fn watch(command: &mut Command) -> Fallible<Used> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let (mut peak, mut anon) = (0, 0);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        // The process may end between the question and this.
        if let Ok(text) = std::fs::read_to_string(format!("/proc/{}/status", child.id())) {
            peak = peak.max(field(&text, "VmHWM:"));
            anon = anon.max(field(&text, "RssAnon:"));
        }
        std::thread::sleep(INTERVAL);
    };
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    // 64 tokens fit a pipe.
    let mut said = String::new();
    let stdout = child.stdout.as_mut().ok_or("no stdout")?;
    stdout.read_to_string(&mut said)?;
    Ok(Used { said, peak, anon })
}

/// Bytes of a field of `/proc/PID/status`; 0 where a dying process no longer has it.
fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|l| l.strip_prefix(name));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    1024 * kib.unwrap_or(0)
}

/// The prompt continued by llama.cpp as its own examples do it.
fn stock(model: &Path) -> String {
    let path = CString::new(model.to_str().expect("a plain path")).expect("no NUL");
    let mut said = Vec::new();
    // SAFETY: default parameters but for plain numbers, live handles freed once at the end with
    // dependants first, buffers with their lengths, logits read before the next call.
    unsafe {
        c::llama_backend_init();
        let mut p = c::llama_model_default_params();
        p.use_extra_bufts = false;
        let model = c::llama_model_load_from_file(path.as_ptr(), p);
        assert!(!model.is_null(), "the model loads");
        let mut p = c::llama_context_default_params();
        p.n_ctx = N_CTX;
        p.n_batch = N_BATCH;
        p.n_ubatch = N_BATCH;
        p.n_threads = 1;
        p.n_threads_batch = 1;
        p.flash_attn_type = c::LLAMA_FLASH_ATTN_TYPE_ENABLED;
        let context = c::llama_init_from_model(model, p);
        assert!(!context.is_null(), "a context");
        let vocab = c::llama_model_get_vocab(model);
        let n_vocab = c::llama_vocab_n_tokens(vocab) as usize;
        let mut tokens = vec![0; PROMPT.len() + 8];
        let n = c::llama_tokenize(
            vocab,
            PROMPT.as_ptr().cast(),
            PROMPT.len() as i32,
            tokens.as_mut_ptr(),
            tokens.len() as i32,
            true,
            true,
        );
        tokens.truncate(usize::try_from(n).expect("room for every token"));
        for _ in 0..N_PREDICT {
            let batch = c::llama_batch_get_one(tokens.as_mut_ptr(), tokens.len() as i32);
            assert_eq!(c::llama_decode(context, batch), 0, "llama_decode");
            let row = std::slice::from_raw_parts(c::llama_get_logits_ith(context, -1), n_vocab);
            let best = (1..n_vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best });
            let token = best as i32;
            if c::llama_vocab_is_eog(vocab, token) {
                break;
            }
            let mut piece = [0u8; 256];
            let n = c::llama_token_to_piece(vocab, token, piece.as_mut_ptr().cast(), 256, 0, false);
            said.extend(&piece[..usize::try_from(n).expect("a short piece")]);
            tokens = vec![token];
        }
        c::llama_free(context);
        c::llama_model_free(model);
    }
    String::from_utf8_lossy(&said).into_owned()
}
