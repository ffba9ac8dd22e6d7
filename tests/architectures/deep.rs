//! Graphs deeper than a thread's stack: no walk through them recurses.

use super::model::{Form, write};
use super::table::{Arch, Key};
use super::{rig::Rig, support};
use nepenthe::train::loss::RowObjective;

/// Layers; llama.cpp allows 512.
const LAYERS: u32 = 400;
/// A frame for each node on the way through all layers would not fit.
const STACK: usize = 512 << 10;

#[test]
fn a_model_of_many_layers_is_differentiated_on_a_small_stack() {
    let mut arch: Arch = super::table::llama;
    arch.keys = &[
        ("block_count", Key::U(LAYERS)),
        ("embedding_length", Key::U(32)),
        ("feed_forward_length", Key::U(32)),
    ];
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    assert!(write(&arch, Form::Exact, &support::mini(), &path));
    let run = move || {
        let mut rig = Rig::new(&path, RowObjective::CrossEntropy);
        assert_eq!(rig.template.adaptable.len(), 7 * LAYERS as usize);
        assert_eq!(rig.no_gradient(), None);
    };
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(run);
    thread.expect("a thread").join().expect("no overflow");
}
