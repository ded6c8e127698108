//! A target and a draft that are small enough to go through all that can happen, and the same on a backend.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use quadriga::backend::{Accepted, Backend, Buffer, Draw, Rule, Trees};
use quadriga::bench::ops::Verify;
use quadriga::decode::Sampler;
use quadriga::rng::Key;

use super::book::{Book, Choices, Found, Mutant, Outcome};
use super::common::key_in;

/// The distribution behind a text, which begins behind the root.
pub type Law = Rc<dyn Fn(&[u32]) -> Vec<f64>>;

/// One that knows the last token; the last row is for the root.
pub fn bigram<const V: usize>(rows: &[[f64; V]]) -> Law {
    let rows: Vec<Vec<f64>> = rows.iter().map(|r| r.to_vec()).collect();
    Rc::new(move |text| rows[text.last().map_or(rows.len() - 1, |t| *t as usize)].clone())
}

/// The same row behind every text.
pub fn always<const V: usize>(row: [f64; V]) -> Law {
    Rc::new(move |_| row.to_vec())
}

/// Every probability to this power: another temperature.
pub fn powered(law: &Law, power: f64) -> Law {
    let law = law.clone();
    Rc::new(move |text| {
        let p: Vec<f64> = law(text).iter().map(|p| p.powf(power)).collect();
        let sum: f64 = p.iter().sum();
        p.iter().map(|p| p / sum).collect()
    })
}

/// Another law behind texts of `length` tokens.
pub fn at_length(law: &Law, length: usize, other: Law) -> Law {
    let law = law.clone();
    Rc::new(move |text| if text.len() == length { other(text) } else { law(text) })
}

/// Logits behind every token (the root is token 0) and what is drawn from them, with the tokens before them, the root's first.
#[derive(Clone)]
pub struct Logits {
    pub rows: Vec<Vec<f32>>,
    pub sampler: Sampler,
}

impl Logits {
    fn row(&self, text: &[u32]) -> &[f32] {
        &self.rows[text.last().map_or(0, |t| *t as usize)]
    }

    /// The law in f64, each step by its definition; penalties are on the tokens that `seen` has.
    pub fn law(&self, seen: impl Fn(&[u32]) -> Vec<u32> + 'static) -> Law {
        let Self { sampler: s, .. } = *self;
        let this = self.clone();
        Rc::new(move |text| {
            let (seen, penalty) = (seen(text), f64::from(s.repeat_penalty));
            let penalized = |(i, x): (usize, &f32)| {
                let (x, hit) = (f64::from(*x), seen.contains(&(i as u32)) || i == 0);
                if !hit { x } else { x * if x > 0.0 { 1.0 / penalty } else { penalty } }
            };
            let x: Vec<f64> = this.row(text).iter().enumerate().map(penalized).collect();
            let weight = |x: &f64| (x / f64::from(s.temperature)).exp();
            let mut best: Vec<(usize, f64)> = x.iter().map(weight).enumerate().collect();
            best.sort_by(|a, b| b.1.total_cmp(&a.1));
            best.truncate(if s.top_k == 0 { x.len() } else { s.top_k });
            let (all, mut mass) = (best.iter().map(|b| b.1).sum::<f64>(), 0.0);
            best.retain(|b| {
                mass += b.1;
                mass - b.1 < f64::from(s.top_p) * all
            });
            let least = f64::from(s.min_p) * best[0].1;
            best.retain(|b| b.1 >= least);
            let sum: f64 = best.iter().map(|b| b.1).sum();
            let mut p = vec![0.0; x.len()];
            best.iter().for_each(|(i, w)| p[*i] = w / sum);
            p
        })
    }
}

/// What is drafted and what it is verified by.
#[derive(Clone)]
pub struct Case {
    pub target: Law,
    pub draft: Law,
    /// What verification is told of them: the same, unless something is wrong.
    pub told: [Law; 2],
    /// What backends make p and q of, if not of `told`.
    pub logits: Option<[Logits; 2]>,
    pub parents: Vec<u32>,
    /// Fixed drafted tokens of all nodes; else they are drawn from the draft.
    pub fixed: Option<Vec<u32>>,
    /// Whether siblings are drawn with replacement.
    pub replacement: bool,
    /// Nodes kept at most.
    pub stride: usize,
}

/// Tokens of all nodes, and the probability of their being drafted.
pub type Draft = (Vec<u32>, f64);

/// What comes out: probabilities of all texts of some length, tokens found on average, and the probability that any drafted one
/// stands.
pub struct Sums {
    pub law: BTreeMap<Vec<u32>, f64>,
    pub mean: f64,
    pub any: f64,
}

impl Case {
    pub fn new(target: Law, draft: Law, parents: &[u32]) -> Self {
        let (told, parents) = ([target.clone(), draft.clone()], parents.to_vec());
        Self { target, draft, told, logits: None, parents, fixed: None, replacement: false, stride: 5 }
    }

