//! Spherical interpolation from `base_model` (or the first model) to the other: with the angle th between a and b,
//! `W' = (sin((1 - t) th) a + sin(t th) b) / sin(th)`.
//!
//! Where |cos th| is above 0.9995, `W' = (1 - t) a + t b`: most light fine-tunes end there, and the report says so. The
//! angle is that of the whole tensor (`unit: tensor`), of each row, or of each expert of a stack (the default; a tensor
//! that is no stack is one unit). Norms and products are summed in float64. Source: Shoemake,
//! <https://doi.org/10.1145/325165.325242>, on vectors that keep their length, as mergekit applies it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{BaseModel, Inputs, Spec};
use crate::merge::kernel::{Block, Gathered, Kernel, Reads, Settings};
use crate::merge::keys::RecipeError;
use crate::merge::measure::products;
use crate::merge::simd::vectorised;

/// Above it, the sine in the denominator has too few digits left.
const COLLINEAR: f64 = 0.9995;
/// A vector shorter than this has no direction.
const SHORTEST: f64 = 1e-8;

pub(super) const SPEC: Spec = Spec {
    name: "slerp",
    summary: "from the base to another model along the arc between them",
    inputs: Inputs::Weights,
    base: BaseModel::First,
    models: [1, 1],
    adapters_only: false,
    importance: false,
    common: &["t", "unit"],
    per_model: &[],
    kernel: |settings| {
        let t = settings.number("t", None, 0.0..=1.0)?;
        Ok(Box::new(Slerp { arc: Arc::new(settings, t, COLLINEAR, Unit::Expert)? }))
    },
};

struct Slerp {
    arc: Arc,
}

impl Kernel for Slerp {
    fn pass(&self) -> Option<Reads> {
        self.arc.pass()
    }

    fn gather(&self, block: &Block, into: &mut Gathered) {
        self.arc.gather(block.start, &block.base, &block.inputs[0], into);
    }

    fn learn(&mut self, all: Gathered) {
        self.arc.learn(&all);
    }

    fn combine(&self, block: &mut Block, out: &mut [f32]) {
        self.arc.combine(block.start, &block.base, &block.inputs[0], out);
    }

    fn counts_while_combining(&self) -> bool {
        self.arc.rows
    }

    fn branch(&self) -> Option<String> {
        Some(self.arc.branch())
    }
}

/// What has an angle of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Tensor,
    Row,
    Expert,
}

/// The arc between two vectors per unit.
pub(super) struct Arc {
    t: f64,
    collinear: f64,
    unit_len: usize,
    /// Whether units are rows, which lie whole in every block.
    pub rows: bool,
    units: usize,
    coefficients: Vec<[f64; 2]>,
    arcs: AtomicU64,
    lines: AtomicU64,
}

impl Arc {
    pub fn new(settings: &Settings<'_>, t: f64, collinear: f64, unit: Unit) -> Result<Self, RecipeError> {
        let known = [("tensor", Unit::Tensor), ("row", Unit::Row), ("expert", Unit::Expert)];
        let elements = settings.elements();
        let rows = settings.word("unit", unit, &known)? == Unit::Row && settings.shape.len() > 1;
        let unit_len = match settings.word("unit", unit, &known)? {
            Unit::Row if rows => settings.cols(),
            Unit::Expert => elements / settings.experts,
            Unit::Row | Unit::Tensor => elements,
        };
        let units = elements.checked_div(unit_len).unwrap_or(0) as usize;
        Ok(Self {
            t,
            collinear,
            unit_len: unit_len as usize,
            rows,
            units,
            coefficients: Vec::new(),
            arcs: AtomicU64::new(0),
            lines: AtomicU64::new(0),
        })
    }

    pub fn pass(&self) -> Option<Reads> {
        (!self.rows && self.coefficients.is_empty() && self.units > 0).then_some(Reads::Models)
    }

    pub fn gather(&self, start: u64, a: &[f32], b: &[f32], into: &mut Gathered) {
        let sums = into.sums(3 * self.units);
        for (unit, range) in pieces(start as usize, a.len(), self.unit_len) {
            let found = products(&a[range.clone()], &b[range]);
            sums[3 * unit..][..3].iter_mut().zip(found).for_each(|(sum, value)| *sum += value);
        }
    }

    pub fn learn(&mut self, all: &Gathered) {
        let units: Vec<_> = all.sums.as_chunks::<3>().0.iter().map(|&sums| self.coefficients(sums)).collect();
        self.coefficients = units;
    }

    pub fn combine(&self, start: u64, a: &[f32], b: &[f32], out: &mut [f32]) {
        for (unit, range) in pieces(start as usize, a.len(), self.unit_len) {
            let (a, b) = (&a[range.clone()], &b[range.clone()]);
            let [left, right] = match self.rows {
                true => self.coefficients(products(a, b)),
                false => self.coefficients[unit],
            };
            mix(a, left, b, right, &mut out[range]);
        }
    }

    pub fn branch(&self) -> String {
        match (self.arcs.load(Ordering::Relaxed), self.lines.load(Ordering::Relaxed)) {
            (_, 0) => "slerp".into(),
            (0, _) => "lerp".into(),
            (arcs, lines) => format!("slerp of {arcs} units, lerp of {lines}"),
        }
    }

    /// What a and b are multiplied by, from their products: a with a, b with b, a with b.
    fn coefficients(&self, [aa, bb, ab]: [f64; 3]) -> [f64; 2] {
        let length = |square: f64| if square.sqrt() > SHORTEST { square.sqrt() } else { 1.0 };
        let cosine = (ab / length(aa) / length(bb)).clamp(-1.0, 1.0);
        if cosine.abs() > self.collinear {
            self.lines.fetch_add(1, Ordering::Relaxed);
            return [1.0 - self.t, self.t];
        }
        self.arcs.fetch_add(1, Ordering::Relaxed);
        let angle = cosine.acos();
        [((1.0 - self.t) * angle).sin() / angle.sin(), (self.t * angle).sin() / angle.sin()]
    }
}

/// The units that a block reaches into, and its part in each.
fn pieces(start: usize, len: usize, unit_len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let end = start + len;
    let units = if len == 0 { 0..0 } else { start / unit_len..(end - 1) / unit_len + 1 };
    units.map(move |unit| {
        let first = (unit * unit_len).max(start);
        (unit, first - start..((unit + 1) * unit_len).min(end) - start)
    })
}

vectorised! {
    /// `out = left * a + right * b`, in float64.
    fn mix(a: &[f32], left: f64, b: &[f32], right: f64, out: &mut [f32]) {
        for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
            *out = (f64::from(a) * left + f64::from(b) * right) as f32;
        }
    }
}
