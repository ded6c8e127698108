//! From logits to tokens, and which drafted tokens stand.
//!
//! A row is one task, so that neither the rows beside it nor threads can change it. What is kept of a row is all above one logit, and
//! of its equals the lower ids: top-k finds that logit among the k largest, top-p among the few largest or, where these have too
//! little mass, by a histogram of weights. A token costs a walk over the row for the sums of its pieces and one over the piece
//! that holds it. Weights are f32, sums of them f64.

use super::Tier;
use super::lanes::math::exp;
use super::lanes::{Kernel, Simd, dispatch};
use super::logits::{greatest, logits_stats, order, top_k};
use crate::backend::sampling::{Left, NOTHING, ratio};
use crate::backend::{Draw, NO_TOKEN};
use crate::rng::Key;

/// Logits of a piece.
const PIECE: usize = 4096;
/// How many of the largest logits top-p is looked for in first.
const FEW: usize = 256;

/// A row of logits and how it is drawn from. Weights are e^((x - max) / temperature).
struct Law<'a> {
    tier: Tier,
    x: &'a [f32],
    max: f32,
    temperature: f32,
    /// The least logit that is kept, and the last id that is kept with it where others have it too.
    cut: (f32, u32),
    /// The least weight that is kept.
    least: f32,
}

impl<'a> Law<'a> {
    /// `None` if `x` holds NaN or nothing finite.
    fn new(tier: Tier, x: &'a [f32], draw: &Draw) -> Option<Self> {
        let (max, best) = dispatch(tier, Best(x))?;
        let (n, cut) = (x.len(), (f32::NEG_INFINITY, u32::MAX));
        if draw.is_greedy() {
            return Some(Self { tier, x, max, temperature: 1.0, cut, least: 0.0 }.cut_at((best, max)));
        }
        let mut law = Self { tier, x, max, temperature: draw.temperature, cut, least: 0.0 };
        let limit = Some(draw.top_k as usize).filter(|k| (1..n).contains(k)).unwrap_or(n);
        if limit < n {
            law = law.cut_at(*top_k(tier, x, limit).last()?);
        }
        if draw.top_p < 1.0 {
            let enough = f64::from(draw.top_p) * law.masses().iter().sum::<f64>();
            let few = top_k(tier, x, limit.min(FEW));
            let last = match law.reaches(enough, 0.0, &few) {
                None if few.len() < limit => law.last_of_many(enough),
                last => last,
            };
            if let Some(last) = last {
                law = law.cut_at(last);
            }
        }
        law.least = draw.min_p;
        Some(law)
    }

    /// Keeps nothing behind this id and logit.
    fn cut_at(self, (id, x): (u32, f32)) -> Self {
        let tied = self.x[id as usize + 1..].iter().fold(false, |tied, other| tied | (*other == x));
        Self { cut: (x, if tied { id } else { u32::MAX }), ..self }
    }

    /// The id and logit with which the mass of `ranked` ones, largest first and behind a mass of `before`, reaches `enough`.
    fn reaches(&self, enough: f64, before: f64, ranked: &[(u32, f32)]) -> Option<(u32, f32)> {
        let x: Vec<f32> = ranked.iter().map(|r| r.1).collect();
        let (mut w, mut mass) = (vec![0.0; x.len()], before);
        let (cut, least) = (f32::NEG_INFINITY, 0.0);
        dispatch(self.tier, Weights { x: &x, max: self.max, temperature: self.temperature, cut, least, w: &mut w });
        let at = w.iter().position(|w| {
            mass += f64::from(*w);
            mass >= enough
        })?;
        Some(ranked[at])
    }

    /// [`Self::reaches`] among all that is kept: by the mass of all weights of equal leading bits.
    fn last_of_many(&self, enough: f64) -> Option<(u32, f32)> {
        const SHIFT: u32 = 17;
        let bin = |w: f32| (w.to_bits() >> SHIFT) as usize;
        let mut bins = vec![0.0; bin(1.0) + 1];
        let mut w = vec![0.0; self.x.len()];
        for (piece, w) in w.chunks_mut(PIECE).enumerate() {
            self.weights(piece, w);
            w.iter().for_each(|w| bins[bin(*w)] += f64::from(*w));
        }
        let mut above = 0.0;
        let last = bins.iter().rposition(|mass| {
            above += mass;
            above >= enough
        })?;
        let of_bin = w.iter().enumerate().filter(|(_, w)| **w > 0.0 && bin(**w) == last);
        let mut ranked: Vec<(u32, f32)> = of_bin.map(|(i, _)| (i as u32, self.x[i])).collect();
        ranked.sort_unstable_by(order);
        self.reaches(enough, above - bins[last], &ranked).or(ranked.last().copied())
    }

