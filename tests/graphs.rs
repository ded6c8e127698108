//! CUDA graphs: decoding by them gives the specification's tokens and the same bits as without, few are made, and a launch sees
//! what was sent before it.

mod common;

use std::sync::Arc;

use quadriga::backend::cuda::{Cuda, GraphStats};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Buffer, Mask, TreeMask};
use quadriga::decode::sampler::argmax;
use quadriga::dtype::DType;
use quadriga::format::Checkpoint;
use quadriga::model::{KvCache, Model, Sequence, Want, Workspace};
use quadriga::rng::Rng;
use quadriga::tensor::HostTensor;

/// Models, each with the seed of a prompt behind which the most likely token always leads by more than bf16 can blur.
const MODELS: [(&str, u64); 8] = [
    ("tiny-llama", 1224),
    ("tiny-llama3", 2104),
    ("tiny-mistral", 2380),
    ("tiny-qwen2", 1124),
    ("tiny-qwen3", 2),
    ("tiny-gemma3", 1630),
    ("tiny-gguf/legacy.gguf", 2505),
    ("tiny-gguf/k.gguf", 1833),
];

/// One sequence of a model, with the logits of its last row.
struct Text<B: Backend> {
    model: Arc<Model<B>>,
    cache: KvCache<B>,
    ws: Workspace<B>,
    logits: Vec<f32>,
}

impl<B: Backend> Text<B> {
    fn new(model: &Arc<Model<B>>) -> Self {
        let (be, cfg) = (model.backend(), model.config());
        let cache = KvCache::new(be, cfg, 600).unwrap();
        let ws = Workspace::new(be, cfg, 64, 16).unwrap();
        Self { cache, ws, logits: vec![0.0; cfg.vocab], model: model.clone() }
    }

    fn open(name: &str, be: B) -> Self {
        let path = common::root().join("models").join(name);
        Self::new(&Arc::new(Model::load(Arc::new(be), &Checkpoint::open(&path).unwrap(), |_, _| {}).unwrap()))
    }

    /// Appends `tokens`; the bits of the logits behind the last.
    fn push(&mut self, tokens: &[u32]) -> Vec<u32> {
        let seq = Sequence::new(&mut self.cache, tokens, Mask::Causal, Want::Last);
        self.model.forward(&mut [seq], &mut self.ws).unwrap();
        self.cache.commit_first(tokens.len()).unwrap();
        self.row(0)
    }

    fn row(&mut self, i: usize) -> Vec<u32> {
        self.ws.logits(self.model.backend(), i, &mut self.logits).unwrap();
        self.logits.iter().map(|x| x.to_bits()).collect()
    }

    /// The prompt's greedy continuation, and the smallest lead of a token that was chosen.
    fn greedy(&mut self, prompt: &[u32], n: usize) -> (Vec<u32>, f32) {
        let (mut out, mut lead) = (Vec::new(), f32::INFINITY);
        self.push(prompt);
        loop {
            let best = argmax(&self.logits).unwrap();
            let second =
                self.logits.iter().enumerate().filter(|(i, _)| *i != best).fold(f32::MIN, |m, (_, x)| m.max(*x));
            lead = lead.min(self.logits[best] - second);
            out.push(best as u32);
            if out.len() == n {
                return (out, lead);
            }
            self.push(&[best as u32]);
        }
    }
}

impl Text<Cuda> {
    fn stats(&self) -> GraphStats {
        self.model.backend().graph_stats()
    }
}

fn random(rng: &mut Rng, n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|_| rng.below(vocab) as u32).collect()
}

#[test]
fn cuda_graphs_give_the_tokens_of_the_specification() {
    const N: usize = 24;
    for (name, seed) in MODELS {
        let (Some(graphs), Some(plain)) = (common::gpu(), common::gpu()) else { return };
        let mut naive = Text::open(name, Naive);
        let prompt = random(&mut Rng::new(seed), 8, naive.model.config().vocab);
        let (want, lead) = naive.greedy(&prompt, N);
        assert!(lead > 0.3, "{name}: a lead of {lead} says little about bf16");
        let (mut graphs, mut plain) = (Text::open(name, graphs), Text::open(name, plain.without_graphs()));
        for text in [&mut graphs, &mut plain] {
            assert_eq!(text.greedy(&prompt, N).0, want, "{name}");
        }
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&graphs.logits) == bits(&plain.logits), "{name}: graphs change the result");
        // The first step of one row asks for another row's logits than the prompt did; the third makes the graph.
        let stats = graphs.stats();
        assert!(stats.captured == 1 && stats.replayed >= 20 && stats.refused == 0, "{name}: {stats:?}");
        assert_eq!(plain.stats(), GraphStats::default());
    }
}

