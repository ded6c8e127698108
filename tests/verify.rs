//! Verification of drafted trees on every backend: the law of what it emits, by exact enumeration of drafts and random numbers; the
//! same check on rules that are wrong; and whole rounds of speculation against plain decoding.

mod common;

use std::sync::Arc;

use common::{cpus, grid_keys};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Accepted, Backend, Buffer, Draw, Mask, Rule, TreeMask, Trees};
use quadriga::decode::{Sampler, Session};
use quadriga::format::Checkpoint;
use quadriga::model::{KvCache, Model, Sequence, Want, Workspace};
use quadriga::rng::{Key, Rng};

/// Many sequences to verify by [`Rule::Reject`], or by [`Rule::Match`] with draws from `p` if `q` is empty.
#[derive(Clone, Default)]
struct Batch {
    vocab: usize,
    sizes: Vec<u32>,
    tokens: Vec<u32>,
    parents: Vec<u32>,
    drafts: Vec<u32>,
    p: Vec<f32>,
    q: Vec<f32>,
    keys: Vec<Key>,
}

/// Nodes kept, and the token behind the last.
type Found = (Vec<usize>, u32);

impl Batch {
    fn trees(&self) -> Trees<'_> {
        Trees { sizes: &self.sizes, tokens: &self.tokens, parents: &self.parents }
    }

    /// First node and nodes of each tree.
    fn spans(&self) -> Vec<(usize, usize)> {
        let mut first = 0;
        let span = |n: &u32| {
            first += *n as usize;
            (first - *n as usize, *n as usize)
        };
        self.sizes.iter().map(span).collect()
    }

    /// Of each node, its distance from node 0 of its tree.
    fn depths(&self) -> Vec<u64> {
        let mut depths = Vec::new();
        for (first, n) in self.spans() {
            for i in 0..n {
                let below = |depths: &[u64]| depths[first + self.parents[first + i] as usize] + 1;
                depths.push(if i == 0 { 0 } else { below(&depths) });
            }
        }
        depths
    }

    fn verify<B: Backend>(&self, be: &B) -> Vec<Found> {
        let (n, nodes, stride) = (self.sizes.len(), self.tokens.len(), 4);
        let upload = |x: &[f32]| {
            let mut buf = be.alloc::<B::Acc>(x.len()).unwrap();
            be.upload_acc(buf.head_mut(x.len()), x).unwrap();
            buf
        };
        let ids = |n| be.alloc::<u32>(n).unwrap();
        let (mut path, mut counts, mut next, mut picks) = (ids(n * stride), ids(n), ids(n), ids(nodes));
        let accepted = Accepted { path: path.head_mut(n * stride), counts: counts.head_mut(n), next: next.head_mut(n) };
        if self.q.is_empty() {
            // One draw behind each node, by its depth: nodes of one depth share it.
            let logits = upload(&self.p.iter().map(|p| p.ln()).collect::<Vec<_>>());
            let owners = self.spans().into_iter().zip(&self.keys).flat_map(|((_, n), key)| vec![key; n]);
            let draws: Vec<Draw> = owners
                .zip(self.depths())
                .map(|(key, depth)| Draw { temperature: 1.0, key: key.at(depth), ..Draw::GREEDY })
                .collect();
            be.sample(picks.head_mut(nodes), logits.head(self.p.len()), &draws).unwrap();
            be.verify_tree(accepted, &self.trees(), Rule::Match(picks.head(nodes))).unwrap();
        } else {
            let (p, q) = (upload(&self.p), upload(&self.q));
            let (p, q) = (p.head(self.p.len()), q.head(self.q.len()));
            let rule = Rule::Reject { p, q, drafts: &self.drafts, keys: &self.keys };
            be.verify_tree(accepted, &self.trees(), rule).unwrap();
        }
        let (mut paths, mut kept, mut behind) = (vec![0; n * stride], vec![0; n], vec![0; n]);
        be.download(path.head(n * stride), &mut paths).unwrap();
        be.download(counts.head(n), &mut kept).unwrap();
        be.download(next.head(n), &mut behind).unwrap();
        let found = paths.chunks(stride).zip(kept).zip(behind);
        found.map(|((p, n), next)| (p[..n as usize].iter().map(|n| *n as usize).collect(), next)).collect()
    }

    /// The rule in f64, or one that is not quite it.
    fn by_the_book(&self, mutant: Mutant) -> Vec<Found> {
        let row = |m: &[f32], r: usize| -> Vec<f64> {
            m[r * self.vocab..][..self.vocab].iter().map(|x| f64::from(*x)).collect()
        };
        let one = |((first, nodes), key): ((usize, usize), &Key)| {
            let (mut path, mut decision) = (vec![0], 0);
            'down: loop {
                let at = path[path.len() - 1];
                let own = row(&self.p, first + at);
                let (mut p, mut q) = (own.clone(), row(&self.q, self.drafts[first + at] as usize));
                for c in (at + 1..nodes).filter(|c| self.parents[first + c] as usize == at) {
                    let x = self.tokens[first + c] as usize;
                    let u = key.at(decision).uniform();
                    decision += 1;
                    let accept = if mutant == Mutant::AcceptsZero {
                        // The lowest cell of any grid here stands for 0.
                        let u = if u < 1.0 / 60.0 { 0.0 } else { u };
                        u * q[x] <= p[x]
                    } else {
                        u * q[x] < p[x]
                    };
                    if accept {
                        path.push(c);
                        continue 'down;
                    }
                    let norm = |w: Vec<f64>| {
                        let sum: f64 = w.iter().sum();
                        w.into_iter().map(|w| if sum > 0.0 { w / sum } else { 0.0 }).collect::<Vec<_>>()
                    };
                    p = norm(p.iter().zip(&q).map(|(p, q)| (p - q).max(0.0)).collect());
                    if mutant != Mutant::KeepsSibling {
                        q[x] = 0.0;
                        q = norm(q);
                    }
                }
                let p = if mutant == Mutant::DrawsFromTarget { own } else { p };
                let (mut sum, u) = (0.0, key.at(decision).uniform());
                let next = p.iter().position(|p| {
                    sum += p;
                    sum > u
                });
                return (path, next.unwrap_or(self.vocab - 1) as u32);
            }
        };
        self.spans().into_iter().zip(&self.keys).map(one).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mutant {
    None,
    /// Behind a rejection draws from p, not from what p has beyond q.
    DrawsFromTarget,
    /// Leaves rejected siblings in q.
    KeepsSibling,
    /// Accepts where u q(x) = p(x) = 0.
    AcceptsZero,
}