    pub fn p(&self, text: &[u32]) -> Vec<f64> {
        (self.told[0])(text)
    }

    pub fn q(&self, text: &[u32]) -> Vec<f64> {
        (self.told[1])(text)
    }

    /// Tokens from behind the root to `node`.
    pub fn text(&self, tokens: &[u32], mut node: usize) -> Vec<u32> {
        let mut text = Vec::new();
        while node > 0 {
            text.insert(0, tokens[node]);
            node = self.parents[node] as usize;
        }
        text
    }

    /// All that can be drafted.
    pub fn drafts(&self) -> Vec<Draft> {
        if let Some(tokens) = &self.fixed {
            return vec![(tokens.clone(), 1.0)];
        }
        let mut all = vec![(vec![0], 1.0)];
        for c in 1..self.parents.len() {
            let mut longer = Vec::new();
            for (tokens, weight) in all {
                let q = (self.draft)(&self.text(&tokens, self.parents[c] as usize));
                let gone = |x: &u32| {
                    let mut siblings = (1..c).filter(|&s| self.parents[s] == self.parents[c]);
                    !self.replacement && siblings.any(|s| tokens[s] == *x)
                };
                let left: f64 = (0..).zip(&q).filter(|(x, _)| !gone(x)).map(|(_, q)| q).sum();
                for (x, q) in (0..).zip(&q).filter(|(x, q)| **q > 0.0 && !gone(x)) {
                    longer.push(([&tokens[..], &[x]].concat(), weight * q / left));
                }
            }
            all = longer;
        }
        all
    }

