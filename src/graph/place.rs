//! Where tensors that outlive one way through a graph are put.

use super::GraphError;
use crate::ggml::{Backend, Ctx, Graph, Side, Tensor};

/// Entries of a template from which on tensors with long lives are placed apart: about 75 layers.
pub(super) const DEEP: usize = 2048;

/// Give what the way back reads of the way forward, and the gradients, memory of their own that is
/// kept to the end; returns its size. On a GPU each way is planned by itself; in a deep graph they
/// would leave gaps among the others, of which ggml's allocator stands 256 before it ends the process.
/// It takes some more memory, as nothing else uses theirs once they have been read. Tensors of this
/// context made before number `first_on_gpu` are of the part of the model that the host keeps.
pub(super) fn place_apart(
    c: &mut Ctx,
    cpu: &Backend,
    (graph, n_forward): (Graph, usize),
    grads: &[Tensor],
    first_on_gpu: usize,
) -> Result<usize, GraphError> {
    let mut roots = c.carried_over(graph, n_forward);
    roots.extend(grads.iter().map(|&g| c.view_root(g)));
    roots.sort_unstable();
    roots.dedup();
    roots.retain(|&g| !c.has_memory(g));
    let host_bound = cpu.host_bound(c, &roots);
    let of_host = |t: &&Tensor| c.made_before(**t, first_on_gpu) || host_bound.contains(t);
    let (host, device): (Vec<_>, Vec<_>) = roots.iter().partition(of_host);
    let mut bytes = cpu.place_on(Side::Device, c, &device)?.size();
    if !host.is_empty() {
        bytes += cpu.place_on(Side::Host, c, &host)?.size();
    }
    Ok(bytes)
}
