//! A trained head as files: `config.json` and `model.safetensors` in the published layout of EAGLE-3.

use std::path::Path;

use half::f16;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::pass::DraftVocab;
use super::weights::HeadConfig;
use crate::error::{Error, ErrorKind, Result, bail, ensure};
use crate::files::{TensorBytes, write_folder, write_tensors};
use crate::model::ModelConfig;
use crate::model::config::{Activation, Rope, RopeScaling};
use crate::train::checkpoint::NamedTensor;

/// How matrices are stored; vectors are F32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    /// As other engines read them.
    #[default]
    F16,
    /// Tensor `X` as I8 and, beside it, `X.scale` as F16, a scale for each 32 columns of a row: w = scale q.
    Q8,
}

/// Columns that share a scale.
const BLOCK: usize = 32;

/// What a head is of.
pub struct About<'a> {
    /// The target.
    pub target: &'a ModelConfig,
    /// What people call it.
    pub name: &'a str,
    /// Layers of the target whose inputs the head reads.
    pub taps: &'a [usize],
}

/// The configuration of a head as `config.json` has it: a Llama of one layer, with the layers
/// that it taps. Under `quadriga`: how it is stored, and which target it is of.
///
/// # Errors
/// `Unsupported` for a target whose rotations cannot be said there.
pub fn config(cfg: &HeadConfig, about: &About<'_>, store: Store) -> Result<Value> {
    let a = &cfg.attention;
    let Rope { theta, scaling } = &cfg.rope;
    let scaling = match *scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq, high_freq, original } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq, "high_freq_factor": high_freq,
            "original_max_position_embeddings": original,
        }),
        RopeScaling::Factors(_) => bail!(Unsupported, "a head on a target whose rotations have factors of their own"),
    };
    let act = match cfg.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    let t = about.target;
    Ok(json!({
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": act,
        "rms_norm_eps": cfg.eps.to_string().parse::<f64>().unwrap_or(f64::from(cfg.eps)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": t.context,
        "vocab_size": t.vocab,
        "draft_vocab_size": cfg.vocab,
        "tie_word_embeddings": false,
        "torch_dtype": "float16",
        "taps": about.taps,
        "quadriga": {
            "stored": store,
            "target": {
                "name": about.name, "vocab_size": t.vocab, "hidden_size": t.hidden, "num_hidden_layers": t.layers,
                "num_attention_heads": t.heads, "num_key_value_heads": t.kv_heads, "head_dim": t.head_dim,
                "intermediate_size": t.ffn, "rope_theta": t.rope.theta,
            },
        },
    }))
}

/// Integers and scales of a matrix whose rows are whole blocks.
fn quantize(values: &[f32]) -> (Vec<i8>, Vec<f16>) {
    let (mut q, mut scales) = (Vec::with_capacity(values.len()), Vec::with_capacity(values.len() / BLOCK));
    for block in values.chunks(BLOCK) {
        let most = block.iter().fold(0f32, |m, x| m.max(x.abs()));
        let scale = f16::from_f32(most / 127.0);
        let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
        q.extend(block.iter().map(|x| (x * inverse).round().clamp(-127.0, 127.0) as i8));
        scales.push(scale);
    }
    (q, scales)
}

/// Writes a head as the folder `out`, whole or not at all.
///
/// # Errors
/// Values that the stored type does not hold; the disk's.
pub fn write_head(
    out: &Path,
    cfg: &HeadConfig,
    about: &About<'_>,
    store: Store,
    tensors: &[NamedTensor],
    vocab: &DraftVocab,
) -> Result<()> {
    let config = config(cfg, about, store)?;
    let mut all: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, shape, values) in tensors {
        let bytes = |halves: &[f16]| bytemuck::cast_slice(halves).to_vec();
        match (&shape[..], store) {
            ([_], _) => all.push((name.clone(), Dtype::F32, shape.clone(), bytemuck::cast_slice(values).to_vec())),
            (_, Store::F16) => {
                let halves: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
                ensure!(halves.iter().all(|x| x.is_finite()), Diverged, "{name} does not fit into F16");
                all.push((name.clone(), Dtype::F16, shape.clone(), bytes(&halves)));
            }
            (&[rows, cols], Store::Q8) if cols.is_multiple_of(BLOCK) => {
                let (q, scales) = quantize(values);
                ensure!(scales.iter().all(|x| x.is_finite()), Diverged, "{name} does not fit into blocks of I8");
                all.push((name.clone(), Dtype::I8, shape.clone(), bytemuck::cast_slice(&q).to_vec()));
                all.push((format!("{name}.scale"), Dtype::F16, vec![rows, cols / BLOCK], bytes(&scales)));
            }
            _ => bail!(Unsupported, "{name}: {shape:?} is not made of whole blocks of {BLOCK}"),
        }
    }
    let offsets: Vec<i64> = vocab.d2t().iter().enumerate().map(|(d, &t)| i64::from(t) - d as i64).collect();
    let known: Vec<u8> = vocab.t2d().iter().map(|&d| u8::from(d != DraftVocab::NONE)).collect();
    all.push(("d2t".into(), Dtype::I64, vec![offsets.len()], bytemuck::cast_slice(&offsets).to_vec()));
    all.push(("t2d".into(), Dtype::BOOL, vec![known.len()], known));
    let all: Vec<TensorBytes<'_>> = all
        .iter()
        .map(|(name, dtype, shape, bytes)| TensorBytes {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
            bytes,
        })
        .collect();
    write_folder(out, |folder| {
        folder.write("config.json", |to| {
            serde_json::to_writer_pretty(&mut *to, &config)?;
            to.write_all(b"\n")
        })?;
        folder.write("model.safetensors", |to| write_tensors(to, &all, Some(("format", "pt"))))
    })
}