    /// Everything that a rule can make of every draft.
    pub fn outcomes<'a>(&'a self, drafts: &'a [Draft], by: Verify, mutant: Mutant) -> Vec<(&'a [u32], Outcome)> {
        let of = |(tokens, weight): &'a Draft| {
            let book = Book { case: self, tokens, by, mutant };
            let all = Choices::all(|c| book.run(c));
            all.into_iter().map(move |o| (&tokens[..], Outcome { weight: o.weight * weight, ..o }))
        };
        drafts.iter().flat_map(of).collect()
    }

    /// What comes out if the target continues what was found.
    pub fn sums<'a>(&self, found: impl Iterator<Item = (&'a [u32], &'a Found, f64)>) -> Sums {
        let depth = |n: usize| self.text(&[0; 8], n).len();
        let length = (0..self.parents.len()).map(depth).max().unwrap().max(1) + 1;
        let mut sums = Sums { law: BTreeMap::new(), mean: 0.0, any: 0.0 };
        for (tokens, (path, next), w) in found {
            sums.mean += w * path.len() as f64;
            sums.any += if path.len() > 1 { w } else { 0.0 };
            let mut out = self.text(tokens, path[path.len() - 1]);
            out.push(*next);
            for (text, w) in self.continued(vec![(out, w)], length) {
                *sums.law.entry(text).or_default() += w;
            }
        }
        sums
    }

    fn continued(&self, mut texts: Vec<(Vec<u32>, f64)>, length: usize) -> Vec<(Vec<u32>, f64)> {
        while texts[0].0.len() < length {
            let longer = |(text, w): &(Vec<u32>, f64)| {
                let p = (0..).zip((self.target)(text)).filter(|(_, p)| *p > 0.0);
                p.map(|(x, p)| ([&text[..], &[x]].concat(), w * p)).collect::<Vec<_>>()
            };
            texts = texts.iter().flat_map(longer).collect();
        }
        texts
    }

    /// The greatest difference between what comes out and what the target itself would say.
    pub fn deviation(&self, sums: &Sums) -> f64 {
        let length = sums.law.keys().next().unwrap().len();
        let mut own = self.continued(vec![(Vec::new(), 1.0)], length).into_iter().collect::<BTreeMap<_, _>>();
        sums.law.iter().for_each(|(text, w)| *own.entry(text.clone()).or_default() -= w);
        own.values().fold(0.0, |most: f64, d| most.max(d.abs()))
    }

    /// What comes out by the book.
    pub fn by_the_book(&self, drafts: &[Draft], by: Verify, mutant: Mutant) -> Sums {
        let all = self.outcomes(drafts, by, mutant);
        self.sums(all.iter().map(|(tokens, o)| (*tokens, &o.found, o.weight)))
    }

    /// What comes out on a backend, by random numbers from both ends of all cells in which they decide alike.
    pub fn on<B: Backend>(&self, be: &B, drafts: &[Draft], by: Verify) -> Sums {
        let mut runs = Vec::new();
        for (tokens, o) in self.outcomes(drafts, by, Mutant::None) {
            runs.extend([false, true].map(|high| (tokens, key_in(&o.cells, high), o.weight / 2.0)));
        }
        let found = self.verify(be, &runs.iter().map(|r| (r.0, r.1)).collect::<Vec<_>>(), by);
        self.sums(runs.iter().zip(&found).map(|(run, found)| (run.0, found, run.2)))
    }

    /// Verifies drafts, each with its random numbers, all at once.
    pub fn verify<B: Backend>(&self, be: &B, runs: &[(&[u32], Key)], by: Verify) -> Vec<Found> {
        let (n, each) = (runs.len(), self.parents.len());
        let (nodes, stride) = (n * each, self.stride);
        let texts: Vec<Vec<u32>> = runs.iter().flat_map(|r| (0..each).map(|c| self.text(r.0, c))).collect();
        let vocab = self.p(&[]).len();
        let ids = |n| be.alloc::<u32>(n).unwrap();
        let (mut path, mut counts, mut next, mut picks) = (ids(n * stride), ids(n), ids(n), ids(nodes));
        let accepted = Accepted { path: path.head_mut(n * stride), counts: counts.head_mut(n), next: next.head_mut(n) };
        let tokens: Vec<u32> = runs.iter().flat_map(|r| r.0).copied().collect();
        let trees = Trees { sizes: &vec![each as u32; n], tokens: &tokens, parents: &self.parents.repeat(n) };
        match by {
            Verify::Match => {
                // One draw behind each node, by its depth: nodes of one depth share it.
                let logits = texts.iter().flat_map(|t| self.p(t)).map(|p| p.ln() as f32).collect::<Vec<_>>();
                let draw = |i: usize| {
                    let key = runs[i / each].1.at(texts[i].len() as u64);
                    Draw { temperature: 1.0, key, ..Draw::GREEDY }
                };
                let draws: Vec<Draw> = (0..nodes).map(draw).collect();
                be.sample(picks.head_mut(nodes), upload(be, &logits).head(logits.len()), &draws).unwrap();
                be.verify_tree(accepted, &trees, Rule::Match(picks.head(nodes))).unwrap();
            }
            Verify::Reject { replacement, order } => {
                let [(each_p, of), (q, drafts)] = [0, 1].map(|which| self.rows(be, &texts, which));
                let mut p = be.alloc::<B::Acc>(nodes * vocab).unwrap();
                be.gather_rows(p.head_mut(nodes * vocab), each_p.head(each_p.len()), &of, vocab).unwrap();
                let (p, q) = (p.head(nodes * vocab), q.head(q.len()));
                let keys: Vec<Key> = runs.iter().map(|r| r.1).collect();
                let rule = Rule::Reject { p, q, drafts: &drafts, keys: &keys, replacement, order };
                be.verify_tree(accepted, &trees, rule).unwrap();
            }
        }
        let (mut paths, mut kept, mut behind) = (vec![0; n * stride], vec![0; n], vec![0; n]);
        be.download(path.head(n * stride), &mut paths).unwrap();
        be.download(counts.head(n), &mut kept).unwrap();
        be.download(next.head(n), &mut behind).unwrap();
        let found = paths.chunks(stride).zip(kept).zip(behind);
        found.map(|((p, n), next)| (p[..n as usize].iter().map(|n| *n as usize).collect(), next)).collect()
    }

    /// Distributions behind texts, each once, and which is whose: p (0) or q (1), as they are told, or made on the backend of logits.
    fn rows<B: Backend>(&self, be: &B, texts: &[Vec<u32>], which: usize) -> (B::Buf<B::Acc>, Vec<u32>) {
        let each: BTreeSet<&Vec<u32>> = texts.iter().collect();
        let each: Vec<&Vec<u32>> = each.into_iter().collect();
        let of = texts.iter().map(|t| each.binary_search(&t).unwrap() as u32).collect();
        let Some(l) = self.logits.as_ref().map(|l| &l[which]) else {
            let p: Vec<f32> = each.iter().flat_map(|t| (self.told[which])(t)).map(|p| p as f32).collect();
            return (upload(be, &p), of);
        };
        let values: Vec<f32> = each.iter().flat_map(|t| l.row(t)).copied().collect();
        let (mut x, n) = (upload(be, &values), values.len());
        let mut y = be.alloc::<B::Acc>(n).unwrap();
        // The text's tokens, last first, and then the root's.
        let before = |text: &[u32]| text.iter().rev().copied().chain([0]).collect::<Vec<_>>();
        let penalties: Vec<_> =
            (0..).zip(&each).flat_map(|(row, text)| l.sampler.penalties(row, before(text).into_iter())).collect();
        be.penalize(x.head_mut(n), n / each.len(), &penalties).unwrap();
        be.distribution(y.head_mut(n), x.head(n), &vec![l.sampler.draw(Key::default()); each.len()]).unwrap();
        (y, of)
    }
}

fn upload<B: Backend>(be: &B, values: &[f32]) -> B::Buf<B::Acc> {
    let mut buf = be.alloc::<B::Acc>(values.len()).unwrap();
    be.upload_acc(buf.head_mut(values.len()), values).unwrap();
    buf
}
