//! Random programs of stage, extend, commit, truncate and fork against the plain sequence they should amount to.

mod common;

use std::ops::Range;
use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::{Backend, Mask, TreeMask};
use quadriga::format::Checkpoint;
use quadriga::model::{KvCache, Model, Sequence, Want, Workspace};
use quadriga::rng::Rng;

const CAPACITY: usize = 48;

fn logits<B: Backend>(m: &Model<B>, ws: &mut Workspace<B>, cache: &mut KvCache<B>, token: u32) -> Vec<f32> {
    m.forward(&mut [Sequence::new(cache, &[token], Mask::Causal, Want::Last)], ws).unwrap();
    let mut row = vec![0.0; m.config().vocab];
    ws.logits(m.backend(), 0, &mut row).unwrap();
    row
}

/// 0..n in one part or several.
fn parts(rng: &mut Rng, n: usize) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = std::iter::once(0..rng.below(n + 1)).collect();
    while parts[parts.len() - 1].end < n {
        let at = parts[parts.len() - 1].end;
        parts.push(at..at + 1 + rng.below(n - at));
    }
    parts
}

/// Stages a part of `tokens` behind the part before it.
fn stage<B: Backend>(
    m: &Model<B>,
    ws: &mut Workspace<B>,
    cache: &mut KvCache<B>,
    tokens: &[u32],
    part: Range<usize>,
    mask: Mask<'_>,
) {
    let (start, tokens) = (part.start, &tokens[part]);
    let seq = match start {
        0 => Sequence::new(cache, tokens, mask, Want::Nothing),
        _ => Sequence::extend(cache, tokens, mask, Want::Nothing),
    };
    m.forward(&mut [seq], ws).unwrap();
}

#[test]
fn random_programs_equal_a_vector() {
    let path = common::root().join("models/tiny-mistral");
    let checkpoint = Checkpoint::open(&path).unwrap();
    for compute in [Compute::Fast, Compute::Exact] {
        let cpu = Cpu::with(2, Tier::detect(), compute);
        programs_equal_a_vector(Model::load(Arc::new(cpu), &checkpoint, |_, _| {}).unwrap(), 12);
    }
}

#[test]
fn cuda_random_programs_equal_a_vector() {
    let Some(cuda) = common::gpu() else { return };
    let checkpoint = Checkpoint::open(&common::root().join("models/tiny-mistral")).unwrap();
    programs_equal_a_vector(Model::load(Arc::new(cuda), &checkpoint, |_, _| {}).unwrap(), 4);
}

fn programs_equal_a_vector<B: Backend>(m: Model<B>, programs: usize) {
    let (be, cfg) = (m.backend(), m.config());
    let mut ws = Workspace::new(be, cfg, 32, 32).unwrap();
    let mut rng = Rng::new(5);
    for _ in 0..programs {
        let mut cache = KvCache::new(be, cfg, CAPACITY).unwrap();
        let mut kept: Vec<u32> = Vec::new();
        for _ in 0..20 {
            let room = CAPACITY - 1 - kept.len();
            let n = rng.below(room.min(12) + 1);
            let tokens: Vec<u32> = (0..n).map(|_| rng.below(cfg.vocab) as u32).collect();
            match rng.below(5) {
                0 => {
                    let len = rng.below(kept.len() + 1);
                    cache.truncate(len);
                    kept.truncate(len);
                }
                1 => cache = cache.fork(be).unwrap(),
                2 => {
                    let parents: Vec<u32> =
                        (0..n).map(|i| if i == 0 { TreeMask::ROOT } else { rng.below(i) as u32 }).collect();
                    let tree = TreeMask::new(&parents).unwrap();
                    for part in parts(&mut rng, n) {
                        let grown = TreeMask::new(&parents[..part.end]).unwrap();
                        stage(&m, &mut ws, &mut cache, &tokens, part, Mask::Tree(&grown));
                    }
                    let path: Vec<u32> =
                        if n == 0 { vec![] } else { (0..n as u32).filter(|&i| tree.sees(n - 1, i as usize)).collect() };
                    cache.commit(be, &path).unwrap();
                    kept.extend(path.iter().map(|&i| tokens[i as usize]));
                }
                _ => {
                    for part in parts(&mut rng, n) {
                        stage(&m, &mut ws, &mut cache, &tokens, part, Mask::Causal);
                    }
                    assert_eq!(cache.staged(), n);
                    let keep = rng.below(n + 1);
                    cache.commit_first(keep).unwrap();
                    kept.extend(&tokens[..keep]);
                }
            }
            assert_eq!((cache.len(), cache.staged()), (kept.len(), 0));
        }
        let got = logits(&m, &mut ws, &mut cache, 7);
        let mut plain = KvCache::new(be, cfg, CAPACITY).unwrap();
        for chunk in kept.chunks(32) {
            let seq = Sequence::new(&mut plain, chunk, Mask::Causal, Want::Nothing);
            m.forward(&mut [seq], &mut ws).unwrap();
            plain.commit_first(chunk.len()).unwrap();
        }
        assert_eq!(got, logits(&m, &mut ws, &mut plain, 7), "{} rows", kept.len());
    }
}

