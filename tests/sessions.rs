//! What a decoder that speculates builds on: a session's tokens and features after trees were staged and paths committed.

mod common;

use std::sync::Arc;

use quadriga::ErrorKind;
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Mask, TreeMask};
use quadriga::decode::sampler::argmax;
use quadriga::decode::session::PREFILL_ROWS;
use quadriga::decode::{Session, Together};
use quadriga::format::Checkpoint;
use quadriga::model::{KvCache, Model, Sequence, Tap, Want, Workspace};
use quadriga::rng::Rng;

const CAPACITY: usize = 160;

fn open<B: Backend>(name: &str, be: B) -> Arc<Model<B>> {
    let checkpoint = Checkpoint::open(&common::root().join("models").join(name)).unwrap();
    Arc::new(Model::load(Arc::new(be), &checkpoint, |_, _| {}).unwrap())
}

fn random(rng: &mut Rng, n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|_| rng.below(vocab) as u32).collect()
}

/// A tree whose only root is row 0, and the path to a row of it.
fn tree(rng: &mut Rng, n: usize) -> (TreeMask, Vec<u32>) {
    let parents: Vec<u32> = (0..n).map(|i| if i == 0 { TreeMask::ROOT } else { rng.below(i) as u32 }).collect();
    let (tree, leaf) = (TreeMask::new(&parents).unwrap(), rng.below(n));
    let path = (0..n as u32).filter(|&i| tree.sees(leaf, i as usize)).collect();
    (tree, path)
}

/// The same passes without a session; rows of the residual stream at every place are those that `forward_watched` shows.
struct Watched<B: Backend> {
    model: Arc<Model<B>>,
    cache: KvCache<B>,
    ws: Workspace<B>,
    /// By layer at whose input they stand, one row a committed token.
    rows: Vec<Vec<Vec<f32>>>,
}

impl<B: Backend> Watched<B> {
    fn new(model: &Arc<Model<B>>) -> Self {
        let (be, cfg) = (model.backend(), model.config());
        let (cache, ws) = (KvCache::new(be, cfg, CAPACITY).unwrap(), Workspace::new(be, cfg, 64, 64).unwrap());
        Self { cache, ws, rows: vec![Vec::new(); cfg.layers + 1], model: model.clone() }
    }

    fn pass(&mut self, tokens: &[u32], mask: Mask<'_>, kept: &[u32]) {
        let (d, rows) = (self.model.config().hidden, &mut self.rows);
        let mut watch = |tap: Tap, x: &[f32]| {
            let layer = if let Tap::Layer(i) = tap { i + 1 } else { 0 };
            rows[layer].extend(kept.iter().map(|&r| x[r as usize * d..][..d].to_vec()));
        };
        let seq = Sequence::new(&mut self.cache, tokens, mask, Want::Nothing);
        self.model.forward_watched(&mut [seq], &mut self.ws, Some(&mut watch)).unwrap();
        self.cache.commit(self.model.backend(), kept).unwrap();
    }
}

fn features<B: Backend>(s: &Session<B>, tap: usize) -> Vec<f32> {
    let mut x = vec![0.0; s.cache().len() * s.model().config().hidden];
    s.model().backend().download_acc(s.features(tap), &mut x).unwrap();
    x
}

/// `free`: how far rows of a tree may be from rows of a line.
fn features_are_those_of_committed_rows<B: Backend>(be: B, name: &str, free: f32) {
    let model = open(name, be);
    let (vocab, layers) = (model.config().vocab, model.config().layers);
    let (mut rng, taps) = (Rng::new(21), [0, layers, 1]);
    let mut s = Session::with_taps(model.clone(), CAPACITY, 1, &taps).unwrap();
    let mut watched = Watched::new(&model);
    let mut text = random(&mut rng, 90, vocab);
    s.push(&text);
    s.advance().unwrap();
    for chunk in text.chunks(PREFILL_ROWS) {
        watched.pass(chunk, Mask::Causal, &Vec::from_iter(0..chunk.len() as u32));
    }
    for round in 0..5 {
        if round == 2 {
            let len = text.len() - 2;
            s.truncate(len);
            text.truncate(len);
            watched.cache.truncate(len);
            watched.rows.iter_mut().for_each(|r| r.truncate(len));
        }
        let n = 1 + rng.below(12);
        let ((tree, path), tokens) = (tree(&mut rng, n), random(&mut rng, n, vocab));
        s.push(&tokens[..1]);
        let rows = s.stage(&tokens, Mask::Tree(&tree), Want::All).unwrap();
        assert_eq!(rows, n);
        s.commit(&path).unwrap();
        watched.pass(&tokens, Mask::Tree(&tree), &path);
        text.extend(path.iter().map(|&r| tokens[r as usize]));
        assert_eq!((s.tokens(), s.cache().len()), (&text[..], text.len()));
    }
    let mut plain = Session::with_taps(model, CAPACITY, 1, &taps).unwrap();
    plain.push(&text);
    plain.advance().unwrap();
    for (tap, layer) in taps.into_iter().enumerate() {
        let got = features(&s, tap);
        assert!(got == watched.rows[layer].concat(), "{name}: layer {layer} as watched");
        let line = features(&plain, tap);
        let off = got.iter().zip(&line).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(off <= free && got.len() == line.len(), "{name}: layer {layer} is {off} off a plain pass");
        assert!(got.iter().any(|x| *x != 0.0));
    }
    // What comes next comes as if the text had been pushed.
    s.push(&[3]);
    plain.push(&[3]);
    s.advance().unwrap();
    plain.advance().unwrap();
    let next = s.logits().unwrap().iter().zip(plain.logits().unwrap()).map(|(a, b)| (a - b).abs());
    assert!(next.fold(0.0, f32::max) <= free, "{name}");
}

