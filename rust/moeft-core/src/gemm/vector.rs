//! The inner loops, once for all instruction sets: generic over a vector of f32.

use std::ops::Range;

use super::multiply::Side;
use super::rows::{Lanes, Rows, LANES};

/// A vector of f32.
///
/// Functions are inlined into callers that have the instructions; nothing else may call them.
pub(super) trait Vector: Copy {
    /// Number of f32, a divisor of [`LANES`].
    const LEN: usize;
    /// All lanes `value`.
    fn splat(value: f32) -> Self;
    /// Reads `LEN` values.
    ///
    /// # Safety
    /// `from` must be readable for `LEN` values.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes `LEN` values.
    ///
    /// # Safety
    /// `to` must be writable for `LEN` values.
    unsafe fn store(self, to: *mut f32);
    /// `self * factor + addend`.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Sum of the lanes.
    fn sum(self) -> f32;
}

/// A panel of a weight in f32.
pub(super) struct Panel<'a> {
    /// Its values, row after row.
    pub values: &'a [f32],
    /// Distance of its rows in `values`.
    pub distance: usize,
    /// Which products of the sum it holds: columns of the input.
    pub steps: Range<usize>,
    /// Which columns of the output it contributes to.
    pub outputs: Range<usize>,
    /// Which axis of the panel is which.
    pub side: Side,
}

/// Where one tile reads and writes: `N` vectors of rows times `J` outputs.
#[derive(Clone, Copy)]
struct Tile {
    x: *const f32,
    /// Distance of the `N` vectors in `x`.
    x_next: usize,
    steps: usize,
    w: *const f32,
    distance: usize,
    out: *mut f32,
    /// Distance of the `N` vectors in `out`.
    out_next: usize,
    accumulate: bool,
}

/// Multiplies all rows by a panel.
///
/// `WIDE` and `NARROW` are the outputs per tile for two vectors of rows and for one, at most 12: as many as the
/// registers hold. With `WIDE` zero, vectors are taken one by one.
#[inline(always)]
pub(super) fn multiply_panel<V: Vector, const WIDE: usize, const NARROW: usize>(
    x: &Rows,
    panel: &Panel<'_>,
    out: &mut Rows,
    accumulate: bool,
) {
    let (x_block, out_block) = (x.width() * LANES, out.width() * LANES);
    assert!(panel.steps.end <= x.width() && panel.outputs.end <= out.width() && x.count() == out.count());
    let (axis, other) = match panel.side {
        Side::Columns => (panel.outputs.len(), panel.steps.len()),
        Side::Rows => (panel.steps.len(), panel.outputs.len()),
    };
    assert!(axis > 0 && panel.values.len() >= (axis - 1) * panel.distance + other);

    let blocks = x.count().div_ceil(LANES);
    let mut block = 0;
    while block < blocks {
        // SAFETY: both are inside of the lanes, by the assertions above.
        let (x_at, out_at) = unsafe {
            (
                x.lanes().as_ptr().cast::<f32>().add(block * x_block + panel.steps.start * LANES),
                out.lanes_mut().as_mut_ptr().cast::<f32>().add(block * out_block + panel.outputs.start * LANES),
            )
        };
        // Two vectors side by side are two whole blocks, or the halves of one.
        let rows_left = x.count() - block * LANES;
        let two = WIDE > 0 && rows_left > V::LEN;
        let (x_next, out_next) = if V::LEN == LANES { (x_block, out_block) } else { (V::LEN, V::LEN) };
        let tile = Tile {
            x: x_at,
            x_next,
            steps: panel.steps.len(),
            w: panel.values.as_ptr(),
            distance: panel.distance,
            out: out_at,
            out_next,
            accumulate,
        };
        // SAFETY: the tile's vectors and the panel's rows were checked above.
        unsafe {
            if WIDE > 0 && two {
                tiles::<V, 2, WIDE>(tile, panel.outputs.len(), panel.side);
            } else {
                tiles::<V, 1, NARROW>(tile, panel.outputs.len(), panel.side);
            }
        }
        block += if two && V::LEN == LANES { 2 } else { 1 };
    }
}

/// All outputs of a panel for `N` vectors of rows, in tiles of nearly equal size, at most `MOST`.
///
/// # Safety
/// As for [`multiply_tile`], for every tile.
#[inline(always)]
unsafe fn tiles<V: Vector, const N: usize, const MOST: usize>(mut tile: Tile, outputs: usize, side: Side) {
    let count = outputs.div_ceil(MOST);
    let (size, larger) = (outputs / count, outputs % count);
    for index in 0..count {
        let size = size + usize::from(index < larger);
        // SAFETY: `size` outputs lie inside of the panel.
        unsafe {
            match side {
                Side::Columns => sized_tile::<V, N, MOST, true>(tile, size),
                Side::Rows => sized_tile::<V, N, MOST, false>(tile, size),
            }
            tile.out = tile.out.add(size * LANES);
            tile.w = tile.w.add(if side == Side::Columns { size * tile.distance } else { size });
        }
    }
}

