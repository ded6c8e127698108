//! [`ModelConfig`]: every knob in which the supported families differ, as plain data.
//!
//! Llama, Mistral, Qwen 2 and 3, Gemma 3, LLaDA and Dream are values of this struct, not files of code. Readers of `config.json` and of GGUF
//! metadata live in `format`; they end in [`ModelConfig::validate`], so that the runtime can rely on what it says.

use std::fmt;

use crate::error::{Result, ensure};

/// The family a file declares. Only names of tensors and defaults depend on it; the decoder reads the knobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[non_exhaustive]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma3,
    Llada,
    Dream,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma3 => "gemma3",
            Family::Llada => "llada",
            Family::Dream => "dream",
        })
    }
}

/// The gate's non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^-x).
    Silu,
    /// GELU in its tanh form: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    GeluTanh,
}

/// How rotary frequencies are stretched beyond the length a model was trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq` are divided in full.
        low_freq: f64,
        /// Wavelengths below `original / high_freq` are kept.
        high_freq: f64,
        /// Context length of the original training.
        original: f64,
    },
    /// One divisor per frequency, as GGUF's `rope_freqs.weight` stores them.
    Factors(Vec<f32>),
}

/// Rotary position embedding in the half-and-half form: pair (i, i + head_dim/2) turns by position * inv_freq\[i\].
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Stretching.
    pub scaling: RopeScaling,
}

impl Rope {
    /// The `head_dim / 2` angular frequencies, radians per position.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f64> {
        let half = head_dim / 2;
        let plain = |i: usize| self.theta.powf(-(i as f64) / half as f64);
        (0..half)
            .map(|i| match &self.scaling {
                RopeScaling::None => plain(i),
                RopeScaling::Linear { factor } => plain(i) / factor,
                RopeScaling::Factors(f) => plain(i) / f[i] as f64,
                &RopeScaling::Llama3 { factor, low_freq, high_freq, original } => {
                    let f = plain(i);
                    let wavelength = std::f64::consts::TAU / f;
                    if wavelength > original / low_freq {
                        f / factor
                    } else if wavelength < original / high_freq {
                        f
                    } else {
                        let t = (original / wavelength - low_freq) / (high_freq - low_freq);
                        (1.0 - t) * f / factor + t * f
                    }
                }
            })
            .collect()
    }

    /// For each position a row of `head_dim`: the cosines of its angles, then the sines.
    pub(crate) fn fill(&self, positions: impl Iterator<Item = usize>, head_dim: usize, table: &mut [f32]) {
        let freq = self.inv_freq(head_dim);
        for (p, row) in positions.zip(table.chunks_exact_mut(head_dim)) {
            let (cos, sin) = row.split_at_mut(head_dim / 2);
            for (i, f) in freq.iter().enumerate() {
                let (s, c) = (p as f64 * f).sin_cos();
                (cos[i], sin[i]) = (c as f32, s as f32);
            }
        }
    }
}

/// What makes a decoder a masked diffusion model: it fills positions that hold [`Diffusion::mask`], in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Diffusion {
    /// Stands for what is not known yet; never said.
    pub mask: u32,
    /// Row i of the head predicts position i + 1, as in the autoregressive model that it was made from (Dream), instead of position
    /// i itself (LLaDA).
    pub shift: bool,
    /// Width of the blocks of block-causal attention: a position sees its own block and all before, the prompt being the first
    /// block. `None`: all see all.
    pub block: Option<usize>,
}

/// The shape and the knobs of one decoder.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// What the file calls itself.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head, even.
    pub head_dim: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Epsilon of every norm.
    pub eps: f32,
    /// Longest context the model was made for.
    pub context: usize,
    /// Gate of the MLP.
    pub activation: Activation,
    /// Rotary embedding of global layers (of all layers where none is local).
    pub rope: Rope,
    /// Rotary embedding of sliding-window layers where it differs.
    pub local_rope: Option<Rope>,
    /// Width of the sliding window: a query at p sees keys p - window + 1 ..= p.
    pub window: Option<usize>,
    /// For each layer whether `window` applies.
    pub local_layers: Vec<bool>,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// RMS norm over each q and k head before the rotation.
    pub qk_norm: bool,
    /// Norms also behind attention and MLP, before the residual sum (Gemma).
    pub post_norms: bool,
    /// Factor on embeddings.
    pub embed_scale: f32,
    /// Factor on q.k.
    pub attn_scale: f32,
    /// The vocabulary matrix is the embedding.
    pub tied: bool,
    /// Token put before a text, where the tokenizer asks for it.
    pub bos: Option<u32>,
    /// Tokens that end a text or a turn.
    pub eos: Vec<u32>,
    /// Of masked diffusion models.
    pub diffusion: Option<Diffusion>,
}

