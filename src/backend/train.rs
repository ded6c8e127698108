//! [`Train`]: what a training pass needs beyond [`Backend`]: backward of every op, LoRA, losses, optimisers.
//!
//! A pass works on the rows of packed sequences, `[rows, features]`; it has no cache. Gradients are in
//! [`Backend::Acc`]; a gradient has the shape of what it is the gradient of. Gradients of weights are added to (`+=`),
//! so that several passes make one step; gradients of activations are set unless a [`Write`] says which. Sums over rows
//! have a fixed order that depends on the number of rows only: the same seed gives the same bits on any number of
//! threads.

use super::{AttnSpec, Backend, Buffer, Curvature, In, Out, Visible, WeightInfo};
use crate::error::Result;
use crate::model::config::Activation;

/// Whether a result replaces what was there or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// =
    Set,
    /// +=
    Add,
}

/// Columns `first .. first + n` of the rows of a matrix with `stride` columns: one module's part of the shrunk rows
/// that modules with one input share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranks {
    /// Columns of the matrix.
    pub stride: usize,
    /// First of the part.
    pub first: usize,
    /// Columns of the part: the module's rank.
    pub n: usize,
}

impl Ranks {
    /// All `n` columns.
    pub fn all(n: usize) -> Self {
        Self { stride: n, first: 0, n }
    }
}

/// Consecutive rows that use one matrix of an adapter. The groups of an op follow one another in its rows (SGMV: Chen
/// et al. 2023, arXiv:2310.18547; groups of one row are its BGMV).
pub struct Group<'a, B: Backend> {
    /// How many.
    pub rows: usize,
    /// A, `[ranks, in]`, or B, `[out, rank]`, of the low-rank update scale B A.
    pub matrix: In<'a, B, B::Acc>,
    /// alpha / rank, or alpha / sqrt(rank). Ops with A do not look at it.
    pub scale: f32,
}

impl<B: Backend> Clone for Group<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Group<'_, B> {}

/// A linear that reads an input: the gradient of its output, and its weight.
pub type Reader<'a, B> = (In<'a, B, <B as Backend>::Acc>, &'a <B as Backend>::Weight);
/// What adapts the linears of an input: the gradient of its shrunk rows, the ranks of those, and A.
pub type Shrunk<'a, B> = (In<'a, B, <B as Backend>::Acc>, usize, In<'a, B, <B as Backend>::Acc>);