    /// The weights of a piece, 0 of what is not kept.
    fn weights(&self, piece: usize, w: &mut [f32]) {
        let first = piece * PIECE;
        let x = &self.x[first..first + w.len()];
        let (cut, last) = self.cut;
        dispatch(self.tier, Weights { x, max: self.max, temperature: self.temperature, cut, least: self.least, w });
        let behind = (last as usize).saturating_add(1).saturating_sub(first).min(x.len());
        for (w, _) in w[behind..].iter_mut().zip(&x[behind..]).filter(|(_, x)| **x == cut) {
            *w = 0.0;
        }
    }

    /// The sums of all pieces' weights.
    fn masses(&self) -> Vec<f64> {
        let mut w = [0.0; PIECE];
        let mass = |(piece, x): (usize, &[f32])| {
            self.weights(piece, &mut w[..x.len()]);
            sum(&w[..x.len()])
        };
        self.x.chunks(PIECE).enumerate().map(mass).collect()
    }

    /// Draws without replacement into `tokens`, all [`NO_TOKEN`] yet.
    fn draw(&self, key: Key, tokens: &mut [u32]) {
        let mut masses = self.masses();
        let mut w = vec![0.0; PIECE.min(self.x.len())];
        for i in 0..tokens.len() {
            let u = key.at(i as u64).uniform() * masses.iter().sum::<f64>();
            let mut below = 0.0;
            let piece = masses.iter().position(|m| {
                below += m;
                below > u
            });
            let Some(piece) = piece.or(masses.iter().rposition(|m| *m > 0.0)) else { break };
            let first = piece * PIECE;
            let w = &mut w[..PIECE.min(self.x.len() - first)];
            self.weights(piece, w);
            for t in &tokens[..i] {
                if let Some(w) = (*t as usize).checked_sub(first).and_then(|t| w.get_mut(t)) {
                    *w = 0.0;
                }
            }
            let rest = (u - (below - masses[piece])) / masses[piece];
            if let Some(hit) = invert(w.iter().map(|w| f64::from(*w)), rest) {
                tokens[i] = (first + hit) as u32;
                w[hit] = 0.0;
                masses[piece] = sum(w);
            }
        }
    }
}

/// Draws tokens of a row without replacement, as [`Backend::sample`](crate::backend::Backend::sample) does for many.
pub fn sample(tier: Tier, x: &[f32], draw: &Draw, tokens: &mut [u32]) {
    tokens.fill(NO_TOKEN);
    if draw.is_greedy() {
        let best = dispatch(tier, Best(x)).map_or(NO_TOKEN, |best| best.1);
        tokens.iter_mut().take(1).for_each(|t| *t = best);
    } else if let Some(law) = Law::new(tier, x, draw) {
        law.draw(draw.key, tokens);
    }
}

/// The distribution that the first token is drawn from; 0 where there is none.
pub fn distribution(tier: Tier, x: &[f32], draw: &Draw, p: &mut [f32]) {
    p.fill(0.0);
    let Some(law) = Law::new(tier, x, draw) else { return };
    p.chunks_mut(PIECE).enumerate().for_each(|(piece, p)| law.weights(piece, p));
    let scale = (1.0 / p.chunks(PIECE).map(sum).sum::<f64>()) as f32;
    p.iter_mut().for_each(|p| *p *= scale);
}

/// [`logits_stats`] as [`Backend::logits_stats`](crate::backend::Backend::logits_stats) writes them.
pub(super) fn stats(tier: Tier, x: &[f32], stats: &mut [f32]) -> u32 {
    let s = logits_stats(tier, x);
    let good = s.max.is_finite() && s.lse.is_finite();
    stats.copy_from_slice(&if good { [s.max, s.lse as f32, s.entropy as f32] } else { [f32::NAN; 3] });
    if good { s.argmax } else { NO_TOKEN }
}