impl ModelConfig {
    /// A Llama-form config with the given sizes and neutral knobs; the readers in `format` change what differs.
    pub fn base(family: Family, vocab: usize, hidden: usize, layers: usize, heads: usize, ffn: usize) -> Self {
        let head_dim = hidden / heads.max(1);
        Self {
            family,
            vocab,
            hidden,
            layers,
            heads,
            kv_heads: heads,
            head_dim,
            ffn,
            eps: 1e-5,
            context: 2048,
            activation: Activation::Silu,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            local_rope: None,
            window: None,
            local_layers: Vec::new(),
            qkv_bias: false,
            qk_norm: false,
            post_norms: false,
            embed_scale: 1.0,
            attn_scale: (head_dim.max(1) as f32).powf(-0.5),
            tied: true,
            bos: None,
            eos: Vec::new(),
            diffusion: None,
        }
    }

    /// Refuses what no model is: zero sizes, heads that do not divide, frequencies without end. Every number from a file
    /// passes here before a buffer is sized by it.
    pub fn validate(self) -> Result<Self> {
        let sizes = [
            ("vocabulary size", self.vocab, 1 << 24),
            ("hidden size", self.hidden, 1 << 18),
            ("layer count", self.layers, 1 << 12),
            ("head count", self.heads, 1 << 12),
            ("key/value head count", self.kv_heads, 1 << 12),
            ("head size", self.head_dim, 1 << 12),
            ("MLP size", self.ffn, 1 << 20),
            ("context length", self.context, 1 << 28),
        ];
        for (name, n, most) in sizes {
            ensure!((1..=most).contains(&n), Config, "{name} is {n}; expected 1 to {most}");
        }
        ensure!(
            self.heads.is_multiple_of(self.kv_heads),
            Config,
            "{} query heads cannot share {} key/value heads",
            self.heads,
            self.kv_heads
        );
        ensure!(
            self.head_dim.is_multiple_of(2),
            Config,
            "head size {} is odd; rotary pairs need an even one",
            self.head_dim
        );
        ensure!(self.eps.is_finite() && self.eps > 0.0, Config, "norm epsilon is {}", self.eps);
        ensure!(self.attn_scale.is_finite() && self.embed_scale.is_finite(), Config, "a scale is not finite");
        ensure!(self.window != Some(0), Config, "the sliding window is 0 wide");
        ensure!(
            self.local_layers.is_empty() || self.local_layers.len() == self.layers,
            Config,
            "{} layers, but {} layer types",
            self.layers,
            self.local_layers.len()
        );
        for rope in std::iter::once(&self.rope).chain(&self.local_rope) {
            if let RopeScaling::Factors(f) = &rope.scaling {
                ensure!(
                    f.len() == self.head_dim / 2,
                    Config,
                    "{} rope factors for head size {}",
                    f.len(),
                    self.head_dim
                );
            }
            let ok = rope.theta.is_finite() && rope.inv_freq(self.head_dim).iter().all(|f| f.is_finite() && *f >= 0.0);
            ensure!(
                ok && rope.theta > 0.0,
                Config,
                "rope base {} with {:?} gives no finite frequencies",
                rope.theta,
                rope.scaling
            );
        }
        let mask = self.diffusion.as_ref().map(|d| &d.mask);
        if let Some(d) = &self.diffusion {
            ensure!(d.block != Some(0), Config, "the diffusion model's blocks are 0 wide");
            ensure!(!self.eos.contains(&d.mask), Config, "token {} is both the mask and an end token", d.mask);
            ensure!(self.window.is_none(), Unsupported, "a diffusion model with a sliding window is not handled");
        }
        for t in self.eos.iter().chain(&self.bos).chain(mask) {
            ensure!(
                (*t as usize) < self.vocab,
                Config,
                "special token {t} is outside the vocabulary of {}",
                self.vocab
            );
        }
        Ok(self)
    }

    /// Whether the sliding window applies to layer `i`.
    pub fn is_local(&self, i: usize) -> bool {
        self.window.is_some() && self.local_layers.get(i).copied().unwrap_or(true)
    }

    /// Width of all key (or value) heads together.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of all query heads together.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Multiply-adds of one token through all matrices, the vocabulary matrix included.
    pub fn macs_per_token(&self) -> f64 {
        let layer = self.hidden * (2 * self.q_dim() + 2 * self.kv_dim() + 3 * self.ffn);
        (layer * self.layers + self.hidden * self.vocab) as f64
    }
}