#[test]
fn misuse_is_an_error() {
    let path = common::root().join("models/tiny-llama");
    let m = Model::load(
        Arc::new(Cpu::with(1, Tier::Portable, Compute::Exact)),
        &Checkpoint::open(&path).unwrap(),
        |_, _| {},
    )
    .unwrap();
    let be = m.backend();
    let mut cache = KvCache::new(be, m.config(), 4).unwrap();
    let mut ws = Workspace::new(be, m.config(), 3, 2).unwrap();
    let mut pass = |cache: &mut KvCache<Cpu>, tokens: &[u32], mask: Mask<'_>, want: Want<'_>| {
        m.forward(&mut [Sequence::new(cache, tokens, mask, want)], &mut ws).map_err(|e| e.to_string())
    };
    let vocab = m.config().vocab as u32;
    let two = TreeMask::new(&[TreeMask::ROOT, 0]).unwrap();
    let says = |r: Result<usize, String>, word: &str| assert!(r.as_ref().is_err_and(|e| e.contains(word)), "{r:?}");
    says(pass(&mut cache, &[1; 5], Mask::Causal, Want::Nothing), "context");
    says(pass(&mut cache, &[1; 4], Mask::Causal, Want::Nothing), "workspace");
    says(pass(&mut cache, &[1; 3], Mask::Causal, Want::All), "logits");
    says(pass(&mut cache, &[vocab], Mask::Causal, Want::Last), "vocabulary");
    says(pass(&mut cache, &[1; 3], Mask::Tree(&two), Want::Nothing), "tree");
    says(pass(&mut cache, &[1; 3], Mask::Blocks { block: 2, offset: 2 }, Want::Nothing), "blocks");
    says(pass(&mut cache, &[1; 2], Mask::Causal, Want::Rows(&[2])), "rows");
    assert!(pass(&mut cache, &[1; 3], Mask::Causal, Want::Last).is_ok());
    // What extends counts all that is staged.
    let mut extend = |cache: &mut KvCache<Cpu>, tokens: &[u32], mask: Mask<'_>| {
        m.forward(&mut [Sequence::extend(cache, tokens, mask, Want::Nothing)], &mut ws).map_err(|e| e.to_string())
    };
    says(extend(&mut cache, &[1; 2], Mask::Causal), "context");
    says(extend(&mut cache, &[1], Mask::Tree(&two)), "tree");
    assert!(cache.commit(be, &[1, 0]).is_err() && cache.commit(be, &[3]).is_err());
    assert!(cache.commit_first(4).is_err());
    cache.commit(be, &[0, 2]).unwrap();
    assert_eq!(cache.len(), 2);
    assert!(TreeMask::new(&[0]).is_err() && TreeMask::new(&[TreeMask::ROOT, 1]).is_err());
}
