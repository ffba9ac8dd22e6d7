//! Samples of thousands of tokens: memory in proportion to their length, losses and masks as
//! llama.cpp has them.

mod support;

use nepenthe::data::{GENERAL_TEXT, Sample};
use nepenthe::graph::trained::{Factor, Trained};
use nepenthe::model::OpenModel;
use nepenthe::score::{answer_losses, scoring_context};
use nepenthe::train::engine::{Engine, Item};
use std::path::Path;

/// A sample of `n` tokens, of which the last `n_answer` are graded.
fn sample(open: &OpenModel, n: usize, n_answer: usize) -> Sample {
    let text = open.model.tokenize(GENERAL_TEXT, true, false);
    Sample {
        tokens: text.iter().copied().cycle().take(n).collect(),
        answers: std::iter::once(n - n_answer..n).collect(),
        truncated: false,
    }
}

/// Graph memory of a step on samples of `lengths` tokens in one batch, and their mean answer NLL.
fn step(open: &OpenModel, lengths: &[usize]) -> (usize, Vec<f64>) {
    let mut engine = Engine::new(open, 1, 1 << 20).expect("a good model");
    let factor = |tensor| Factor {
        tensor,
        rank: 4,
        scale: 1.0,
        trainable: true,
    };
    let list = (0..engine.template.adaptable.len()).map(factor).collect();
    let mut factors = engine.factors(list).expect("room");
    let mut grads = Vec::new();
    for (i, f) in factors.list.clone().iter().enumerate() {
        let t = &engine.template.adaptable[f.tensor];
        let a = vec![0.01; t.n_in * f.rank];
        factors
            .write(i, &a, &vec![0.0; t.n_out * f.rank])
            .expect("its shape");
        grads.push(vec![0f32; t.n_in * f.rank]);
        grads.push(vec![0f32; t.n_out * f.rank]);
    }
    let samples: Vec<Sample> = lengths.iter().map(|&n| sample(open, n, 64)).collect();
    let items: Vec<Item<'_>> = samples.iter().map(|s| Item::remembered(s, 1.0)).collect();
    let losses = engine.gradients(Trained::Factors(&factors), &items, None, &mut grads);
    let losses = losses.expect("computable");
    // With B = 0 the gradient of A is 0 and that of B is not.
    assert!(grads[1].iter().any(|g| *g != 0.0) && grads[1].iter().all(|g| g.is_finite()));
    (
        engine.bytes(),
        losses.iter().map(|l| l.per_token()).collect(),
    )
}

fn theirs(open: &OpenModel, n: usize) -> f64 {
    let mut context = scoring_context(&open.model, &Vec::new(), n, 1).expect("room");
    let losses = answer_losses(&mut context, &[sample(open, n, 64)], &mut |_| {});
    losses.expect("computable")[0].per_token()
}

#[test]
fn memory_grows_in_proportion_to_tokens() {
    let open = OpenModel::open(&support::mini(), 0).expect("the embedded model");
    let of = |n| {
        let (bytes, losses) = step(&open, &[n]);
        let wanted = theirs(&open, n);
        assert!(
            (losses[0] - wanted).abs() < 1e-2 * wanted,
            "{n} tokens: {losses:?} {wanted}"
        );
        bytes as f64
    };
    let (one, two, four) = (of(1057), of(2113), of(4225));
    let ratio = (four - two) / (two - one);
    assert!(ratio < 2.2, "{one} {two} {four} bytes: {ratio}");
    // So does that of batches that are kept whole, which take more of it for each token.
    let kept = |n| step(&open, &[n]).0 as f64;
    let (small, middle, large) = (kept(255), kept(511), kept(1023));
    let ratio = (large - middle) / (middle - small);
    assert!(ratio < 2.2, "{small} {middle} {large} bytes: {ratio}");
    assert!(large / 1023.0 > 2.0 * four / 4225.0, "{large} {four}");
}

/// Several in one batch do not see each other, in attention by tiles too.
fn samples_keep_apart(path: &Path) {
    let open = OpenModel::open(path, 0).expect("a good model");
    let lengths = [700, 300, 500];
    let (_, losses) = step(&open, &lengths);
    for (n, loss) in lengths.into_iter().zip(losses) {
        let wanted = theirs(&open, n);
        assert!(
            (loss - wanted).abs() < 2e-2 * wanted,
            "{n} tokens: {loss} {wanted}"
        );
    }
}

#[test]
fn samples_of_a_long_batch_keep_apart() {
    samples_keep_apart(&support::mini());
}

/// With a sliding window of 512 tokens.
#[test]
fn gemmas_window_holds_in_a_long_batch() {
    if let Some(path) = support::cached("gemma-3-270m-q4_k_m.gguf") {
        samples_keep_apart(&path);
    }
}
