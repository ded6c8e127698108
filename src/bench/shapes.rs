//! Real models by their sizes alone, with random weights: what a kernel or a device costs needs no download.

use super::inputs::matrix;
use crate::dtype::DType::{self, *};
use crate::error::{Result, ensure};
use crate::model::config::{Family, ModelConfig};
use crate::model::roles::{Role, TensorSource};
use crate::rng::Rng;
use crate::tensor::HostTensor;

/// Sizes of one model, and the types in which it is mostly met.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Shape {
    pub name: &'static str,
    /// Too large for a test.
    pub large: bool,
    /// Of the layers' matrices and of the head.
    pub dtype: DType,
    pub head: DType,
    pub vocab: usize,
    pub layers: usize,
    /// Width of the residual stream, and of the MLP.
    pub d: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The head is the embedding.
    pub tied: bool,
    /// Biases on q, k and v.
    pub bias: bool,
}

/// The models whose sizes are known.
#[rustfmt::skip]
pub const SHAPES: [Shape; 6] = [
    Shape { name: "tiny", large: false, dtype: Q8_0, head: Q8_0, vocab: 256, layers: 2, d: 256, ffn: 512, heads: 4, kv_heads: 2, head_dim: 64, tied: true, bias: true },
    Shape { name: "SmolLM2-135M", large: false, dtype: Q4_1, head: Q8_0, vocab: 49152, layers: 30, d: 576, ffn: 1536, heads: 9, kv_heads: 3, head_dim: 64, tied: true, bias: false },
    Shape { name: "Qwen3-0.6B", large: true, dtype: Q8_0, head: Q8_0, vocab: 151936, layers: 28, d: 1024, ffn: 3072, heads: 16, kv_heads: 8, head_dim: 128, tied: true, bias: false },
    Shape { name: "Llama-3.2-1B", large: true, dtype: BF16, head: BF16, vocab: 128256, layers: 16, d: 2048, ffn: 8192, heads: 32, kv_heads: 8, head_dim: 64, tied: true, bias: false },
    Shape { name: "Llama-3-8B", large: true, dtype: Q4_K, head: Q6_K, vocab: 128256, layers: 32, d: 4096, ffn: 14336, heads: 32, kv_heads: 8, head_dim: 128, tied: false, bias: false },
    Shape { name: "Qwen2.5-7B", large: true, dtype: Q4_K, head: Q6_K, vocab: 152064, layers: 28, d: 3584, ffn: 18944, heads: 28, kv_heads: 4, head_dim: 128, tied: false, bias: true },
];

impl Shape {
    /// The one of this name, in any case.
    ///
    /// # Errors
    /// `Usage` with the names there are.
    pub fn named(name: &str) -> Result<&'static Self> {
        let found = SHAPES.iter().find(|s| s.name.eq_ignore_ascii_case(name));
        let names = || SHAPES.map(|s| s.name.to_lowercase()).join(", ");
        ensure!(found.is_some(), Usage, "no shape {name:?} is known; there are {}", names());
        Ok(found.unwrap_or(&SHAPES[0]))
    }

    /// A configuration of these sizes.
    pub fn config(&self) -> ModelConfig {
        let family = if self.bias { Family::Qwen2 } else { Family::Llama };
        let mut c = ModelConfig::base(family, self.vocab, self.d, self.layers, self.heads, self.ffn);
        (c.kv_heads, c.head_dim, c.tied, c.qkv_bias) = (self.kv_heads, self.head_dim, self.tied, self.bias);
        c.attn_scale = (self.head_dim as f32).powf(-0.5);
        c.context = 1 << 17;
        c
    }
}

/// Random weights of a configuration, made tensor by tensor as they are asked for.
pub struct RandomModel {
    config: ModelConfig,
    /// Of the layers' matrices, and of embedding and head.
    dtypes: [DType; 2],
    seed: u64,
}

impl RandomModel {
    /// Weights that are a function of `seed` and the role alone, scaled so that activations keep their size.
    ///
    /// # Errors
    /// `Shape` where blocks of a type do not divide a matrix's columns.
    pub fn new(config: ModelConfig, dtypes: [DType; 2], seed: u64) -> Result<Self> {
        let model = Self { config: config.validate()?, dtypes, seed };
        model.bytes()?;
        Ok(model)
    }

    /// Bytes of all matrices.
    ///
    /// # Errors
    /// As [`RandomModel::new`].
    pub fn bytes(&self) -> Result<usize> {
        Role::all(&self.config).filter(|r| !r.is_vector()).try_fold(0, |sum, role| {
            let [rows, cols] = role.shape(&self.config).unwrap_or_default();
            Ok(sum + rows * self.dtype(role).row_bytes(cols)?)
        })
    }

    fn dtype(&self, role: Role) -> DType {
        self.dtypes[usize::from(matches!(role, Role::Embed | Role::Head))]
    }
}

impl TensorSource for RandomModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensor(&self, role: Role) -> Result<HostTensor> {
        let shape = role.shape(&self.config);
        ensure!(shape.is_some(), Weights, "a model of this configuration has no {role}");
        let [rows, cols] = shape.unwrap_or_default();
        let stream = Role::all(&self.config).position(|r| r == role).unwrap_or(0) as u64;
        let mut rng = Rng::stream(self.seed, stream);
        if role.is_vector() {
            // Around 1 for norms; biases alike, which is more than a trained model's and does no harm.
            let values: Vec<f32> = (0..cols).map(|_| 1.0 + 0.1 * rng.normal()).collect();
            return HostTensor::from_f32(1, cols, &values);
        }
        matrix(&mut rng, self.dtype(role), rows, cols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_models() {
        // Parameters of the matrices, as the models' own files count them.
        for (name, millions) in
            [("smollm2-135m", 134.5), ("llama-3.2-1b", 1235.7), ("llama-3-8b", 8030.0), ("qwen2.5-7b", 7615.3)]
        {
            let model = RandomModel::new(Shape::named(name).unwrap().config(), [DType::BF16; 2], 0).unwrap();
            let found = model.bytes().unwrap() as f64 / 2e6;
            assert!((found / millions - 1.0).abs() < 1e-3, "{name}: {found} million");
        }
        assert!(Shape::named("gpt-5").unwrap_err().to_string().contains("llama-3-8b"));
    }

    #[test]
    fn tensors_repeat_by_seed_and_differ_by_role() {
        let model = |seed| RandomModel::new(SHAPES[0].config(), [DType::Q8_0, DType::BF16], seed).unwrap();
        let roles: Vec<Role> = Role::all(&SHAPES[0].config()).collect();
        let data = |seed, i: usize| model(seed).tensor(roles[i]).unwrap().data.to_vec();
        assert!((0..roles.len()).all(|i| data(3, i) == data(3, i) && data(3, i) != data(4, i)));
        assert_eq!(model(0).tensor(Role::Embed).unwrap().dtype, DType::BF16);
        let smollm = Shape::named("smollm2-135m").unwrap().config();
        assert!(RandomModel::new(smollm, [DType::Q4_K; 2], 0).is_err(), "576 columns are no blocks of 256");
    }
}