/// What a row of logits z, with q = softmax(z), should have been.
pub enum Target<'a, B: Backend> {
    /// -ln q\[id\].
    Hard(&'a [u32]),
    /// -sum_i p_i ln q_i; p `[rows, vocab]` need not sum to 1.
    Soft(In<'a, B, B::Acc>),
    /// sum_i p_i ln(p_i / q_i).
    ForwardKl(In<'a, B, B::Acc>),
    /// sum_i q_i ln(q_i / p_i).
    ReverseKl(In<'a, B, B::Acc>),
    /// 1/2 sum_i |p_i - q_i|.
    TotalVariation(In<'a, B, B::Acc>),
    /// The `k` likeliest tokens of each row, `[rows, k]`, all different: -sum p ln q over them, and, with `tail`, the
    /// rest as one more token:
    /// -p_tail ln q_tail, p_tail = 1 - sum p.
    TopK {
        /// Tokens.
        ids: &'a [u32],
        /// Their probabilities.
        p: &'a [f32],
        /// Tokens a row.
        k: usize,
        /// Whether what is left counts.
        tail: bool,
    },
    /// Entropy of softmax(z / tau) where the likeliest token (the lowest id among equals) is the label, else 0.
    Entropy {
        /// Temperature.
        tau: f32,
        /// The right tokens.
        labels: &'a [u32],
    },
}

/// Least probability that [`Target::TopK`]'s tail takes q_tail for, and p_tail below which the tail does not count.
pub const TAIL: (f64, f64) = (1e-8, 1e-6);

/// How an optimiser moves a weight w against its gradient g (with learning rate lr and decoupled decay d).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Update {
    /// w -= lr (g + d w).
    Sgd,
    /// m = mu m + g; w -= lr (m + d w). State: m.
    Momentum {
        /// Share of the velocity that stays.
        mu: f32,
    },
    /// Loshchilov & Hutter 2019, arXiv:1711.05101. State: m, v.
    AdamW {
        /// Of m.
        beta1: f32,
        /// Of v.
        beta2: f32,
        /// Below the root.
        eps: f32,
    },
    /// Optimistic gradient descent with the last gradient as the hint (Rakhlin & Sridharan 2013, arXiv:1208.3728): the
    /// anchor a -= lr (g + d a), and w = a - lr g is played. State: a, which begins as w.
    Optimistic,
    /// The same along AdamW's direction. State: m, v, a.
    OptimisticAdam {
        /// Of m.
        beta1: f32,
        /// Of v.
        beta2: f32,
        /// Below the root.
        eps: f32,
    },
}

impl Update {
    /// Buffers of state.
    pub fn states(self) -> usize {
        match self {
            Update::Sgd => 0,
            Update::Momentum { .. } | Update::Optimistic => 1,
            Update::AdamW { .. } => 2,
            Update::OptimisticAdam { .. } => 3,
        }
    }

    /// The state that begins as the weight itself: an optimistic rule's anchor. All others begin as 0.
    pub fn anchor(self) -> Option<usize> {
        match self {
            Update::Optimistic => Some(0),
            Update::OptimisticAdam { .. } => Some(2),
            _ => None,
        }
    }
}

/// One step of an optimiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Which.
    pub rule: Update,
    /// Learning rate.
    pub lr: f32,
    /// Decoupled weight decay.
    pub decay: f32,
    /// Factor on every gradient: clipping.
    pub scale: f32,
    /// Steps done with this one, from 1 on: Adam's bias correction.
    pub number: u64,
    /// The proximal step of an L1 penalty behind the update: w (or its anchor) = r + soft(w - r, threshold), where r is
    /// the reference, or 0.
    pub l1: f32,
}

/// Training on a device.
pub trait Train: Curvature {
    /// A matrix `[rows, cols]` of 0 that [`Train::set_weight`] can change: in a plain type that products with it round
    /// to anyway.
    fn trainable(&self, rows: usize, cols: usize) -> Result<Self::Weight>;

    /// w = values, rounded to its type. The matrix is of [`Train::trainable`].
    fn set_weight(&self, w: &mut Self::Weight, values: In<'_, Self, Self::Acc>) -> Result<()>;

    /// y = x, of equal lengths.
    fn copy(&self, y: Out<'_, Self, Self::Acc>, x: In<'_, Self, Self::Acc>) -> Result<()>;

    /// x = 0.
    fn zero(&self, x: Out<'_, Self, Self::Acc>) -> Result<()>;

    /// y += a x.
    fn axpy(&self, y: Out<'_, Self, Self::Acc>, a: f32, x: In<'_, Self, Self::Acc>) -> Result<()>;

    /// sum x^2 over all of these tensors, in a fixed order. All at once, since the host has to wait for it.
    fn sq_norm(&self, tensors: &[In<'_, Self, Self::Acc>]) -> Result<f64>;

    /// y\[r, o\] (+)= sum_i w\[o, i\] x\[r, i\] (+ bias\[o\]): [`Backend::linear`] for many rows, with operands never
    /// below the backend's type of them.
    fn linear_fwd(
        &self,
        y: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Act>,
        w: &Self::Weight,
        bias: Option<&Self::Buf<Self::Acc>>,
        write: Write,
    ) -> Result<()>;

    /// dx\[r, i\] (+)= sum_o dy\[r, o\] w\[o, i\].
    fn linear_bwd_x(
        &self,
        dx: Out<'_, Self, Self::Acc>,
        dy: In<'_, Self, Self::Acc>,
        w: &Self::Weight,
        write: Write,
    ) -> Result<()>;

    /// dw\[o, i\] += sum_r dy\[r, o\] x\[r, i\]; `rows` tells the widths.
    fn linear_bwd_w(
        &self,
        dw: Out<'_, Self, Self::Acc>,
        dy: In<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Act>,
        rows: usize,
    ) -> Result<()>;

    /// db\[o\] += sum_r dy\[r, o\]: a bias.
    fn column_sums(&self, db: Out<'_, Self, Self::Acc>, dy: In<'_, Self, Self::Acc>) -> Result<()>;

    /// Of y = [`Backend::rms_norm`] of x, in rows of width `w.len()`: with u = w dy and s = 1 / sqrt(mean(x^2) + eps),
    /// dx (+)= s (u - x s^2 mean(u x)) and dw += sum over rows of dy x s.
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_bwd(
        &self,
        dx: Out<'_, Self, Self::Acc>,
        dw: Option<Out<'_, Self, Self::Acc>>,
        dy: In<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Acc>,
        w: &Self::Buf<Self::Acc>,
        eps: f32,
        write: Write,
    ) -> Result<()>;

    /// y = w (x - mean) s + b for each row of width `w.len()`, s = 1 / sqrt(mean((x - mean)^2) + eps) (Ba et al. 2016,
    /// arXiv:1607.06450).
    fn layer_norm(
        &self,
        y: Out<'_, Self, Self::Act>,
        x: In<'_, Self, Self::Acc>,
        w: &Self::Buf<Self::Acc>,
        b: &Self::Buf<Self::Acc>,
        eps: f32,
    ) -> Result<()>;

    /// Of y = [`Train::layer_norm`]: with u = w dy and h = (x - mean) s, dx (+)= s (u - mean(u) - h mean(u h)) and dw += sum over
    /// rows of dy h. The gradient of b is [`Train::column_sums`].
    #[allow(clippy::too_many_arguments)]
    fn layer_norm_bwd(
        &self,
        dx: Out<'_, Self, Self::Acc>,
        dw: Option<Out<'_, Self, Self::Acc>>,
        dy: In<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Acc>,
        w: &Self::Buf<Self::Acc>,
        eps: f32,
        write: Write,
    ) -> Result<()>;

    /// y = x Phi(x), Phi the distribution function of the normal law: GELU without an approximation (Hendrycks & Gimpel 2016,
    /// arXiv:1606.08415).
    fn gelu(&self, y: Out<'_, Self, Self::Act>, x: In<'_, Self, Self::Acc>) -> Result<()>;

    /// Of [`Train::gelu`]: dx = dy (Phi(x) + x Phi'(x)).
    fn gelu_bwd(
        &self,
        dx: Out<'_, Self, Self::Acc>,
        dy: In<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Acc>,
    ) -> Result<()>;

    /// y\[r, i\] += w\[i\] x\[r, i\]: a residual sum with LayerScale (Touvron et al. 2021, arXiv:2103.17239).
    fn add_scaled(
        &self,
        y: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Acc>,
        w: &Self::Buf<Self::Acc>,
    ) -> Result<()>;

    /// Of [`Train::add_scaled`]: dx = w dy, and dw += sum over rows of dy x.
    fn add_scaled_bwd(
        &self,
        dx: Out<'_, Self, Self::Acc>,
        dw: Option<Out<'_, Self, Self::Acc>>,
        dy: In<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Acc>,
        w: &Self::Buf<Self::Acc>,
    ) -> Result<()>;

    /// Of z = [`Backend::glu`]: dgate = dz up act'(gate), dup = dz act(gate).
    fn glu_bwd(
        &self,
        dgate: Out<'_, Self, Self::Acc>,
        dup: Out<'_, Self, Self::Acc>,
        dz: In<'_, Self, Self::Acc>,
        gate: In<'_, Self, Self::Acc>,
        up: In<'_, Self, Self::Acc>,
        act: Activation,
    ) -> Result<()>;

    /// y\[i, h\] = sum_j p_ij v\[j\], p = softmax_j(scale q\[i, h\].k\[j\]) over the rows j that row i sees; `lse`
    /// `[rows, heads]` is the logarithm of the softmax's denominator. The table of visible rows already knows of the
    /// window.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        y: Out<'_, Self, Self::Act>,
        lse: Out<'_, Self, Self::Acc>,
        q: In<'_, Self, Self::Acc>,
        k: In<'_, Self, Self::Acc>,
        v: In<'_, Self, Self::Acc>,
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()>;

    /// Of [`Train::attend`], from what it gave (Dao 2023, arXiv:2307.08691): with p_ij = exp(scale q_i.k_j - lse_i),
    /// D_i = dy_i.y_i and s_ij = scale p_ij (dy_i.v_j - D_i): dq_i = sum_j s_ij k_j, dk_j = sum_i s_ij q_i, dv_j =
    /// sum_i p_ij dy_i; keys and values sum over the heads that share them.
    #[allow(clippy::too_many_arguments)]
    fn attend_bwd(
        &self,
        dq: Out<'_, Self, Self::Acc>,
        dk: Out<'_, Self, Self::Acc>,
        dv: Out<'_, Self, Self::Acc>,
        dy: In<'_, Self, Self::Acc>,
        y: In<'_, Self, Self::Act>,
        lse: In<'_, Self, Self::Acc>,
        q: In<'_, Self, Self::Acc>,
        k: In<'_, Self, Self::Acc>,
        v: In<'_, Self, Self::Acc>,
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()>;

    /// [`Train::linear_fwd`] with a module of an adapter on it: y (+)= W x (+ bias) + scale B h\[part\], for one group
    /// of rows.
    #[allow(clippy::too_many_arguments)]
    fn linear_lora_fwd(
        &self,
        y: &mut Self::Buf<Self::Acc>,
        x: In<'_, Self, Self::Act>,
        w: &Self::Weight,
        bias: Option<&Self::Buf<Self::Acc>>,
        write: Write,
        h: In<'_, Self, Self::Acc>,
        part: Ranks,
        group: Group<'_, Self>,
    ) -> Result<()> {
        let n = group.rows * w.rows();
        self.linear_fwd(y.head_mut(n), x, w, bias, write)?;
        self.lora_expand(y.head_mut(n), h, part, &[group])
    }

    /// dx = what all the linears of one input give, [`Train::linear_bwd_x`] of each with the gradient of its output,
    /// and, where they are adapted, [`Train::lora_shrink_bwd`] of `lora`: dh, its ranks and A.
    fn linears_bwd_x(
        &self,
        dx: &mut Self::Buf<Self::Acc>,
        rows: usize,
        linears: &[Reader<'_, Self>],
        lora: Option<Shrunk<'_, Self>>,
    ) -> Result<()> {
        let n = rows * linears.first().map_or(0, |l| l.1.cols());
        for (i, &(dy, w)) in linears.iter().enumerate() {
            self.linear_bwd_x(dx.head_mut(n), dy, w, if i == 0 { Write::Set } else { Write::Add })?;
        }
        match lora {
            Some((dh, ranks, matrix)) => {
                self.lora_shrink_bwd(dx.head_mut(n), dh, ranks, &[Group { rows, matrix, scale: 1.0 }])
            }
            None => Ok(()),
        }
    }

    /// dx\[rows\[i\]\] += dy\[i\], rows of width `d`: of [`Backend::gather_rows`]. No row comes twice.
    fn scatter_rows(
        &self,
        dx: Out<'_, Self, Self::Acc>,
        dy: In<'_, Self, Self::Acc>,
        rows: &[u32],
        d: usize,
    ) -> Result<()>;

    /// dtable\[tokens\[r\]\] += scale dx\[r\], in the order of the rows: of [`Backend::embed`].
    fn embed_bwd(
        &self,
        dtable: Out<'_, Self, Self::Acc>,
        dx: In<'_, Self, Self::Acc>,
        tokens: &[u32],
        scale: f32,
    ) -> Result<()>;

    /// h\[r\] = A x\[r\], `[rows, ranks]`, A `[ranks, in]` of the row's group. Modules with one input stack their A.
    fn lora_shrink(
        &self,
        h: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Act>,
        ranks: usize,
        groups: &[Group<'_, Self>],
    ) -> Result<()>;

    /// y\[r\] += scale B h\[r, part\], B `[out, part.n]` of the row's group.
    fn lora_expand(
        &self,
        y: Out<'_, Self, Self::Acc>,
        h: In<'_, Self, Self::Acc>,
        part: Ranks,
        groups: &[Group<'_, Self>],
    ) -> Result<()>;

    /// dh\[r, part\] = scale B^T dy\[r\]: of [`Train::lora_expand`] by h.
    fn lora_expand_bwd(
        &self,
        dh: Out<'_, Self, Self::Acc>,
        dy: In<'_, Self, Self::Acc>,
        part: Ranks,
        groups: &[Group<'_, Self>],
    ) -> Result<()>;

    /// dx\[r\] += A^T dh\[r\]: of [`Train::lora_shrink`] by x.
    fn lora_shrink_bwd(
        &self,
        dx: Out<'_, Self, Self::Acc>,
        dh: In<'_, Self, Self::Acc>,
        ranks: usize,
        groups: &[Group<'_, Self>],
    ) -> Result<()>;

    /// db\[o, i\] += scale sum_r dy\[r, o\] h\[r, part i\]: one adapter's rows. A gradient over some rows only is one
    /// over gathered rows.
    fn lora_bwd_b(
        &self,
        db: Out<'_, Self, Self::Acc>,
        dy: In<'_, Self, Self::Acc>,
        h: In<'_, Self, Self::Acc>,
        part: Ranks,
        scale: f32,
    ) -> Result<()>;

    /// da\[i, c\] += sum_r dh\[r, i\] x\[r, c\]: one adapter's rows.
    fn lora_bwd_a(
        &self,
        da: Out<'_, Self, Self::Acc>,
        dh: In<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Act>,
        ranks: usize,
    ) -> Result<()>;

    /// The loss of each row of `logits`, `[rows, vocab]`, which become its gradient times the row's weight. A row of
    /// weight 0 has a loss and no gradient.
    fn loss_rows(
        &self,
        loss: Out<'_, Self, Self::Acc>,
        logits: Out<'_, Self, Self::Acc>,
        target: &Target<'_, Self>,
        weights: &[f32],
    ) -> Result<()>;

    /// x = softmax(x / tau) for each row of `vocab` logits.
    fn softmax_rows(&self, x: Out<'_, Self, Self::Acc>, vocab: usize, tau: f32) -> Result<()>;

    /// Mean over a row of d\^2/2 where |d| < 1, else |d| - 1/2, d = x - target; dx is its gradient by x times the row's
    /// weight.
    fn smooth_l1(
        &self,
        loss: Out<'_, Self, Self::Acc>,
        dx: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Acc>,
        target: In<'_, Self, Self::Acc>,
        weights: &[f32],
    ) -> Result<()>;

    /// One step of an optimiser over one tensor: everything in one pass over w, g and the states, which [`Update`] lists.
    fn optimize(
        &self,
        w: Out<'_, Self, Self::Acc>,
        g: In<'_, Self, Self::Acc>,
        states: &mut [Self::Buf<Self::Acc>],
        reference: Option<In<'_, Self, Self::Acc>>,
        step: &Step,
    ) -> Result<()>;
}
