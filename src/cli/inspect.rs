//! `quadriga inspect`.

use std::collections::BTreeMap;

use serde_json::json;

use super::flags::{Common, InspectArgs};
use super::out;
use crate::backend::cpu::{Compute, Tier, kv::CpuKv};
use crate::backend::cuda;
use crate::engine::default_threads;
use crate::error::Result;
use crate::format::Checkpoint;

pub(super) fn run(common: &Common, args: &InspectArgs) -> Result<()> {
    let path = common.path()?;
    let checkpoint = Checkpoint::open(&path)?;
    checkpoint.check()?;
    let c = checkpoint.config();
    let entries = checkpoint.entries();
    let mut types: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for e in &entries {
        let t = types.entry(e.stored.to_string()).or_default();
        *t = (t.0 + 1, t.1 + e.range.len() as u64);
    }
    let weights: u64 = types.values().map(|t| t.1).sum();
    let parameters: u64 = entries.iter().map(|e| e.shape.iter().product::<usize>() as u64).sum();
    let compute = common.compute();
    let context = args.context.min(c.context);
    let kv = CpuKv::alloc(c.layers, 1, c.kv_dim(), compute)?.row_bytes() * context;
    let features = cpu_features();
    let gpus = cuda::devices().ok();
    if common.json {
        let tensors: Vec<_> = entries
            .iter()
            .map(|e| json!({"name": e.name, "type": e.stored.to_string(), "shape": e.shape, "bytes": e.range.len()}))
            .collect();
        let types: BTreeMap<_, _> =
            types.iter().map(|(n, (count, bytes))| (n, json!({"tensors": count, "bytes": bytes}))).collect();
        return out::print_json(&json!({
            "model": common.model,
            "path": path,
            "config": {
                "family": c.family.to_string(), "vocab": c.vocab, "hidden": c.hidden, "layers": c.layers,
                "heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim, "ffn": c.ffn, "eps": c.eps,
                "context": c.context, "rope_theta": c.rope.theta, "window": c.window, "qkv_bias": c.qkv_bias,
                "qk_norm": c.qk_norm, "tied": c.tied, "bos": c.bos, "eos": c.eos,
                "diffusion": c.diffusion.map(|d| json!({"mask": d.mask, "shift": d.shift, "block": d.block})),
            },
            "parameters": parameters,
            "types": types,
            "tensors": tensors,
            "memory": {"context": context, "weights_bytes": weights, "kv_bytes": kv},
            "devices": {"cpu": {"tier": Tier::detect().to_string(), "threads": default_threads(), "features": features},
                "cuda": {"kernels": cuda::KERNELS, "devices": gpus.as_deref().unwrap_or_default()}},
        }));
    }
    let mb = |b: u64| b as f64 / 1e6;
    let mut text = format!(
        "{}\n{} · {:.1} M parameters in {} tensors, {:.1} MB\n",
        path.display(),
        c.family,
        parameters as f64 / 1e6,
        entries.len(),
        mb(weights)
    );
    text += &format!(
        "layers {} · hidden {} · MLP {} · heads {} of {} over {} KV heads · vocabulary {}{}\n",
        c.layers,
        c.hidden,
        c.ffn,
        c.heads,
        c.head_dim,
        c.kv_heads,
        c.vocab,
        if c.tied { " (tied)" } else { "" }
    );
    let window = c.window.map_or(String::new(), |w| {
        let local = (0..c.layers).filter(|&i| c.is_local(i)).count();
        format!(" · window {w} in {local} layers")
    });
    text += &format!("context {} · rope base {}{window}\n", c.context, c.rope.theta);
    if let Some(d) = &c.diffusion {
        text += &format!(
            "masked diffusion · mask {} · {} · {}\n",
            d.mask,
            if d.shift { "row i predicts position i + 1" } else { "row i predicts position i" },
            d.block.map_or("all see all".into(), |b| format!("blocks of {b} see themselves and all before"))
        );
    }
    for (name, (count, bytes)) in &types {
        text += &format!("  {name:6} {count:4} tensors {:10.1} MB\n", mb(*bytes));
    }
    text += &format!(
        "memory at context {context}: weights {:.1} MB + keys and values {:.1} MB ({})\n",
        mb(weights),
        mb(kv as u64),
        if compute == Compute::Fast { "f16" } else { "f32" }
    );
    text += &format!(
        "cpu: {} kernels, {} threads, {}\ncuda: {}; {}\n",
        Tier::detect(),
        default_threads(),
        if features.is_empty() { "no extensions known".into() } else { features.join(" ") },
        if cuda::KERNELS {
            "kernels in this binary"
        } else {
            "no kernels in this binary (no nvcc was found to build them)"
        },
        gpus.map_or_else(|| "no usable driver or GPU".into(), |g| g.join(", "))
    );
    if args.tensors {
        for e in &entries {
            text += &format!("  {:48} {:6} {:?}\n", e.name, e.stored.to_string(), e.shape);
        }
    }
    out::print(&text)
}

/// Extensions of this CPU that kernels could use.
fn cpu_features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! list { ($($f:tt),*) => { $(if is_x86_feature_detected!($f) { found.push($f); })* } }
        list!("avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16");
    }
    found.sort_unstable();
    found
}