/// A tile of `size` outputs.
///
/// # Safety
/// As for [`multiply_tile`].
#[inline(always)]
unsafe fn sized_tile<V: Vector, const N: usize, const MOST: usize, const COLUMNS: bool>(tile: Tile, size: usize) {
    macro_rules! sizes {
        ($($size:literal)*) => {
            match size {
                // SAFETY: by the caller.
                $($size if $size <= MOST => unsafe { multiply_tile::<V, N, $size, COLUMNS>(tile) },)*
                _ => unreachable!("tiles have 1 to MOST outputs, at most 12"),
            }
        };
    }
    sizes!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// `J` outputs for `N` vectors of rows; their sums stay in registers.
///
/// # Safety
/// For every step, `N` vectors of `x` and `J` values of `w` must be readable; `J` lanes of `out` for `N` vectors
/// writable, and initialised if `accumulate`.
#[inline(always)]
unsafe fn multiply_tile<V: Vector, const N: usize, const J: usize, const COLUMNS: bool>(tile: Tile) {
    let Tile { mut x, x_next, steps, w, distance, out, out_next, accumulate } = tile;
    let mut sums = [[V::splat(0.0); N]; J];
    // SAFETY: by the caller, for all pointers below.
    unsafe {
        if accumulate {
            for (j, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(out.add(j * LANES + n * out_next));
                }
            }
        }
        // Every third row has a pointer of its own, the two after it are reached by scaled addressing: more
        // pointers would not fit the registers.
        let mut rows: [*const f32; 4] =
            std::array::from_fn(|i| if COLUMNS { w.wrapping_add(3 * i * distance) } else { w });
        for _ in 0..steps {
            let vectors: [V; N] = std::array::from_fn(|n| V::load(x.add(n * x_next)));
            for (j, sums) in sums.iter_mut().enumerate() {
                let value = if COLUMNS { *rows[j / 3].add(j % 3 * distance) } else { *rows[0].add(j) };
                let factor = V::splat(value);
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = vector.mul_add(factor, *sum);
                }
            }
            x = x.add(LANES);
            for row in &mut rows {
                *row = row.wrapping_add(if COLUMNS { 1 } else { distance });
            }
        }
        for (j, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                sum.store(out.add(j * LANES + n * out_next));
            }
        }
    }
}

/// Sums of products over all rows: `out[i][j] += scale * sum(left[.., i] * right[.., j])`, `[left.width, right.width]`.
#[inline(always)]
pub(super) fn add_outer<V: Vector, const J: usize>(
    left: &Rows,
    right: &Rows,
    scale: f32,
    mut add: impl FnMut(usize, usize, f32),
) {
    assert_eq!(left.count(), right.count());
    let (left_width, right_width) = (left.width(), right.width());
    let mut i = 0;
    while i < left_width {
        let height = if left_width - i >= 4 { 4 } else { 1 };
        let mut j = 0;
        while j < right_width {
            let breadth = if right_width - j >= J { J } else { 1 };
            match (height, breadth) {
                (4, 1) => outer_tile::<V, 4, 1>(left, right, i, j, scale, &mut add),
                (4, _) => outer_tile::<V, 4, J>(left, right, i, j, scale, &mut add),
                (_, 1) => outer_tile::<V, 1, 1>(left, right, i, j, scale, &mut add),
                _ => outer_tile::<V, 1, J>(left, right, i, j, scale, &mut add),
            }
            j += breadth;
        }
        i += height;
    }
}

#[inline(always)]
fn outer_tile<V: Vector, const I: usize, const J: usize>(
    left: &Rows,
    right: &Rows,
    i: usize,
    j: usize,
    scale: f32,
    add: &mut impl FnMut(usize, usize, f32),
) {
    let mut sums = [[V::splat(0.0); J]; I];
    for (left, right) in left.blocks().zip(right.blocks()) {
        let (left, right): (&[Lanes; I], &[Lanes; J]) =
            (left[i..i + I].try_into().expect("I lanes"), right[j..j + J].try_into().expect("J lanes"));
        for half in 0..LANES / V::LEN {
            // SAFETY: `half` selects LEN of the 16 values of each lane.
            let read = |lanes: &Lanes| unsafe { V::load(lanes.0.as_ptr().add(half * V::LEN)) };
            let right: [V; J] = std::array::from_fn(|j| read(&right[j]));
            for (sums, left) in sums.iter_mut().zip(left) {
                let left = read(left);
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = left.mul_add(right, *sum);
                }
            }
        }
    }
    for (a, sums) in sums.iter().enumerate() {
        for (b, sum) in sums.iter().enumerate() {
            add(i + a, j + b, scale * sum.sum());
        }
    }
}
