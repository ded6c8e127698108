//! [`VitConfig`]: every knob in which the supported vision transformers differ, as plain data.

use crate::error::{Result, ensure};
use crate::model::config::{Family, ModelConfig};

/// What of the last block's rows the head reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The class token.
    Class,
    /// The mean of the patches.
    Mean,
}

/// The shape of one vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929). Blocks are pre-norm with exact GELU; what is
/// pooled is normed, then read by a linear head.
#[derive(Clone, Debug, PartialEq)]
pub struct VitConfig {
    /// Height and width of an image, in pixels; multiples of `patch`.
    pub image: [usize; 2],
    /// Height and width of the images that a source's positions are for. Where the model's are others, they are interpolated
    /// at load ([`positions`](super::positions)).
    pub trained_image: [usize; 2],
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Channels of an image.
    pub channels: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Blocks.
    pub blocks: usize,
    /// Heads of attention; they divide `hidden`.
    pub heads: usize,
    /// Width of the MLP.
    pub mlp: usize,
    /// Epsilon of every norm.
    pub eps: f32,
    /// Whether a learned row stands before the patches.
    pub class_token: bool,
    /// What the head reads.
    pub pool: Pool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Factors per column on what attention and MLP add (LayerScale: Touvron et al. 2021, arXiv:2103.17239).
    pub layer_scale: bool,
    /// Classes of the head.
    pub classes: usize,
}

impl VitConfig {
    /// A plain ViT: class token, biases, eps 1e-6, no LayerScale, for square RGB images.
    pub fn new(image: usize, patch: usize, hidden: usize, blocks: usize, heads: usize, classes: usize) -> Self {
        Self {
            image: [image; 2],
            trained_image: [image; 2],
            patch,
            channels: 3,
            hidden,
            blocks,
            heads,
            mlp: hidden.saturating_mul(4),
            eps: 1e-6,
            class_token: true,
            pool: Pool::Class,
            qkv_bias: true,
            layer_scale: false,
            classes,
        }
    }

    /// Refuses what no model is. Every number from a file passes here before a buffer is sized by it.
    ///
    /// # Errors
    /// `Config`, naming the number.
    pub fn validate(self) -> Result<Self> {
        let sizes = [
            ("patch size", self.patch, 1 << 10),
            ("channel count", self.channels, 1 << 10),
            ("hidden size", self.hidden, 1 << 18),
            ("block count", self.blocks, 1 << 12),
            ("head count", self.heads, 1 << 12),
            ("MLP size", self.mlp, 1 << 20),
            ("class count", self.classes, 1 << 24),
        ];
        for (name, n, most) in sizes {
            ensure!((1..=most).contains(&n), Config, "{name} is {n}; expected 1 to {most}");
        }
        for side in self.image.into_iter().chain(self.trained_image) {
            let whole = side >= self.patch && side <= 1 << 14 && side.is_multiple_of(self.patch);
            ensure!(whole, Config, "an image of {side} pixels cannot be cut into patches of {}", self.patch);
        }
        let (hidden, heads) = (self.hidden, self.heads);
        ensure!(hidden.is_multiple_of(heads), Config, "{heads} heads do not divide the hidden size {hidden}");
        ensure!(self.eps.is_finite() && self.eps > 0.0, Config, "norm epsilon is {}", self.eps);
        let readable = self.class_token || self.pool == Pool::Mean;
        ensure!(readable, Config, "the head reads a class token, and there is none");
        Ok(self)
    }

    /// The same for images of the size that a source's positions are for.
    pub fn trained(&self) -> Self {
        Self { image: self.trained_image, ..self.clone() }
    }

    /// Rows and columns of patches of an image.
    pub fn grid(&self) -> [usize; 2] {
        self.image.map(|side| side / self.patch)
    }

    /// Patches of an image.
    pub fn patches(&self) -> usize {
        self.grid()[0] * self.grid()[1]
    }

    /// Rows of an image in a pass: the class token, then the patches, row by row.
    pub fn tokens(&self) -> usize {
        self.patches() + usize::from(self.class_token)
    }

    /// Values of a patch: channel by channel, row by row.
    pub fn patch_values(&self) -> usize {
        self.channels * self.patch * self.patch
    }

    /// Values of an image, `[channels, height, width]`.
    pub fn image_values(&self) -> usize {
        self.channels * self.image[0] * self.image[1]
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// The sizes that adapters ask of a decoder: fc1 is its up matrix, fc2 its down matrix, and a gate there is none.
    pub(crate) fn decoder_sizes(&self) -> ModelConfig {
        ModelConfig::base(Family::Llama, self.classes, self.hidden, self.blocks, self.heads, self.mlp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_model_is_is_refused() {
        let good = VitConfig::new(16, 4, 32, 2, 4, 10);
        assert!(good.clone().validate().is_ok());
        assert_eq!((good.tokens(), good.patch_values(), good.image_values(), good.head_dim()), (17, 48, 768, 8));
        let refused = |change: fn(&mut VitConfig), says: &str| {
            let mut c = VitConfig::new(16, 4, 32, 2, 4, 10);
            change(&mut c);
            let e = c.validate().unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        };
        refused(|c| c.patch = 0, "patch size is 0");
        refused(|c| c.image = [16, 18], "18 pixels cannot be cut into patches of 4");
        refused(|c| c.heads = 5, "5 heads do not divide");
        refused(|c| c.class_token = false, "there is none");
        refused(|c| c.eps = f32::NAN, "epsilon is NaN");
        refused(|c| c.classes = 0, "class count is 0");
    }
}