/// A target and a draft that know the token before, their last row for the root; and what is drafted.
struct Case {
    target: Vec<Vec<f64>>,
    draft: Vec<Vec<f64>>,
    parents: Vec<u32>,
    /// Fixed drafted tokens of all nodes; else they are drawn from the draft without replacement among siblings.
    fixed: Option<Vec<u32>>,
    /// Numbers of cells that the law's steps fall on.
    grid: Vec<usize>,
}

impl Case {
    fn vocab(&self) -> usize {
        self.target[0].len()
    }

    /// All drafts with their probabilities.
    fn drafts(&self) -> Vec<(Vec<u32>, f64)> {
        if let Some(tokens) = &self.fixed {
            return vec![(tokens.clone(), 1.0)];
        }
        let mut all = vec![(vec![self.vocab() as u32], 1.0)];
        for c in 1..self.parents.len() {
            let mut longer = Vec::new();
            for (tokens, weight) in all {
                let q = &self.draft[tokens[self.parents[c] as usize] as usize];
                let siblings: Vec<u32> =
                    (1..c).filter(|&s| self.parents[s] == self.parents[c]).map(|s| tokens[s]).collect();
                let left = 1.0 - siblings.iter().map(|&s| q[s as usize]).sum::<f64>();
                for x in (0..self.vocab() as u32).filter(|x| q[*x as usize] > 0.0 && !siblings.contains(x)) {
                    longer.push(([&tokens[..], &[x]].concat(), weight * q[x as usize] / left));
                }
            }
            all = longer;
        }
        all
    }

    /// Every draft with every cell of random numbers, and the probability of each.
    fn batch(&self) -> (Batch, Vec<f64>) {
        let (mut b, mut weights) = (Batch { vocab: self.vocab(), ..Batch::default() }, Vec::new());
        let keys = grid_keys(&self.grid);
        let narrow = |rows: &[Vec<f64>]| rows.iter().flatten().map(|p| *p as f32).collect::<Vec<_>>();
        if self.fixed.is_none() {
            b.q = narrow(&self.draft);
        }
        for (tokens, weight) in self.drafts() {
            for key in &keys {
                weights.push(weight / keys.len() as f64);
                b.sizes.push(tokens.len() as u32);
                b.tokens.extend(&tokens);
                b.parents.extend(&self.parents);
                b.drafts.extend(&tokens);
                tokens.iter().for_each(|t| b.p.extend(narrow(&self.target[*t as usize..][..1])));
                b.keys.push(*key);
            }
        }
        (b, weights)
    }

