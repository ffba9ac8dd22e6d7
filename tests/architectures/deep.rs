//! Graphs deeper than a thread's stack, and than ggml's allocator has places for gaps.

use super::model::{Form, write};
use super::rig::{Rig, gradients_match_finite_differences};
use super::support;
use super::table::{Arch, Key, llama};
use nepenthe::train::loss::RowObjective;

/// Less than a frame for each node on the way through all layers.
const STACK: usize = 512 << 10;

fn on_a_small_stack(keys: &'static [(&'static str, Key)], run: fn(&mut Rig)) {
    let arch = Arch { keys, ..llama };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    assert!(write(&arch, Form::Exact, &support::mini(), &path));
    let run = move || run(&mut Rig::new(&path, RowObjective::CrossEntropy));
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(run);
    thread.expect("a thread").join().expect("no overflow");
}

/// llama.cpp allows 512 layers.
#[test]
fn a_model_of_many_layers_is_rebuilt_and_differentiated() {
    const KEYS: [(&str, Key); 3] = [
        ("block_count", Key::U(400)),
        ("embedding_length", Key::U(32)),
        ("feed_forward_length", Key::U(32)),
    ];
    on_a_small_stack(&KEYS, |rig| {
        assert_eq!(rig.template.adaptable.len(), 7 * 400);
        let (ours, theirs) = rig.logits(false);
        assert_eq!(ours, theirs);
        assert_eq!(rig.no_gradient(), None);
    });
}

/// Enough layers that what lives long is placed apart.
#[test]
fn gradients_of_a_deep_model_match_finite_differences() {
    const KEYS: [(&str, Key); 1] = [("block_count", Key::U(96))];
    on_a_small_stack(&KEYS, |rig| {
        assert!(rig.template.entries.len() > 2048);
        gradients_match_finite_differences(rig);
    });
}