/// Tensors of a folder that [`write_head`] wrote, and the tokens that the head knows.
///
/// # Errors
/// A file that is missing or of another layout, by name.
pub fn read_head(folder: &Path, target: usize) -> Result<(super::Tensors, DraftVocab)> {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).map_err(|e| Error::io(path.display(), e))?;
    let damaged =
        |e: safetensors::SafeTensorError| Error::with_source(ErrorKind::Weights, path.display().to_string(), e);
    let file = safetensors::SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let halves = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    };
    let (mut tensors, mut d2t) = (super::Tensors::new(), Vec::new());
    for (name, t) in file.iter() {
        let data = t.data();
        let values = match t.dtype() {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 if !name.ends_with(".scale") => halves(data),
            Dtype::I8 => {
                let scales = halves(file.tensor(&format!("{name}.scale")).map_err(damaged)?.data());
                let rows = data.chunks(BLOCK).zip(scales);
                rows.flat_map(|(q, s)| q.iter().map(move |&q| f32::from(q as i8) * s)).collect()
            }
            Dtype::I64 if name == "d2t" => {
                let offsets = data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")));
                d2t = offsets.enumerate().map(|(d, o)| (o + d as i64) as u32).collect();
                continue;
            }
            _ => continue,
        };
        tensors.insert(name.to_owned(), values);
    }
    Ok((tensors, DraftVocab::new(d2t, target)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::Family;

    #[test]
    fn what_is_written_is_read() {
        let target = ModelConfig::base(Family::Llama, 96, 64, 4, 2, 96);
        let cfg = HeadConfig::new(&target, 3, 7);
        let vocab = DraftVocab::new(vec![0, 3, 4, 9, 50, 51, 95], 96).unwrap();
        let mut rng = crate::rng::Rng::new(4);
        let tensors: Vec<NamedTensor> = cfg
            .tensors()
            .map(|(name, [r, c])| {
                let shape = if r == 1 { vec![c] } else { vec![r, c] };
                (name.to_owned(), shape, (0..r * c).map(|_| rng.normal()).collect())
            })
            .into();
        let dir = tempfile::tempdir().unwrap();
        let about = About { target: &target, name: "t", taps: &[1, 2, 3] };
        // Half a step of the greatest of a block, and of f16 below 8.
        for (store, error) in [(Store::F16, 0.5f32.powi(9)), (Store::Q8, 5.0 / 254.0)] {
            let out = dir.path().join(format!("{store:?}"));
            write_head(&out, &cfg, &about, store, &tensors, &vocab).unwrap();
            let (read, tokens) = read_head(&out, 96).unwrap();
            assert_eq!(tokens, vocab);
            assert_eq!(read.len(), 13);
            for (name, shape, values) in &tensors {
                let most = read[name].iter().zip(values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(read[name].len() == values.len() && most < error && (shape.len() > 1 || most == 0.0), "{name}");
            }
            let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
            assert_eq!((&config["draft_vocab_size"], &config["taps"]), (&json!(7), &json!([1, 2, 3])));
        }
        let file = std::fs::read(dir.path().join("F16/model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(file.tensor("t2d").unwrap().data().iter().filter(|&&b| b == 1).count(), 7);
        assert_eq!(file.tensor("d2t").unwrap().data()[8], 2);
    }
}