    /// Probabilities of the first three tokens when what verification found is continued by the target, the mean number of
    /// tokens that it found, and the probability that any drafted one stands.
    fn law(&self, batch: &Batch, weights: &[f64], found: Vec<Found>) -> (Vec<f64>, f64, f64) {
        let (v, mut law) = (self.vocab(), vec![0.0; self.vocab().pow(3)]);
        let (mut mean, mut any) = (0.0, 0.0);
        for (((first, _), w), (path, next)) in batch.spans().into_iter().zip(weights).zip(found) {
            mean += w * path.len() as f64;
            any += if path.len() > 1 { *w } else { 0.0 };
            let mut out: Vec<usize> = path[1..].iter().map(|n| batch.tokens[first + n] as usize).collect();
            out.push(next as usize);
            let mut ends = vec![(out, *w)];
            while ends[0].0.len() < 3 {
                let longer = |(o, w): &(Vec<usize>, f64)| {
                    let p = &self.target[o[o.len() - 1]];
                    (0..v).map(|x| ([&o[..], &[x]].concat(), w * p[x])).collect::<Vec<_>>()
                };
                ends = ends.iter().flat_map(longer).collect();
            }
            ends.iter().for_each(|(o, w)| law[(o[0] * v + o[1]) * v + o[2]] += w);
        }
        (law, mean, any)
    }

    /// The greatest difference between that law and the target's own.
    fn deviation(&self, law: &[f64]) -> f64 {
        let (v, t) = (self.vocab(), &self.target);
        let own = |i: usize| t[v][i / v / v] * t[i / v / v][i / v % v] * t[i / v % v][i % v];
        law.iter().enumerate().map(|(i, p)| (p - own(i)).abs()).fold(0.0, f64::max)
    }

    /// Mean number of tokens and the probability that any drafted one stands, where the law is exact.
    fn check<B: Backend>(&self, what: &str, be: &B) -> (f64, f64) {
        let (batch, weights) = self.batch();
        let (law, mean, any) = self.law(&batch, &weights, batch.verify(be));
        let error = self.deviation(&law);
        assert!(error < 1e-12, "{what}: the law is off by {error:.1e}");
        (mean, any)
    }
}

fn rows(of: &[&[f64]]) -> Vec<Vec<f64>> {
    of.iter().map(|row| row.to_vec()).collect()
}

/// A root's distribution. Behind every token follow the first two, evenly.
fn behind_root(row: &[f64]) -> Vec<Vec<f64>> {
    let mut even = vec![0.0; row.len()];
    even[..2].fill(0.5);
    [vec![even; row.len()], vec![row.to_vec()]].concat()
}

/// Two drafted tokens, one behind the other, in a bigram language.
fn chain() -> Case {
    Case {
        // The root is token 0.
        target: rows(&[&[0.5, 0.3, 0.2], &[0.1, 0.6, 0.3], &[0.25, 0.25, 0.5], &[0.5, 0.3, 0.2]]),
        draft: rows(&[&[0.4, 0.4, 0.2], &[0.2, 0.5, 0.3], &[0.3, 0.2, 0.5], &[0.4, 0.4, 0.2]]),
        parents: vec![0, 0, 1],
        fixed: None,
        grid: vec![4, 12, 20],
    }
}

/// `n` siblings, whose steps are fifteenths.
fn siblings(n: usize) -> Case {
    Case {
        target: behind_root(&[0.5, 0.3, 0.2]),
        draft: behind_root(&[0.2, 0.5, 0.3]),
        parents: vec![0; n + 1],
        fixed: None,
        grid: [15, 2, 2, 2][..n + 1].to_vec(),
    }
}

/// Siblings of which several are rejected by parts, in a language of four tokens.
fn four() -> Case {
    Case {
        target: behind_root(&[0.4, 0.3, 0.2, 0.1]),
        draft: behind_root(&[0.1, 0.2, 0.3, 0.4]),
        parents: vec![0; 3],
        fixed: None,
        grid: vec![12, 8, 2],
    }
}

/// Siblings at two depths.
fn bush() -> Case {
    Case {
        target: vec![vec![0.5, 0.25, 0.25]; 4],
        draft: vec![vec![0.25, 0.5, 0.25]; 4],
        parents: vec![0, 0, 0, 1, 1],
        fixed: None,
        grid: vec![2, 4, 4, 4],
    }
}

