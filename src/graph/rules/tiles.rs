//! Products with the transpose of a frozen weight that has no transposed copy: it is decoded a tile
//! at a time.

use super::GraphError;
use crate::ggml::{Ctx, Tensor, sys};

/// How a weight is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// Bytes of a tile, at most, where one block of columns does not take more.
    pub bytes: usize,
    /// As f32 instead of BF16. A tile holds what a copy would: with the one as with the other,
    /// products come out the same to the bit.
    pub exact: bool,
}

impl Default for Tile {
    fn default() -> Self {
        Self {
            bytes: TILE,
            exact: false,
        }
    }
}

/// Bytes of a tile. Half and twice as much are as fast.
pub const TILE: usize = 32 << 20;

impl Tile {
    /// Columns of `w [n_in, n_out, n]` in a tile, `block` of which make a block of its type.
    pub fn columns(self, [n_in, n_out, n, _]: [i64; 4], block: i64) -> i64 {
        let column = if self.exact { 4 } else { 2 } * (n_out * n).max(1);
        let fit = self.bytes as i64 / column;
        (fit / block * block).max(block).min(n_in)
    }

    /// How many tiles that makes.
    pub fn count(self, ne: [i64; 4], block: i64) -> usize {
        (ne[0] as u64).div_ceil(self.columns(ne, block) as u64) as usize
    }

    /// `product` with `w [n_in, n_out, n]` transposed, its results `[n_in, …]`: those with some
    /// columns of `w` after one another. The memory of a tile goes to the next one.
    pub fn product(
        self,
        c: &mut Ctx,
        w: Tensor,
        mut product: impl FnMut(&mut Ctx, Tensor) -> Result<Tensor, GraphError>,
    ) -> Result<Tensor, GraphError> {
        let ne = c.ne(w);
        let columns = self.columns(ne, c.block(w));
        let ty = match self.exact {
            true => sys::GGML_TYPE_F32,
            false => sys::GGML_TYPE_BF16,
        };
        let mut all = None;
        for first in (0..ne[0]).step_by(columns as usize) {
            let tile = c.turned(w, first..(first + columns).min(ne[0]), ty)?;
            let part = product(c, tile)?;
            all = Some(match all {
                Some(before) => c.concat(before, part, 0)?,
                None => part,
            });
        }
        Ok(all.expect("weights have columns"))
    }
}
