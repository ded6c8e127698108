//! From the files of a head to its weights on the device, each checked against the target.

use super::layer::Layer;
use crate::backend::{Backend, Buffer, Linear};
use crate::dtype::DType;
use crate::error::{Context, Result, bail, ensure};
use crate::model::ModelConfig;
use crate::model::roles::{NamedTensors, Role, TensorSource};
use crate::tensor::HostTensor;

/// What a head is loaded from.
pub(super) struct Source<'a, B: Backend> {
    pub be: &'a B,
    /// Configuration of the target.
    pub cfg: &'a ModelConfig,
    /// Weights of the target, as they are stored.
    pub target: &'a dyn TensorSource,
    pub head: &'a dyn NamedTensors,
    pub quantize: bool,
}

impl<B: Backend> Source<'_, B> {
    pub fn has(&self, name: &str) -> bool {
        self.head.shape(name).is_some()
    }

    fn checked(&self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        match self.head.shape(name) {
            None => bail!(Weights, "{name} {shape:?} is missing"),
            Some(found) => ensure!(found == shape, Weights, "{name}: expected {shape:?}, file has {found:?}"),
        }
        self.head.tensor(name)
    }

    pub fn vector(&self, name: &str, n: usize) -> Result<B::Buf<B::Acc>> {
        let values = self.checked(name, &[n])?.to_f32();
        let mut buf = self.be.alloc(n)?;
        self.be.upload_acc(buf.head_mut(n), &values)?;
        Ok(buf)
    }

    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<B::Weight> {
        self.bring(self.checked(name, &[rows, cols])?).context(|| name.into())
    }

    fn bring(&self, t: HostTensor) -> Result<B::Weight> {
        let whole = t.cols.is_multiple_of(DType::Q8_0.block_len());
        self.be.weight(if self.quantize && whole && !t.dtype.is_quantized() { t.to_q8_0()? } else { t })
    }

    /// `NAME.weight` and, where it is there, `NAME.bias`.
    pub fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Linear<B>> {
        let bias = format!("{name}.bias");
        let bias = self.has(&bias).then(|| self.vector(&bias, rows)).transpose()?;
        Ok(Linear { w: self.matrix(&format!("{name}.weight"), rows, cols)?, bias })
    }

    /// The decoder layer `PREFIX.*`, whose q, k and v read `input` columns.
    pub fn layer(&self, prefix: &str, cfg: ModelConfig, input: usize) -> Result<Layer<B>> {
        let (d, q, kv, ffn) = (cfg.hidden, cfg.q_dim(), cfg.kv_dim(), cfg.ffn);
        ensure!(d == self.cfg.hidden, Config, "hidden_size is {d}, the target's {}", self.cfg.hidden);
        let other = cfg.qk_norm || cfg.post_norms || cfg.window.is_some();
        ensure!(!other, Unsupported, "model_type: a head is a layer of the Llama form, not of {}", cfg.family);
        let at = |name: &str| format!("{prefix}.{name}");
        let matrix = |name: &str, rows, cols| self.matrix(&at(name), rows, cols);
        Ok(Layer {
            q: self.linear(&at("self_attn.q_proj"), q, input)?,
            k: self.linear(&at("self_attn.k_proj"), kv, input)?,
            v: self.linear(&at("self_attn.v_proj"), kv, input)?,
            o: matrix("self_attn.o_proj.weight", d, q)?,
            mlp_norm: self.vector(&at("post_attention_layernorm.weight"), d)?,
            gate: matrix("mlp.gate_proj.weight", ffn, d)?,
            up: matrix("mlp.up_proj.weight", ffn, d)?,
            down: matrix("mlp.down_proj.weight", d, ffn)?,
            cfg,
        })
    }

    /// The tokens that the head draws from: `None` for all of the target's, else for each of its own ids the target's, which
    /// `d2t` gives as differences.
    pub fn tokens(&self) -> Result<Option<Vec<u32>>> {
        let vocab = self.cfg.vocab;
        let size = self.head.sizes("draft_vocab_size")?.and_then(|s| s.first().copied());
        let Some(&[n]) = self.head.shape("d2t") else {
            let n = size.unwrap_or(vocab);
            ensure!(n == vocab, Weights, "d2t is missing: draft_vocab_size is {n}, the target has {vocab} tokens");
            return Ok(None);
        };
        ensure!(size.is_none_or(|s| s == n), Weights, "d2t: {n} entries, draft_vocab_size is {}", size.unwrap_or(0));
        let mut used = vec![false; vocab];
        let offsets = self.head.integers("d2t")?;
        let ids = offsets.iter().zip(0i64..).map(|(&offset, i)| {
            let id = i.checked_add(offset).and_then(|id| usize::try_from(id).ok()).filter(|&id| id < vocab);
            let Some(id) = id else { bail!(Weights, "d2t: {i} + {offset} is none of the target's {vocab} tokens") };
            ensure!(!used[id], Weights, "d2t: {i} + {offset} comes twice");
            used[id] = true;
            Ok(id as u32)
        });
        let ids: Vec<u32> = ids.collect::<Result<_>>()?;
        if self.has("t2d") {
            let marked = self.head.integers("t2d")?;
            let same = marked.len() == vocab && marked.iter().zip(&used).all(|(&m, &used)| (m != 0) == used);
            ensure!(same, Weights, "t2d: {} entries that do not mark the tokens of d2t among {vocab}", marked.len());
        }
        Ok(Some(ids))
    }

    /// The matrix behind the logits of `tokens`: the head's own, or where it has none the target's rows of them; `None` for the
    /// target's matrix itself.
    pub fn vocabulary(&self, name: &str, tokens: Option<&[u32]>) -> Result<Option<B::Weight>> {
        if self.has(name) {
            let rows = tokens.map_or(self.cfg.vocab, <[u32]>::len);
            return self.matrix(name, rows, self.cfg.hidden).map(Some);
        }
        let Some(tokens) = tokens else { return Ok(None) };
        let all = self.target.tensor(if self.cfg.tied { Role::Embed } else { Role::Head })?;
        self.bring(all.pick_rows(tokens.iter().map(|&t| t as usize))?).map(Some)
    }

    /// Refuses files that hold another number of something than setting `key` says, where it is there.
    pub fn as_many(&self, key: &str, found: usize) -> Result<()> {
        let said = self.head.sizes(key)?.and_then(|n| n.first().copied()).unwrap_or(found);
        ensure!(said == found, Weights, "{key} is {said}, the tensors are those of {found}");
        Ok(())
    }

    /// Refuses a head whose settings name another vocabulary than the target's.
    pub fn same_vocabulary(&self, layer: &ModelConfig) -> Result<()> {
        let (own, target) = (layer.vocab, self.cfg.vocab);
        ensure!(own == target, Config, "vocab_size is {own}, the target has {target} tokens: another tokenizer");
        Ok(())
    }
}