/// Children that are fixed beforehand, one draw at each node.
fn fixed(parents: &[u32], tokens: &[u32], target: Vec<Vec<f64>>, grid: &[usize]) -> Case {
    let draft = Vec::new();
    Case { target, draft, parents: parents.to_vec(), fixed: Some(tokens.to_vec()), grid: grid.to_vec() }
}

fn laws_are_the_targets<B: Backend>(be: &B) {
    let near = |what: &str, got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{what}: {got}, not {want}");
    near("tokens of a chain", chain().check("chain", be).0, 2.72);
    for (n, want) in [(1, 0.7), (2, 0.808571), (3, 1.0)] {
        near("one of the siblings", siblings(n).check("siblings", be).1, want);
    }
    four().check("four tokens", be);
    bush().check("two depths", be);
    let bigram = chain().target;
    let tree = fixed(&[0, 0, 0, 1, 1, 2], &[3, 0, 1, 0, 1, 1], bigram.clone(), &[20, 20, 20]);
    near("tokens of a fixed tree", tree.check("fixed tree", be).0, 2.38);
    for (n, want) in [(1, 0.3), (2, 0.5), (3, 1.0)] {
        let tokens = &[3, 1, 2, 0][..n + 1];
        let case = fixed(&[0; 4][..n + 1], tokens, behind_root(&[0.5, 0.3, 0.2]), &[10, 2]);
        near("one of the fixed children", case.check("fixed children", be).1, want);
    }
    // A draft that is the target: every token stands.
    let mut own = chain();
    own.draft = own.target.clone();
    own.grid = vec![1, 1, 20];
    near("tokens of the target's own draft", own.check("own draft", be).0, 3.0);
    // A draft that only says what the target never does: none stands, and the law is still the target's.
    let mut wrong = siblings(1);
    (wrong.target, wrong.draft, wrong.grid) =
        (behind_root(&[0.0, 0.7, 0.3]), behind_root(&[1.0, 0.0, 0.0]), vec![1, 10]);
    near("tokens of a draft that is never right", wrong.check("wrong draft", be).0, 1.0);
}

#[test]
fn naive_emits_the_targets_law() {
    laws_are_the_targets(&Naive);
}

#[test]
fn cpu_emits_the_targets_law() {
    cpus().for_each(|cpu| laws_are_the_targets(&cpu));
}

#[test]
fn cuda_emits_the_targets_law() {
    if let Some(cuda) = common::gpu() {
        laws_are_the_targets(&cuda);
    }
}

/// The check of the law sees every rule and every use of the rules that is not lossless.
#[test]
fn what_is_not_lossless_is_seen() {
    let off = |what: &str, case: &Case, batch: &Batch, weights: &[f64], found: Vec<Found>| {
        let error = case.deviation(&case.law(batch, weights, found).0);
        assert!(error > 1e-3, "{what} passes: the law is off by {error:.1e} only");
    };
    for case in [chain(), siblings(2), siblings(3), four(), bush()] {
        let (batch, _) = case.batch();
        assert_eq!(batch.by_the_book(Mutant::None), batch.verify(&Naive));
    }
    let mutant = |case: Case, mutant: Mutant| {
        let (batch, weights) = case.batch();
        off(&format!("{mutant:?}"), &case, &batch, &weights, batch.by_the_book(mutant));
    };
    mutant(chain(), Mutant::DrawsFromTarget);
    mutant(siblings(1), Mutant::DrawsFromTarget);
    mutant(four(), Mutant::KeepsSibling);
    let mut zero = siblings(1);
    (zero.target, zero.draft, zero.grid) = (behind_root(&[0.0, 0.7, 0.3]), behind_root(&[0.5, 0.3, 0.2]), vec![60, 10]);
    let (batch, weights) = zero.batch();
    assert!(zero.deviation(&zero.law(&batch, &weights, batch.verify(&Naive)).0) < 1e-12);
    mutant(zero, Mutant::AcceptsZero);

    // The last token from another distribution: the target's at another temperature, say.
    let case = chain();
    let (mut batch, weights) = case.batch();
    batch.p.chunks_exact_mut(9).for_each(|p| p[6..].copy_from_slice(&[0.2, 0.2, 0.6]));
    off("another temperature for the last token", &case, &batch, &weights, batch.verify(&Naive));
    // Acceptance by another q than was drawn from: of an updated draft, or at another temperature.
    let (mut batch, weights) = case.batch();
    batch.q = [[0.6f32, 0.2, 0.2]; 4].concat();
    off("acceptance by another q", &case, &batch, &weights, batch.verify(&Naive));
    // Of two children that were drawn the likelier one alone.
    let two = siblings(2);
    let (mut batch, weights) = two.batch();
    let q: Vec<f32> = batch.q[9..].to_vec();
    for t in batch.tokens.chunks_exact_mut(3) {
        t[1] = if q[t[1] as usize] > q[t[2] as usize] { t[1] } else { t[2] };
    }
    let keep = |x: &[u32]| x.chunks_exact(3).flat_map(|x| [x[0], x[1]]).collect::<Vec<u32>>();
    (batch.tokens, batch.parents, batch.drafts) = (keep(&batch.tokens), keep(&batch.parents), keep(&batch.drafts));
    batch.sizes.fill(2);
    batch.p = batch.p.chunks_exact(9).flat_map(|p| p[..6].to_vec()).collect();
    off("children pruned by their probability", &two, &batch, &weights, batch.verify(&Naive));
}