#[test]
fn features_are_those_of_a_plain_pass() {
    features_are_those_of_committed_rows(Naive, "tiny-llama", 0.0);
    for tier in Tier::available() {
        for compute in [Compute::Fast, Compute::Exact] {
            for name in ["tiny-mistral", "tiny-gemma3"] {
                features_are_those_of_committed_rows(Cpu::with(2, tier, compute), name, 0.0);
            }
        }
    }
}

#[test]
fn cuda_features_are_those_of_a_plain_pass() {
    let Some(cuda) = common::gpu() else { return };
    // A tensor core sums keys in the order in which they lie.
    features_are_those_of_committed_rows(cuda, "tiny-mistral", 0.05);
}

/// One greedy step on a tree below the pending token: the path that the logits rows agree with, and the token behind it.
fn greedy(tree: &TreeMask, tokens: &[u32], rows: &[Vec<f32>]) -> (Vec<u32>, u32) {
    let mut path = vec![0];
    loop {
        let last = path[path.len() - 1];
        let best = argmax(&rows[last as usize]).unwrap() as u32;
        let next = (0..tokens.len()).find(|&i| tree.parent(i) == last && tokens[i] == best);
        match next {
            Some(i) => path.push(i as u32),
            None => return (path, best),
        }
    }
}

/// Sessions decode greedily by trees, alone or in one pass: tokens, logits and features are the same bits. `line`: and the tokens
/// those of decoding one by one.
fn sessions_decode_together_as_alone<B: Backend>(be: B, name: &str, line: bool) {
    let model = open(name, be);
    let (be, cfg, taps) = (model.backend(), model.config(), [1, 2]);
    let mut rng = Rng::new(22);
    let prompts = [5, 1, 70].map(|n| random(&mut rng, n, cfg.vocab));
    let new = || Session::with_taps(model.clone(), CAPACITY, 1, &taps).unwrap();
    let first = |s: &mut Session<B>, prompt: &[u32]| {
        s.push(prompt);
        s.advance().unwrap();
        let token = argmax(s.logits().unwrap()).unwrap() as u32;
        s.push(&[token]);
    };
    let plain = prompts.clone().map(|prompt| {
        let mut s = new();
        first(&mut s, &prompt);
        for _ in 0..30 {
            first(&mut s, &[]);
        }
        s.tokens().to_vec()
    });
    let (mut alone, mut together) = ([new(), new(), new()], [new(), new(), new()]);
    for sessions in [&mut alone, &mut together] {
        sessions.iter_mut().zip(&prompts).for_each(|(s, prompt)| first(s, prompt));
    }
    let mut pass = Together::new(model.clone(), 64, &taps).unwrap();
    let row = |ws: &Workspace<B>, i: usize| {
        let mut row = vec![0.0; cfg.vocab];
        ws.logits(be, i, &mut row).unwrap();
        row
    };
    let mut accepted = 0;
    for round in 0..6 {
        // Node 0 is pending; a wrong guess and a right one below it, and so below the right one; the sizes differ.
        let drafts: Vec<(Vec<u32>, TreeMask)> = alone
            .iter()
            .zip(&plain)
            .enumerate()
            .map(|(i, (s, plain))| {
                let (n, at) = ([5, 3, 1][(i + round) % 3], s.tokens().len());
                let guess = [s.tokens()[at - 1], plain[at] + 1, plain[at], plain[at + 1], plain[at + 1] + 1];
                let tokens = guess.map(|t| t % cfg.vocab as u32)[..n].to_vec();
                (tokens, TreeMask::new(&[TreeMask::ROOT, 0, 0, 2, 2][..n]).unwrap())
            })
            .collect();
        let trees: Vec<_> = drafts.iter().map(|(tokens, tree)| (&tokens[..], Mask::Tree(tree))).collect();
        let mut all: Vec<&mut Session<B>> = together.iter_mut().collect();
        let rows = pass.stage(&mut all, &trees).unwrap();
        assert_eq!(rows, drafts.iter().map(|d| d.0.len()).sum::<usize>());
        let (mut at, mut paths, mut next) = (0, Vec::new(), Vec::new());
        for (s, (tokens, tree)) in alone.iter_mut().zip(&drafts) {
            let n = s.stage(tokens, Mask::Tree(tree), Want::All).unwrap();
            let single: Vec<_> = (0..n).map(|i| row(s.workspace(), i)).collect();
            assert!((0..n).all(|i| row(pass.workspace(), at + i) == single[i]), "{name}: round {round}");
            let (path, token) = greedy(tree, tokens, &single);
            s.commit(&path).unwrap();
            s.push(&[token]);
            accepted += path.len() - 1;
            paths.push(path);
            next.push(token);
            at += n;
        }
        pass.commit(&mut all, &paths.iter().map(|p| &p[..]).collect::<Vec<_>>()).unwrap();
        all.iter_mut().zip(next).for_each(|(s, token)| s.push(&[token]));
        for (a, b) in alone.iter().zip(&together) {
            assert_eq!(a.tokens(), b.tokens(), "{name}: round {round}");
            assert!((0..2).all(|tap| features(a, tap) == features(b, tap)), "{name}: round {round}");
        }
    }
    assert!(!line || alone.iter().zip(&plain).all(|(s, plain)| plain.starts_with(s.tokens())), "{name}");
    assert!(accepted > 10, "{name}: {accepted} drafted tokens accepted");
}

