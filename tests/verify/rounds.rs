//! Whole rounds of speculation.

use std::sync::Arc;

use quadriga::backend::naive::Naive;
use quadriga::backend::{Accepted, Backend, Buffer, Mask, Rule, TreeMask, Trees};
use quadriga::decode::{Sampler, Session};
use quadriga::format::Checkpoint;
use quadriga::model::{KvCache, Model, Sequence, Want, Workspace};
use quadriga::rng::{Key, Rng};

use super::common::{self, cpus};

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
        Sampler { temperature: 1.0, top_k: 40, repeat_penalty: 1.3, ..Sampler::greedy() },
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
        let seq = Sequence::new(cache, &text[..n], Mask::Causal, Want::Nothing);
        m.forward(&mut [seq], &mut ws).unwrap();
        cache.commit_first(n).unwrap();
    }
    let stride = 5;
    let ids = |n| be.alloc::<u32>(n).unwrap();
    let (mut path, mut counts, mut next, mut picks) = (ids(3 * stride), ids(3), ids(3), ids(64));
    let mut logits = be.alloc::<B::Acc>(21 * cfg.vocab).unwrap();
    let mut kept_drafts = 0;
    while texts.iter().zip(prompts).any(|(t, p)| t.len() < p.len() + tokens_each) {
        // Node 0 is the last token; behind each of the first three nodes two guesses, of which one may be right.
        let (mut masks, mut all, mut parents, mut draws) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut penalties = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            let tree: Vec<u32> = vec![TreeMask::ROOT, 0, 0, 1, 1, 2, 2];
            let mask = TreeMask::new(&tree).unwrap();
            for (node, &parent) in tree.iter().enumerate() {
                let at = text.len() - 1 + mask.depth(node) as usize;
                let right = plain[i].get(at).copied().filter(|_| node % 2 == 1 || rng.below(3) > 0);
                all.push(if node == 0 { text[at] } else { right.unwrap_or(rng.below(cfg.vocab) as u32) });
                parents.push(parent);
                draws.push(samplers[i].draw(key(i, at + 1)));
                // The tokens of the node's own path, last first, and then those of the text, whose last is node 0.
                let up = std::iter::successors(Some(node as u32), |n| Some(tree[*n as usize]));
                let drafted: Vec<u32> =
                    up.take_while(|n| *n > 0 && *n != TreeMask::ROOT).map(|n| all[7 * i + n as usize]).collect();
                let before = drafted.into_iter().chain(text.iter().rev().copied());
                penalties.extend(samplers[i].penalties((7 * i + node) as u32, before));
            }
            masks.push(mask);
        }
        let parts = caches.iter_mut().zip(all.chunks(7)).zip(&masks);
        let mut seqs: Vec<Sequence<'_, B>> =
            parts.map(|((cache, tokens), mask)| Sequence::new(cache, tokens, Mask::Tree(mask), Want::All)).collect();
        let rows = m.forward(&mut seqs, &mut ws).unwrap();
        let all_rows: Vec<u32> = (0..rows as u32).collect();
        be.gather_rows(logits.head_mut(rows * cfg.vocab), ws.logit_rows(rows), &all_rows, cfg.vocab).unwrap();
        be.penalize(logits.head_mut(rows * cfg.vocab), cfg.vocab, &penalties).unwrap();
        be.sample(picks.head_mut(rows), logits.head(rows * cfg.vocab), &draws).unwrap();
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