#[test]
fn misuse_is_an_error() {
    let mut out = ([0; 8], [0; 2], [0; 2]);
    let mut verify = |sizes: &[u32], tokens: &[u32], parents: &[u32], rule: Rule<'_, Naive>| {
        let (path, counts, next) = (&mut out.0[..], &mut out.1[..], &mut out.2[..]);
        let trees = Trees { sizes, tokens, parents };
        Naive.verify_tree(Accepted { path, counts, next }, &trees, rule).map_err(|e| e.to_string())
    };
    let says = |r: Result<(), String>, word: &str| assert!(r.as_ref().is_err_and(|e| e.contains(word)), "{r:?}");
    let picks = &[0; 4][..];
    says(verify(&[4], &[0; 4], &[0; 4], Rule::Match(picks)), "1 trees");
    says(verify(&[2, 1], &[0; 4], &[0; 4], Rule::Match(picks)), "3 nodes");
    says(verify(&[4, 0], &[0; 4], &[0; 4], Rule::Match(picks)), "without node 0");
    says(verify(&[2, 2], &[0; 4], &[0, 0, 0, 1], Rule::Match(picks)), "before their children");
    assert!(verify(&[2, 2], &[0; 4], &[9, 0, 9, 0], Rule::Match(picks)).is_ok());
    let (p, q, keys) = (&[0.25; 16][..], &[0.25; 8][..], [Key::default(); 2]);
    let mut reject = |tokens: &[u32], drafts: &[u32], keys: &[Key]| {
        let rule = Rule::Reject { p, q, drafts, keys };
        verify(&[2, 2], tokens, &[0; 4], rule)
    };
    says(reject(&[0, 4, 0, 0], &[0; 4], &keys), "token 4");
    says(reject(&[0; 4], &[2, 0, 0, 0], &keys), "row 2");
    says(reject(&[0; 4], &[0; 4], &keys[..1]), "1 keys");
    // Tokens and rows that nothing looks at may be anything.
    assert!(reject(&[9, 0, 9, 0], &[1, 7, 1, 7], &keys).is_ok());
}

