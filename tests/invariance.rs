//! What speculation and reproducibility rest on: a row's result depends neither on the rows beside it, nor on the number
//! of threads, nor on whether its keys were committed or staged, in a line or in a tree, at once or level by level. All comparisons are of bits.

mod common;

use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::{Backend, Mask, TreeMask};
use quadriga::format::Checkpoint;
use quadriga::model::{KvCache, Model, Sequence, Want, Workspace};
use quadriga::rng::Rng;

struct Run<B: Backend> {
    model: Model<B>,
    ws: Workspace<B>,
}

impl<B: Backend> Run<B> {
    fn new(name: &str, be: B) -> Self {
        let path = common::root().join("models").join(name);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let model = Model::load(Arc::new(be), &checkpoint, |_, _| {}).unwrap();
        let ws = Workspace::new(model.backend(), model.config(), 64, 64).unwrap();
        Self { model, ws }
    }

    fn cache(&self) -> KvCache<B> {
        KvCache::new(self.model.backend(), self.model.config(), 128).unwrap()
    }

    /// Bits of the logits of every row of a pass.
    fn pass(&mut self, cache: &mut KvCache<B>, tokens: &[u32], mask: Mask<'_>) -> Vec<Vec<u32>> {
        self.run(Sequence::new(cache, tokens, mask, Want::All))
    }

    fn run(&mut self, seq: Sequence<'_, B>) -> Vec<Vec<u32>> {
        let rows = self.model.forward(&mut [seq], &mut self.ws).unwrap();
        let mut row = vec![0.0; self.model.config().vocab];
        (0..rows)
            .map(|r| {
                self.ws.logits(self.model.backend(), r, &mut row).unwrap();
                row.iter().map(|x| x.to_bits()).collect()
            })
            .collect()
    }

    /// Token by token: the rows that everything else must equal.
    fn one_by_one(&mut self, tokens: &[u32]) -> Vec<Vec<u32>> {
        let mut cache = self.cache();
        let mut rows = Vec::new();
        for t in tokens {
            rows.extend(self.pass(&mut cache, &[*t], Mask::Causal));
            cache.commit_first(1).unwrap();
        }
        rows
    }
}

fn random(rng: &mut Rng, n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|_| rng.below(vocab) as u32).collect()
}

const MODELS: [&str; 5] = ["tiny-gguf/legacy.gguf", "tiny-gguf/k.gguf", "tiny-llama", "tiny-mistral", "tiny-gemma3"];

/// Every model on every tier, with both kinds of arithmetic.
fn every(mut f: impl FnMut(&str, &str, Tier, Compute)) {
    for name in MODELS {
        for tier in Tier::available() {
            for compute in [Compute::Fast, Compute::Exact] {
                f(name, &format!("{name} {tier} {compute:?}"), tier, compute);
            }
        }
    }
}

fn batches_equal_singles<B: Backend>(
    run: &mut Run<B>,
    single: &[Vec<u32>],
    tokens: &[u32],
    rng: &mut Rng,
    label: &str,
) {
    let (mut cache, mut at) = (run.cache(), 0);
    while at < tokens.len() {
        let n = (1 + rng.below(64)).min(tokens.len() - at);
        let rows = run.pass(&mut cache, &tokens[at..at + n], Mask::Causal);
        cache.commit_first(n).unwrap();
        for (i, row) in rows.iter().enumerate() {
            assert!(row == &single[at + i], "{label}: row {i} of {n} at {at}");
        }
        at += n;
    }
}

