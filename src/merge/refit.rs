//! Scales fitted again: where more than code bits may change, each block's own scale (and min) is
//! moved to where the codes chosen for it lose least.
//!
//! With codes fixed, a row is linear in the f16 fields of its blocks: a field times 1 + α adds
//! α·v to the block's values, with v the part of them that is in proportion to it (S·q for a
//! scale, M for a min). With errors e and g = e·H the loss falls most at the α that solves
//!
//!   (V·H·Vᵀ)·α = V·gᵀ
//!
//! V [fields, n_in] holds one v a row. One more freedom for 32 codes (256 in K-quants) is little
//! beside white noise, but H has few large directions and a row has as many fields as blocks.
//! n_in² multiplications a row and field of a block.

use super::factor::Factor;
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};

/// Share of the diagonal of V·H·Vᵀ added to it.
const RIDGE: f64 = 1e-3;
/// Largest |α|.
const MOST: f64 = 0.25;

/// α of every field of a row, blocks of `block_len` after each other. `parts` \[n_in\]: what of
/// the row's values is in proportion to each field; `gradient` \[n_in\]: e·H. None where the
/// moments say nothing of the fields.
pub(super) fn best_factors(
    parts: &[&[f32]],
    block_len: usize,
    gradient: &[f32],
    f: &Factor,
) -> Option<Vec<f64>> {
    let n_in = gradient.len();
    let n_fields = parts.len();
    let n = n_in / block_len * n_fields;
    let (mut normal, mut rhs) = (Mat::<f64>::zeros(n, n), Mat::<f64>::zeros(n, 1));
    let mut pull = vec![0f32; n_in];
    for (block, first) in (0..n_in).step_by(block_len).enumerate() {
        let end = first + block_len;
        for (k, part) in parts.iter().enumerate() {
            let a = block * n_fields + k;
            let own = part[first..end].iter().zip(&gradient[first..end]);
            rhs[(a, 0)] = own.map(|(v, g)| f64::from(v * g)).sum();
            // v_a·H up to the block itself: the lower triangle is all that is read.
            pull[..end].fill(0.0);
            for i in first..end {
                let v = part[i];
                for (p, h) in pull[..end].iter_mut().zip(f.h_row(i)) {
                    *p += v * h;
                }
            }
            for (other, part) in parts.iter().enumerate() {
                let blocks = part.chunks_exact(block_len);
                for (b, (v, p)) in blocks.zip(pull[..end].chunks_exact(block_len)).enumerate() {
                    let sum: f32 = v.iter().zip(p).map(|(v, p)| v * p).sum();
                    normal[(a, b * n_fields + other)] = f64::from(sum);
                }
            }
        }
    }
    for a in 0..n {
        let d = normal[(a, a)];
        normal[(a, a)] = if d > 0.0 { d * (1.0 + RIDGE) } else { 1.0 };
    }
    let solved = normal.llt(Side::Lower).ok()?.solve(&rhs);
    Some((0..n).map(|a| solved[(a, 0)].clamp(-MOST, MOST)).collect())
}