/// Speculation over several sequences at once, with drafts that are right here and there: it must emit the tokens that plain
/// sampling with the same seed emits.
fn speculation_is_plain_sampling<B: Backend>(be: B, tokens_each: usize) {
    let path = common::root().join("models/tiny-llama");
    let m = Arc::new(Model::load(Arc::new(be), &Checkpoint::open(&path).unwrap(), |_, _| {}).unwrap());
    let (be, cfg) = (m.backend(), m.config());
    let prompts: [&[u32]; 3] = [&[17, 4, 99], &[5], &[1, 2, 3, 4, 5, 6, 7]];
    let samplers = [
        Sampler { temperature: 0.8, top_p: 0.95, ..Sampler::greedy() },
        Sampler::greedy(),
        Sampler { temperature: 1.0, top_k: 40, ..Sampler::greedy() },
    ];
    let key = |stream: usize, counter: usize| Key { seed: 6, stream: stream as u64, counter: counter as u64 };
    let plain: Vec<Vec<u32>> = (0..3)
        .map(|i| {
            let mut s = Session::new(m.clone(), 64, 6).unwrap();
            s.stream = i as u64;
            s.push(prompts[i]);
            for _ in 0..tokens_each {
                s.advance().unwrap();
                let token = s.sample(&samplers[i]).unwrap();
                let (mut logits, at) = (s.logits().unwrap().to_vec(), s.tokens().len());
                assert_eq!(token, samplers[i].sample(&mut logits, s.tokens(), key(i, at)).unwrap(), "on the host");
                s.push(&[token]);
            }
            s.tokens().to_vec()
        })
        .collect();

    let mut ws = Workspace::new(be, cfg, 64, 64).unwrap();
    let mut rng = Rng::new(2);
    let mut caches: Vec<KvCache<B>> = (0..3).map(|_| KvCache::new(be, cfg, 64).unwrap()).collect();
    let mut texts: Vec<Vec<u32>> = prompts.iter().map(|p| p.to_vec()).collect();
    for (cache, text) in caches.iter_mut().zip(&texts) {
        let n = text.len() - 1;
        let seq = Sequence { cache, tokens: &text[..n], mask: Mask::Causal, want: Want::Nothing };
        m.forward(&mut [seq], &mut ws).unwrap();
        cache.commit_first(n).unwrap();
    }
    let stride = 5;
    let ids = |n| be.alloc::<u32>(n).unwrap();
    let (mut path, mut counts, mut next, mut picks) = (ids(3 * stride), ids(3), ids(3), ids(64));
    let mut kept_drafts = 0;
    while texts.iter().zip(prompts).any(|(t, p)| t.len() < p.len() + tokens_each) {
        // Node 0 is the last token; behind each of the first three nodes two guesses, of which one may be right.
        let (mut masks, mut all, mut parents, mut draws) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (i, text) in texts.iter().enumerate() {
            let tree: Vec<u32> = vec![TreeMask::ROOT, 0, 0, 1, 1, 2, 2];
            let mask = TreeMask::new(&tree).unwrap();
            for (node, &parent) in tree.iter().enumerate() {
                let at = text.len() - 1 + mask.depth(node) as usize;
                let right = plain[i].get(at).copied().filter(|_| node % 2 == 1 || rng.below(3) > 0);
                all.push(if node == 0 { text[at] } else { right.unwrap_or(rng.below(cfg.vocab) as u32) });
                parents.push(parent);
                draws.push(samplers[i].draw(key(i, at + 1)));
            }
            masks.push(mask);
        }
        let parts = caches.iter_mut().zip(all.chunks(7)).zip(&masks);
        let mut seqs: Vec<Sequence<'_, B>> = parts
            .map(|((cache, tokens), mask)| Sequence { cache, tokens, mask: Mask::Tree(mask), want: Want::All })
            .collect();
        let rows = m.forward(&mut seqs, &mut ws).unwrap();
        be.sample(picks.head_mut(rows), ws.logit_rows(rows), &draws).unwrap();
        let accepted = Accepted { path: path.head_mut(3 * stride), counts: counts.head_mut(3), next: next.head_mut(3) };
        let trees = Trees { sizes: &[7; 3], tokens: &all, parents: &parents };
        be.verify_tree(accepted, &trees, Rule::Match(picks.head(rows))).unwrap();
        let mut each: Vec<&mut KvCache<B>> = caches.iter_mut().collect();
        let kept = KvCache::commit_batch(be, &mut each, &path, &counts, stride).unwrap();
        let (mut paths, mut behind) = (vec![0; 3 * stride], vec![0; 3]);
        be.download(path.head(3 * stride), &mut paths).unwrap();
        be.download(next.head(3), &mut behind).unwrap();
        for (i, text) in texts.iter_mut().enumerate() {
            let nodes = &paths[i * stride..][1..kept[i] as usize];
            kept_drafts += nodes.len();
            text.extend(nodes.iter().map(|n| all[7 * i + *n as usize]));
            text.push(behind[i]);
            assert_eq!(caches[i].len() + 1, text.len());
        }
    }
    for (i, (text, plain)) in texts.iter().zip(&plain).enumerate() {
        assert_eq!(text[..plain.len()], plain[..], "sequence {i}");
    }
    assert!(kept_drafts > tokens_each, "only {kept_drafts} drafted tokens stood");
}

#[test]
fn naive_speculation_is_plain_sampling() {
    speculation_is_plain_sampling(Naive, 16);
}

#[test]
fn cpu_speculation_is_plain_sampling() {
    cpus().for_each(|cpu| speculation_is_plain_sampling(cpu, 24));
}

#[test]
fn cuda_speculation_is_plain_sampling() {
    if let Some(cuda) = common::gpu() {
        speculation_is_plain_sampling(cuda, 10);
    }
}