/// `same` says whether two rows of logits count as equal.
fn tree_paths_equal_lines<B: Backend>(mut run: Run<B>, rng: &mut Rng, label: &str, same: fn(&[u32], &[u32]) -> bool) {
    let vocab = run.model.config().vocab;
    let (prefix_len, n) = (1 + rng.below(40), 2 + rng.below(62));
    let prefix = random(rng, prefix_len, vocab);
    let tokens = random(rng, n, vocab);
    let parents: Vec<u32> =
        (0..n).map(|i| if i == 0 || rng.below(6) == 0 { TreeMask::ROOT } else { rng.below(i) as u32 }).collect();
    let mask = TreeMask::new(&parents).unwrap();
    let mut cache = run.cache();
    run.pass(&mut cache, &prefix, Mask::Causal);
    cache.commit_first(prefix.len()).unwrap();
    let rows = run.pass(&mut cache, &tokens, Mask::Tree(&mask));
    let leaf = rng.below(n) as u32;
    let mut path = vec![leaf];
    while mask.parent(path[0] as usize) != TreeMask::ROOT {
        path.insert(0, mask.parent(path[0] as usize));
    }
    let line: Vec<u32> = prefix.iter().copied().chain(path.iter().map(|&p| tokens[p as usize])).collect();
    let mut next = line.clone();
    next.push(1);
    let single = run.one_by_one(&next);
    for (i, &p) in path.iter().enumerate() {
        assert!(same(&rows[p as usize], &single[prefix.len() + i]), "{label}: node {p} of {n}");
    }
    // The committed path must serve the next token as if it had been decoded.
    cache.commit(run.model.backend(), &path).unwrap();
    let after = run.pass(&mut cache, &[1], Mask::Causal);
    assert!(same(&after[0], &single[line.len()]), "{label}: after committing {path:?}");
    // Level by level is the same bits everywhere.
    let mut grown = run.cache();
    run.pass(&mut grown, &prefix, Mask::Causal);
    grown.commit_first(prefix.len()).unwrap();
    let (mut at, mut levels) = (0, Vec::new());
    while at < n {
        let end = n.min(at + 1 + rng.below(24));
        let (mask, tokens) = (TreeMask::new(&parents[..end]).unwrap(), &tokens[at..end]);
        levels.extend(run.run(match at {
            0 => Sequence::new(&mut grown, tokens, Mask::Tree(&mask), Want::All),
            _ => Sequence::extend(&mut grown, tokens, Mask::Tree(&mask), Want::All),
        }));
        at = end;
    }
    assert!(levels == rows, "{label}: level by level");
    grown.commit(run.model.backend(), &path).unwrap();
    assert!(run.pass(&mut grown, &[1], Mask::Causal) == after, "{label}: after committing {path:?} of levels");
}

/// A row of a block sees its block and what is before: in a pass of all blocks, behind a committed part that ends anywhere, or behind
/// blocks that earlier passes staged.
fn blocks_equal_one_pass<B: Backend>(mut run: Run<B>, rng: &mut Rng, n: usize, label: &str) {
    let tokens = random(rng, n, run.model.config().vocab);
    let block = 2 + rng.below(n / 3);
    let all = Mask::Blocks { block, offset: 0 };
    let mut whole = run.cache();
    let rows = run.pass(&mut whole, &tokens, all);
    for cut in [1 + rng.below(n - 1), block, block + 1] {
        whole.commit_first(cut).unwrap();
        let rest = run.pass(&mut whole, &tokens[cut..], Mask::Blocks { block, offset: cut % block });
        assert!(rest == rows[cut..], "{label}: {n} rows in blocks of {block}, {cut} committed");
        whole.truncate(0);
        run.pass(&mut whole, &tokens, all);
    }
    let (mut by_blocks, mut grown) = (run.cache(), run.cache());
    let mut at = 0;
    while at < n {
        let one = run.pass(&mut by_blocks, &tokens[at..n.min(at + block)], Mask::Full);
        by_blocks.commit_first(one.len()).unwrap();
        assert!(one == rows[at..at + one.len()], "{label}: {n} rows, block of {block} at {at}");
        let some = n.min(at + block * (1 + rng.below(2)));
        if grown.staged() <= at {
            let part = &tokens[at..some];
            let next = run.run(match at {
                0 => Sequence::new(&mut grown, part, all, Want::All),
                _ => Sequence::extend(&mut grown, part, all, Want::All),
            });
            assert!(
                next == rows[at..some],
                "{label}: {n} rows in blocks of {block}, {at} staged before {}",
                part.len()
            );
        }
        at += one.len();
    }
}

