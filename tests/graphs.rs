//! CUDA graphs: decoding by them is the same bit for bit, few are made, and a launch sees what was sent before it.

mod common;

use std::sync::Arc;

use quadriga::backend::cuda::{Cuda, GraphStats};
use quadriga::backend::{Backend, Buffer, Mask};
use quadriga::dtype::DType;
use quadriga::format::Checkpoint;
use quadriga::model::{KvCache, Model, Sequence, Want, Workspace};
use quadriga::tensor::HostTensor;

/// Greedy tokens behind a prefix of `prefix` tokens, with the bits of their logits.
fn decode(cuda: Cuda, name: &str, prefix: usize, steps: usize) -> (Vec<(usize, Vec<u32>)>, GraphStats) {
    let path = common::root().join("models").join(name);
    let model = Model::load(Arc::new(cuda), &Checkpoint::open(&path).unwrap(), |_, _| {}).unwrap();
    let (be, config) = (model.backend(), model.config());
    let mut ws = Workspace::new(be, config, 64, 1).unwrap();
    let mut cache = KvCache::new(be, config, prefix + steps).unwrap();
    let tokens: Vec<u32> = (0..prefix).map(|i| (i * 7 % config.vocab) as u32).collect();
    let (last, first) = tokens.split_last().unwrap();
    for tokens in first.chunks(64) {
        model
            .forward(&mut [Sequence { cache: &mut cache, tokens, mask: Mask::Causal, want: Want::Last }], &mut ws)
            .unwrap();
        cache.commit_first(tokens.len()).unwrap();
    }
    let before = be.graph_stats();
    let mut token = *last;
    let mut row = vec![0.0; config.vocab];
    let steps = (0..steps).map(|_| {
        let seq = Sequence { cache: &mut cache, tokens: &[token], mask: Mask::Causal, want: Want::Last };
        model.forward(&mut [seq], &mut ws).unwrap();
        ws.logits(be, 0, &mut row).unwrap();
        cache.commit_first(1).unwrap();
        let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a))).unwrap();
        token = best as u32;
        (best, row.iter().map(|x| x.to_bits()).collect())
    });
    let steps = steps.collect();
    let GraphStats { captured, replayed } = be.graph_stats();
    (steps, GraphStats { captured: captured - before.captured, replayed: replayed - before.replayed })
}

#[test]
fn cuda_graphs_decode_every_family_bit_for_bit() {
    for name in
        ["tiny-llama", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3", "tiny-gguf/k.gguf"]
    {
        let (Some(one), Some(other)) = (common::gpu(), common::gpu()) else { return };
        let (steps, stats) = decode(one, name, 5, 12);
        let (plain, none) = decode(other.without_graphs(), name, 5, 12);
        assert_eq!(none, GraphStats::default());
        // Scratch may grow in the first step, so that the second is new again; the third makes the graph.
        assert!(stats.captured == 1 && stats.replayed >= 10, "{name}: {stats:?}");
        assert!(steps == plain, "{name}: graphs change the result");
        let mut tokens: Vec<usize> = steps.iter().map(|s| s.0).collect();
        tokens.dedup();
        assert!(tokens.len() > 2, "{name}: {tokens:?} would not show that a step reads an old token");
    }
}

#[test]
fn cuda_graphs_follow_the_context_across_chunks_of_keys() {
    let (Some(one), Some(other)) = (common::gpu(), common::gpu()) else { return };
    let (steps, stats) = decode(one, "tiny-llama", 250, 14);
    assert!(steps == decode(other.without_graphs(), "tiny-llama", 250, 14).0);
    // Another chunk of keys is another grid, and so another graph.
    assert!(stats.captured == 2 && stats.replayed >= 11, "{stats:?}");
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
