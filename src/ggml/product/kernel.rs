//! What a product of decoded strips asks of a processor.

/// Products of one number format.
///
/// A unit is [`DEPTH`](Kernel::DEPTH) inner elements in 32 bits. A panel holds the weights of
/// [`LANES`](Kernel::LANES) results, all lanes of one unit after another; a tile the same of
/// [`ROWS`](Kernel::ROWS) rows of the other factor, [`STRIDE`](Kernel::STRIDE) apart.
pub trait Kernel {
    /// Results computed together.
    const LANES: usize;
    /// Inner elements in a unit.
    const DEPTH: usize;
    /// Rows computed together.
    const ROWS: usize;
    /// Room for the rows of a unit in a tile.
    const STRIDE: usize;

    /// `LANES` lines of `depth` numbers, `stride` apart, into the units of a panel.
    fn turn(lines: &[f32], stride: usize, depth: usize, units: &mut [u32]);

    /// One unit of `LANES` lanes from two lines (the second is not read where a unit holds one
    /// element).
    fn pair(a: &[f32], b: &[f32], units: &mut [u32]);

    /// Up to `ROWS` rows of `inner` numbers into the units of a tile.
    fn tile(rows: &[f32], inner: usize, units: &mut [u32]);

    /// `out[row·outer + lane] (+)= Σ panel·tile` over the units of both, for `n_rows` rows and
    /// `n_lanes` lanes.
    ///
    /// # Safety
    /// `out` may be written there.
    unsafe fn multiply(panel: &[u32], tile: &[u32], out: Out, add: bool);
}

/// Where sums go: `n_lanes` of each of `n_rows` rows that lie `outer` apart.
#[derive(Clone, Copy)]
pub struct Out {
    /// The first.
    pub at: *mut f32,
    /// Elements from row to row.
    pub outer: usize,
    /// Rows.
    pub n_rows: usize,
    /// Lanes.
    pub n_lanes: usize,
}

impl Out {
    /// Store row `r` of the sums, or add it to what is there.
    ///
    /// # Safety
    /// The row may be written.
    pub unsafe fn put(self, r: usize, sums: &[f32], add: bool) {
        // SAFETY: the caller's promise.
        let out =
            unsafe { std::slice::from_raw_parts_mut(self.at.add(r * self.outer), self.n_lanes) };
        if add {
            out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
        } else {
            out.copy_from_slice(&sums[..self.n_lanes]);
        }
    }
}