fn sequences_do_not_mix<B: Backend>(mut run: Run<B>, rng: &mut Rng) {
    let vocab = run.model.config().vocab;
    let texts: Vec<Vec<u32>> = [3, 1, 20].map(|n| random(rng, n, vocab)).into();
    let alone: Vec<_> = texts.iter().flat_map(|t| run.one_by_one(t)).collect();
    let mut caches: Vec<_> = texts.iter().map(|_| run.cache()).collect();
    let mut seqs: Vec<_> = caches
        .iter_mut()
        .zip(&texts)
        .map(|(cache, tokens)| Sequence::new(cache, tokens, Mask::Causal, Want::All))
        .collect();
    let rows = run.model.forward(&mut seqs, &mut run.ws).unwrap();
    assert_eq!(rows, alone.len());
    let mut row = vec![0.0; vocab];
    for (i, want) in alone.iter().enumerate() {
        run.ws.logits(run.model.backend(), i, &mut row).unwrap();
        assert!(row.iter().map(|x| x.to_bits()).eq(want.iter().copied()), "row {i}");
    }
}

#[test]
fn batches_of_any_size_equal_single_rows() {
    let mut rng = Rng::new(11);
    every(|name, label, tier, compute| {
        let mut run = Run::new(name, Cpu::with(1, tier, compute));
        let tokens = random(&mut rng, 90, run.model.config().vocab);
        let single = run.one_by_one(&tokens);
        for threads in [1, 2, 3] {
            let mut run = Run::new(name, Cpu::with(threads, tier, compute));
            for _ in 0..3 {
                let label = format!("{label}, {threads} threads");
                batches_equal_singles(&mut run, &single, &tokens, &mut rng, &label);
            }
        }
    });
}

#[test]
fn tree_paths_equal_plain_sequences() {
    let mut rng = Rng::new(12);
    every(|name, label, tier, compute| {
        let bits = |a: &[u32], b: &[u32]| a == b;
        tree_paths_equal_lines(Run::new(name, Cpu::with(2, tier, compute)), &mut rng, label, bits);
    });
}

#[test]
fn blocks_of_rows_equal_one_pass() {
    let mut rng = Rng::new(15);
    every(|name, label, tier, compute| {
        for _ in 0..2 {
            let n = 8 + rng.below(56);
            blocks_equal_one_pass(Run::new(name, Cpu::with(2, tier, compute)), &mut rng, n, label);
        }
    });
}

#[test]
fn sequences_of_one_pass_do_not_mix() {
    sequences_do_not_mix(Run::new("tiny-gemma3", Cpu::with(2, Tier::detect(), Compute::Fast)), &mut Rng::new(13));
}

#[test]
fn cuda_rows_are_independent() {
    let mut rng = Rng::new(14);
    for name in ["tiny-gguf/k.gguf", "tiny-mistral", "tiny-gemma3"] {
        let Some(cuda) = common::gpu() else { return };
        let mut run = Run::new(name, cuda);
        let tokens = random(&mut rng, 40, run.model.config().vocab);
        let single = run.one_by_one(&tokens);
        batches_equal_singles(&mut run, &single, &tokens, &mut rng, name);
        // A tensor core sums sixteen keys at a time, in the order in which they lie: in a tree that is another order than in a
        // line, so that here the last bits are free.
        let near =
            |a: &[u32], b: &[u32]| a.iter().zip(b).all(|(a, b)| (f32::from_bits(*a) - f32::from_bits(*b)).abs() < 0.05);
        tree_paths_equal_lines(run, &mut rng, name, near);
    }
    for name in ["tiny-llama", "tiny-gemma3"] {
        let Some(cuda) = common::gpu() else { return };
        blocks_equal_one_pass(Run::new(name, cuda), &mut rng, 20, name);
    }
    if let Some(cuda) = common::gpu() {
        sequences_do_not_mix(Run::new("tiny-gemma3", cuda), &mut rng);
    }
}
