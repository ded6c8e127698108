//! From logits to tokens, and which drafted tokens stand.
//!
//! A row is one task, so that neither the rows beside it nor threads can change it. A row without top-k and top-p is read twice,
//! once for the sums of its pieces and then in the piece that holds the token; with them only as many of its largest logits as
//! the cuts need are put into order. Weights are f32, sums of them f64.

use super::Tier;
use super::lanes::math::exp;
use super::lanes::{Kernel, Simd, dispatch};
use super::logits::{logits_stats, top_k};
use crate::backend::sampling::Tree;
use crate::backend::{Draw, NO_TOKEN};
use crate::rng::Key;

/// Logits of a piece.
const PIECE: usize = 4096;
/// How many of the largest logits are asked for first where top-p decides how many are needed.
const FIRST: usize = 256;

/// What a row's token is drawn from; weights are relative to that of the best.
enum Kept {
    /// All that weigh at least this.
    All(f32),
    /// These, by id.
    Some(Vec<(u32, f32)>),
}

/// A row of logits and how it is drawn from.
struct Law<'a> {
    tier: Tier,
    x: &'a [f32],
    max: f32,
    temperature: f32,
    kept: Kept,
}

impl<'a> Law<'a> {
    /// `None` if `x` holds NaN or nothing finite.
    fn new(tier: Tier, x: &'a [f32], draw: &Draw) -> Option<Self> {
        let (max, best) = dispatch(tier, Best(x))?;
        let temperature = draw.temperature;
        if draw.is_greedy() {
            return Some(Self { tier, x, max, temperature: 1.0, kept: Kept::Some(vec![(best, 1.0)]) });
        }
        let mut law = Self { tier, x, max, temperature, kept: Kept::All(draw.min_p) };
        let limited = (1..x.len()).contains(&(draw.top_k as usize));
        if !limited && draw.top_p >= 1.0 {
            return Some(law);
        }
        let mut ranked;
        let total: f64;
        if limited {
            ranked = law.largest(draw.top_k as usize);
            total = ranked.iter().map(|k| f64::from(k.1)).sum();
        } else {
            total = x.chunks(PIECE).map(|x| law.mass(x, 0.0)).sum();
            let mut n = FIRST;
            ranked = law.largest(n);
            while n < x.len() && ranked.iter().map(|k| f64::from(k.1)).sum::<f64>() < f64::from(draw.top_p) * total {
                n *= 16;
                ranked = law.largest(n);
            }
        }
        if draw.top_p < 1.0 {
            let mut mass = 0.0;
            ranked.retain(|k| {
                let keep = mass < f64::from(draw.top_p) * total;
                mass += f64::from(k.1);
                keep
            });
        }
        ranked.retain(|k| k.1 >= draw.min_p);
        ranked.sort_unstable_by_key(|k| k.0);
        law.kept = Kept::Some(ranked);
        Some(law)
    }

    /// The k largest with their weights, largest first.
    fn largest(&self, k: usize) -> Vec<(u32, f32)> {
        let mut top = top_k(self.tier, self.x, k);
        let x: Vec<f32> = top.iter().map(|t| t.1).collect();
        let mut w = vec![0.0; x.len()];
        self.weights(&x, 0.0, &mut w);
        top.iter_mut().zip(w).for_each(|(t, w)| t.1 = w);
        top
    }

    /// e^((x - max) / temperature), 0 where that is below `least`.
    fn weights(&self, x: &[f32], least: f32, w: &mut [f32]) {
        dispatch(self.tier, Weights { x, max: self.max, temperature: self.temperature, least, w });
    }

    /// The sum of the weights of at most a piece of logits.
    fn mass(&self, x: &[f32], least: f32) -> f64 {
        let mut w = [0.0; PIECE];
        self.weights(x, least, &mut w[..x.len()]);
        sum(&w[..x.len()])
    }

    /// Draws without replacement.
    fn draw(mut self, key: Key, tokens: &mut [u32]) {
        let uniforms = (0..).map(|i| key.at(i).uniform());
        let least = match &mut self.kept {
            Kept::All(least) => *least,
            Kept::Some(list) => {
                for (token, u) in tokens.iter_mut().zip(uniforms) {
                    let hit = invert(list.iter().map(|k| f64::from(k.1)), u);
                    *token = hit.map_or(NO_TOKEN, |i| list.remove(i).0);
                }
                return;
            }
        };
        let mut masses: Vec<f64> = self.x.chunks(PIECE).map(|x| self.mass(x, least)).collect();
        // The piece of the last token, without what was drawn from it.
        let mut w = vec![0.0; PIECE.min(self.x.len())];
        for (i, u) in uniforms.take(tokens.len()).enumerate() {
            let (before, at) = tokens.split_at_mut(i);
            at[0] = NO_TOKEN;
            let u = u * masses.iter().sum::<f64>();
            let mut below = 0.0;
            let Some(piece) = masses.iter().position(|m| {
                below += m;
                below > u
            }) else {
                continue;
            };
            let first = piece * PIECE;
            let x = &self.x[first..self.x.len().min(first + PIECE)];
            let w = &mut w[..x.len()];
            self.weights(x, least, w);
            for t in before.iter().map(|t| *t as usize).filter(|t| (first..first + x.len()).contains(t)) {
                w[t - first] = 0.0;
            }
            let rest = (u - (below - masses[piece])) / masses[piece];
            if let Some(hit) = invert(w.iter().map(|w| f64::from(*w)), rest) {
                at[0] = (first + hit) as u32;
                w[hit] = 0.0;
                masses[piece] = sum(w);
            }
        }
    }
}