#[test]
fn sessions_of_one_pass_do_not_mix() {
    sessions_decode_together_as_alone(Naive, "tiny-llama", true);
    for tier in Tier::available() {
        for name in ["tiny-mistral", "tiny-gemma3"] {
            sessions_decode_together_as_alone(Cpu::with(2, tier, Compute::Fast), name, true);
        }
    }
}

#[test]
fn cuda_sessions_of_one_pass_do_not_mix() {
    let Some(cuda) = common::gpu() else { return };
    sessions_decode_together_as_alone(cuda, "tiny-mistral", false);
}

#[test]
fn misuse_is_an_error() {
    let model = open("tiny-llama", Cpu::with(1, Tier::Portable, Compute::Exact));
    let beyond = model.config().layers + 1;
    assert!(Session::with_taps(model.clone(), 8, 1, &[beyond]).is_err_and(|e| e.kind() == ErrorKind::Usage));
    let mut s = Session::new(model.clone(), 8, 1).unwrap();
    s.push(&[5]);
    s.stage(&[6, 7], Mask::Causal, Want::All).unwrap();
    assert!(s.commit(&[0]).is_err_and(|e| e.kind() == ErrorKind::Usage), "token 5 is pending");
    assert!(s.commit(&[2]).is_err_and(|e| e.kind() == ErrorKind::Shape));
    s.stage(&[5, 7], Mask::Causal, Want::All).unwrap();
    assert!(s.commit(&[1, 0]).is_err());
    s.commit(&[0, 1]).unwrap();
    assert_eq!(s.tokens(), [5, 7]);
    assert!(s.commit(&[0]).is_err(), "nothing is staged any more");
    let (mut pass, mut other) =
        (Together::new(model.clone(), 4, &[]).unwrap(), Session::new(model.clone(), 8, 1).unwrap());
    let trees: [(&[u32], Mask<'_>); 2] = [(&[1, 2], Mask::Causal), (&[3], Mask::Causal)];
    assert!(pass.stage(&mut [&mut s], &trees).is_err());
    pass.stage(&mut [&mut s, &mut other], &trees).unwrap();
    assert!(s.commit(&[0]).is_err() && pass.commit(&mut [&mut other, &mut s], &[&[0], &[0]]).is_err());
    pass.commit(&mut [&mut s, &mut other], &[&[0, 1], &[0]]).unwrap();
    assert_eq!((s.tokens(), other.tokens()), (&[5, 7, 1, 2][..], &[3][..]));
    let mut tapped = Session::with_taps(model, 8, 1, &[0]).unwrap();
    assert!(pass.stage(&mut [&mut tapped], &trees[..1]).is_err());
}