/// Token by token beyond two borders of attention's chunks of 256 keys, and again from the start.
#[test]
fn cuda_graphs_are_few_over_a_long_context() {
    let (Some(graphs), Some(plain)) = (common::gpu(), common::gpu()) else { return };
    let (mut graphs, mut plain) =
        (Text::open("tiny-llama3", graphs), Text::open("tiny-llama3", plain.without_graphs()));
    let tokens = random(&mut Rng::new(5), 530, graphs.model.config().vocab);
    for (i, t) in tokens.iter().enumerate() {
        assert!(graphs.push(&[*t]) == plain.push(&[*t]), "token {i}");
    }
    // One for each of 1, 2 and up to 4 chunks.
    let stats = graphs.stats();
    assert!(stats.captured == 3 && stats.replayed >= 515 && stats.refused == 0, "{stats:?}");
    for text in [&mut graphs, &mut plain] {
        text.cache.truncate(0);
    }
    for t in &tokens[..8] {
        assert!(graphs.push(&[*t]) == plain.push(&[*t]), "again");
    }
    // Scratch has moved since, so that this is one more.
    assert_eq!(graphs.stats().captured, 4);
}

/// Passes of several sequences and of trees: other lengths, tokens and trees of one shape are one graph.
#[test]
fn cuda_graphs_take_sequences_and_trees() {
    let mut seen: Vec<Vec<Vec<u32>>> = Vec::new();
    for graphs in [true, false] {
        let Some(cuda) = common::gpu() else { return };
        let mut text = Text::open("tiny-gemma3", if graphs { cuda } else { cuda.without_graphs() });
        let model = text.model.clone();
        let vocab = model.config().vocab;
        let mut other = KvCache::new(model.backend(), model.config(), 100).unwrap();
        let mut rng = Rng::new(6);
        let mut rows = Vec::new();
        for round in 0..8 {
            let (line, tree) = (random(&mut rng, 2, vocab), random(&mut rng, 6, vocab));
            let parents: Vec<u32> = (0..6).map(|i| if i == 0 { TreeMask::ROOT } else { rng.below(i) as u32 }).collect();
            let mask = TreeMask::new(&parents).unwrap();
            let seqs = &mut [
                Sequence::new(&mut other, &line, Mask::Causal, Want::Last),
                Sequence::new(&mut text.cache, &tree, Mask::Tree(&mask), Want::All),
            ];
            let n = model.forward(seqs, &mut text.ws).unwrap();
            other.commit_first(2).unwrap();
            let kept = [0, 1 + rng.below(5) as u32];
            text.cache.commit(model.backend(), &kept[..1 + round % 2]).unwrap();
            rows.extend((0..n).map(|i| text.row(i)));
        }
        let stats = text.stats();
        if graphs {
            assert!(stats.captured == 1 && stats.replayed >= 5 && stats.refused == 0, "{stats:?}");
        }
        seen.push(rows);
    }
    assert!(seen[0] == seen[1]);
}

/// Sessions of one model on several threads: none sees the other's values.
#[test]
fn cuda_graphs_do_not_mix_threads() {
    let Some(cuda) = common::gpu() else { return };
    let first = Text::open("tiny-llama3", cuda);
    let vocab = first.model.config().vocab;
    let texts: Vec<Vec<u32>> = (7..10).map(|seed| random(&mut Rng::new(seed), 30, vocab)).collect();
    let alone: Vec<Vec<Vec<u32>>> = texts
        .iter()
        .map(|tokens| {
            let mut text = Text::open("tiny-llama3", common::gpu().unwrap().without_graphs());
            tokens.iter().map(|t| text.push(&[*t])).collect()
        })
        .collect();
    let model = first.model.clone();
    let mut runs: Vec<_> = (1..texts.len()).map(|_| Text::new(&model)).collect();
    runs.push(first);
    std::thread::scope(|s| {
        for (run, (tokens, want)) in runs.iter_mut().zip(texts.iter().zip(&alone)) {
            s.spawn(move || {
                for (i, t) in tokens.iter().enumerate() {
                    assert!(run.push(&[*t]) == want[i], "token {i}");
                }
            });
        }
    });
    assert_eq!(model.backend().graph_stats().refused, 0);
}

#[test]
fn cuda_launches_see_what_was_sent_before_them() {
    let Some(cuda) = common::gpu() else { return };
    let table: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let table = HostTensor::new(DType::F32, 8, 8, bytemuck::cast_slice(&table).to_vec().into()).unwrap();
    let table = cuda.weight(table).unwrap();
    let mut rows: Vec<_> = (0..3).map(|_| cuda.alloc::<f32>(16).unwrap()).collect();
    // The tokens of all three go through one buffer.
    for (i, y) in rows.iter_mut().enumerate() {
        cuda.embed(y.view_mut(0..16), &table, &[i as u32, 7 - i as u32], 1.0).unwrap();
    }
    // A buffer that goes while a launch that uses it is queued.
    let mut gone = cuda.alloc::<f32>(16).unwrap();
    cuda.embed(gone.view_mut(0..16), &table, &[5, 5], 1.0).unwrap();
    drop(gone);
    for (i, y) in rows.iter().enumerate() {
        let mut got = [0.0; 16];
        cuda.download(y.view(0..16), &mut got).unwrap();
        let want = [i, 7 - i].map(|t| (0..8).map(move |c| (t * 8 + c) as f32));
        assert!(got.into_iter().eq(want.into_iter().flatten()), "{i}: {got:?}");
    }
}