/// Draws tokens of a row without replacement, as [`Backend::sample`](crate::backend::Backend::sample) does for many.
pub fn sample(tier: Tier, x: &[f32], draw: &Draw, tokens: &mut [u32]) {
    match Law::new(tier, x, draw) {
        Some(law) => law.draw(draw.key, tokens),
        None => tokens.fill(NO_TOKEN),
    }
}

/// The distribution that the first token is drawn from; 0 where there is none.
pub fn distribution(tier: Tier, x: &[f32], draw: &Draw, p: &mut [f32]) {
    p.fill(0.0);
    let Some(law) = Law::new(tier, x, draw) else { return };
    match &law.kept {
        Kept::All(least) => law.weights(x, *least, p),
        Kept::Some(list) => list.iter().for_each(|k| p[k.0 as usize] = k.1),
    }
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

/// [`Rule::Reject`](crate::backend::Rule::Reject) for one sequence: writes the path, says how long it is and which token follows.
/// p and q are not normalised in place but beside their sums.
pub(super) fn reject<'m>(
    tree: &Tree<'_>,
    p: impl Fn(usize) -> &'m [f32],
    q: impl Fn(usize) -> &'m [f32],
    key: Key,
    path: &mut [u32],
) -> (u32, u32) {
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let (mut node, mut kept, mut decision) = (0, 0, 0);
    let mut uniform = || {
        decision += 1;
        key.at(decision - 1).uniform()
    };
    'down: loop {
        path[kept] = node as u32;
        kept += 1;
        let given = p(node);
        // Since the first rejection at this node: p and q, and their sums.
        let mut left: Option<(Vec<f64>, Vec<f64>, [f64; 2])> = None;
        for child in tree.children(node).take_while(|_| kept < path.len()) {
            let x = tree.tokens[child] as usize;
            let (px, qx) = match &left {
                Some((p, q, sums)) => (p[x] / sums[0], q[x] / sums[1]),
                None => (f64::from(given[x]), f64::from(q(node)[x])),
            };
            if uniform() * qx < px {
                node = child;
                continue 'down;
            }
            let (p, q, sums) = left.get_or_insert_with(|| (wide(given), wide(q(node)), [1.0; 2]));
            let rest = |p: f64, q: f64| (p / sums[0] - q / sums[1]).max(0.0);
            let sum: f64 = p.iter().zip(&*q).map(|(p, q)| rest(*p, *q)).sum();
            // p was q but for rounding: p is right as it is.
            if sum == 0.0 {
                break;
            }
            p.iter_mut().zip(&*q).for_each(|(p, q)| *p = rest(*p, *q));
            q[x] = 0.0;
            *sums = [sum, q.iter().sum()];
            if sums[1] == 0.0 {
                break;
            }
        }
        let next = match left {
            Some((p, ..)) => invert(p.into_iter(), uniform()),
            None => invert(given.iter().map(|p| f64::from(*p)), uniform()),
        };
        return (kept as u32, next.map_or(NO_TOKEN, |i| i as u32));
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
        let max = super::logits::greatest(s, self.0);
        let nan = self.0.iter().fold(false, |nan, x| nan | x.is_nan());
        let at = self.0.iter().position(|x| *x == max)?;
        (max.is_finite() && !nan).then_some((max, at as u32))
    }
}

struct Weights<'a> {
    x: &'a [f32],
    max: f32,
    temperature: f32,
    least: f32,
    w: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Weights { x, max, temperature, least, w } = self;
        let (max, temperature, least) = (s.splat(max), s.splat(temperature), s.splat(least));
        for (x, w) in x.chunks(S::N).zip(w.chunks_mut(S::N)) {
            let v = if x.len() == S::N { s.load(x) } else { s.load_part(x, f32::NEG_INFINITY) };
            let e = exp(s, s.div(s.sub(v, max), temperature));
            let e = s.zero_below(e, e, least);
            if w.len() == S::N { s.store(e, w) } else { s.store_part(e, w) }
        }
    }
}