/// What rejections have left of a node's p and q, and its ratio. The rows are copied at the first, and not normalised in place but
/// beside their sums.
pub(super) struct Rest<'m> {
    pub p: &'m [f32],
    pub q: &'m [f32],
    pub r: f64,
    pub copies: Option<(Vec<f64>, Vec<f64>, [f64; 2])>,
}

impl Left for Rest<'_> {
    fn r(&self) -> f64 {
        self.r
    }

    fn ratio(&self, x: usize) -> f64 {
        let (p, q) = match &self.copies {
            Some((p, q, sums)) => (p[x] / sums[0], q[x] / sums[1]),
            None => (f64::from(self.p[x]), f64::from(self.q[x])),
        };
        ratio(self.r * p, q)
    }

    fn reject(&mut self, x: usize, replacement: bool) -> bool {
        let r = self.r;
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let (p, q, sums) = self.copies.get_or_insert_with(|| (wide(self.p), wide(self.q), [1.0; 2]));
        let rest = |p: f64, q: f64| (r * (p / sums[0]) - q / sums[1]).max(0.0);
        let sum: f64 = p.iter().zip(&*q).map(|(p, q)| rest(*p, *q)).sum();
        if sum < NOTHING {
            if r < 1.0 && p.iter().any(|p| *p > 0.0) {
                self.r = 0.0;
            }
            return false;
        }
        p.iter_mut().zip(&*q).for_each(|(p, q)| *p = rest(*p, *q));
        self.r = sum / (sum + 1.0 - r);
        sums[0] = sum;
        if !replacement {
            q[x] = 0.0;
            sums[1] = q.iter().sum();
        }
        sums[1] > 0.0
    }

    fn draw(&self, u: f64) -> u32 {
        let hit = match &self.copies {
            Some((p, ..)) => invert(p.iter().copied(), u),
            None => invert(self.p.iter().map(|p| f64::from(*p)), u),
        };
        hit.map_or(NO_TOKEN, |i| i as u32)
    }
}

/// The first place up to which the weights exceed the fraction `u` of their sum; the last that weighs anything if rounding leaves none.
fn invert(weights: impl Iterator<Item = f64> + Clone, u: f64) -> Option<usize> {
    let (mut sum, mut last) = (0.0, None);
    let at = u * weights.clone().sum::<f64>();
    for (i, w) in weights.enumerate() {
        sum += w;
        if w > 0.0 {
            last = Some(i);
        }
        if sum > at {
            break;
        }
    }
    last
}

/// In sixteen chains.
fn sum(w: &[f32]) -> f64 {
    let mut sums = [0.0f64; 16];
    for w in w.chunks(16) {
        sums.iter_mut().zip(w).for_each(|(s, w)| *s += f64::from(*w));
    }
    sums.iter().sum()
}

/// The largest of a row and its lowest id, unless there is NaN or nothing finite.
struct Best<'a>(&'a [f32]);

impl Kernel for Best<'_> {
    type Out = Option<(f32, u32)>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let max = greatest(s, self.0);
        let nan = self.0.iter().fold(false, |nan, x| nan | x.is_nan());
        let run = self.0.chunks(64).position(|x| greatest(s, x) == max)? * 64;
        let at = run + self.0[run..].iter().position(|x| *x == max)?;
        (max.is_finite() && !nan).then_some((max, at as u32))
    }
}

struct Weights<'a> {
    x: &'a [f32],
    max: f32,
    temperature: f32,
    /// Logits below it weigh nothing,
    cut: f32,
    /// nor do weights below this.
    least: f32,
    w: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Weights { x, max, temperature, cut, least, w } = self;
        let (max, temperature) = (s.splat(max), s.splat(temperature));
        let (cut, least) = (s.splat(cut), s.splat(least));
        for (x, w) in x.chunks(S::N).zip(w.chunks_mut(S::N)) {
            let v = if x.len() == S::N { s.load(x) } else { s.load_part(x, f32::NEG_INFINITY) };
            let e = exp(s, s.div(s.sub(v, max), temperature));
            let e = s.zero_below(s.zero_below(e, v, cut), e, least);
            if w.len() == S::N { s.store(e, w) } else { s.store_part(e, w) }
        }
    }
}
