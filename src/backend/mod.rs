//! The [`Backend`] trait: about thirty operations of transformers and of decoding over typed buffers, and nothing else.
//!
//! Every activation is `[rows, features]`, row-major and contiguous; the number of rows is a buffer's length over the
//! feature count. There are no strides, no broadcasting and no graph. An op's mathematics is stated once, here; [`naive`]
//! is the same statement as code, in f64. Provided methods compose small ops and are what fused overrides are tested
//! against.
//!
//! Precision is settled by two associated types: [`Backend::Acc`] for the residual stream and everything reduced, and
//! [`Backend::Act`] for the operands of matrix products.
//!
//! Row independence: a row's result never depends on how many rows are in the pass.

pub mod cpu;
pub mod cuda;
mod curvature;
pub mod host;
mod mask;
pub mod naive;
mod sampling;
mod train;
mod unmask;
mod visible;

pub use curvature::Curvature;
pub use mask::{Mask, TreeMask};
pub use sampling::{Accepted, Draw, MAX_SIBLINGS, MAX_TRAVERSED, NO_TOKEN, Order, Penalty, Rule, Trees};
pub use train::{Group, Ranks, Reader, Shrunk, Step, TAIL, Target, Train, Update, Write};
pub use unmask::{Candidates, Masked, Score, Unmasking};
pub use visible::Visible;

use std::ops::Range;

use crate::dtype::{Elem, Float, Real};
use crate::error::Result;
use crate::model::config::Activation;
use crate::tensor::HostTensor;

/// A typed run of elements on a device, borrowed by range.
pub trait Buffer<T: Elem>: Send + Sync {
    /// A shared view; on the CPU a slice.
    type View<'a>: Copy
    where
        Self: 'a;
    /// An exclusive view; on the CPU a mutable slice.
    type ViewMut<'a>
    where
        Self: 'a;
    /// Elements.
    fn len(&self) -> usize;
    /// Whether it holds nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Elements `r`.
    fn view(&self, r: Range<usize>) -> Self::View<'_>;
    /// Elements `r`, to write.
    fn view_mut(&mut self, r: Range<usize>) -> Self::ViewMut<'_>;
    /// The first `n` elements.
    fn head(&self, n: usize) -> Self::View<'_> {
        self.view(0..n)
    }
    /// The first `n` elements, to write.
    fn head_mut(&mut self, n: usize) -> Self::ViewMut<'_> {
        self.view_mut(0..n)
    }
}

/// What an op reads.
pub type In<'a, B, T> = <<B as Backend>::Buf<T> as Buffer<T>>::View<'a>;
/// What an op writes (or updates).
pub type Out<'a, B, T> = <<B as Backend>::Buf<T> as Buffer<T>>::ViewMut<'a>;

/// Head geometry and scoring of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttnSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head h reads head h * kv_heads / heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on q.k.
    pub scale: f32,
    /// A query at position p sees keys at positions above p - window.
    pub window: Option<usize>,
}

impl AttnSpec {
    /// Columns of q.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Columns of k and of v.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// The rows of one sequence in a pass: `rows` behind `past` committed and `staged` staged rows of its cache. Row i of the pass is
/// staged row `staged + i`, cache row `past + staged + i`.
pub struct Segment<'a, B: Backend> {
    /// Its cache.
    pub kv: &'a mut B::Kv,
    /// Committed rows.
    pub past: usize,
    /// Rows that earlier passes staged and this one keeps.
    pub staged: usize,
    /// Rows of this pass; they follow one another in its activations, segment after segment.
    pub rows: usize,
    /// Who sees whom among all `staged + rows` staged rows.
    pub mask: Mask<'a>,
}

impl<B: Backend> Segment<'_, B> {
    /// Cache rows of this pass.
    pub fn range(&self) -> Range<usize> {
        let first = self.past + self.staged;
        first..first + self.rows
    }
}

/// A weight of one linear layer and its bias, as [`Backend::qkv`] takes three of them.
pub struct Linear<B: Backend> {
    /// `[out, in]`.
    pub w: B::Weight,
    /// `[out]`.
    pub bias: Option<B::Buf<B::Acc>>,
}

/// Sizes a backend reports of a weight.
pub trait WeightInfo: Send + Sync {
    /// Outputs.
    fn rows(&self) -> usize;
    /// Inputs.
    fn cols(&self) -> usize;
    /// Bytes that a pass reads.
    fn bytes(&self) -> usize;
}

/// A device that runs the ops. See the module documentation for the rules that all of them share.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Operands of matrix products: f32 on the CPU, bf16 on CUDA, f64 in the specification.
    type Act: Real;
    /// Residual stream, statistics, logits: f32, f32, f64.
    type Acc: Float;
    /// Device memory.
    type Buf<T: Elem>: Buffer<T>;
    /// A matrix `[out, in]` in whatever layout the device multiplies fastest.
    type Weight: WeightInfo;
    /// Keys and values of all layers of one sequence, in whatever type and layout attention reads fastest.
    type Kv: Send + Sync;

    /// `n` zeros.
    fn alloc<T: Elem>(&self, n: usize) -> Result<Self::Buf<T>>;
    /// Host to device; lengths are equal.
    fn upload<T: Elem>(&self, dst: Out<'_, Self, T>, src: &[T]) -> Result<()>;
    /// Device to host; lengths are equal. Waits for what was queued before.
    fn download<T: Elem>(&self, src: In<'_, Self, T>, dst: &mut [T]) -> Result<()>;
    /// f32 values in the backend's accumulator type.
    fn upload_acc(&self, dst: Out<'_, Self, Self::Acc>, src: &[f32]) -> Result<()>;
    /// Accumulator values as f32.
    fn download_acc(&self, src: In<'_, Self, Self::Acc>, dst: &mut [f32]) -> Result<()>;
    /// A matrix from a file, repacked where the device wants it. The source's pages are released once they are copied.
    fn weight(&self, t: HostTensor) -> Result<Self::Weight>;
    /// Says that all weights of a model are loaded: memory kept ready for more may go.
    fn weights_done(&self) {}

    /// y\[r\] = scale * table\[tokens\[r\]\]. Tokens are inside the table (the caller checks).
    fn embed(&self, y: Out<'_, Self, Self::Acc>, table: &Self::Weight, tokens: &[u32], scale: f32) -> Result<()>;

    /// y\[i\] = x\[rows\[i\]\], rows of width `d`.
    fn gather_rows(
        &self,
        y: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Acc>,
        rows: &[u32],
        d: usize,
    ) -> Result<()>;

    /// x += r.
    fn add(&self, x: Out<'_, Self, Self::Acc>, r: In<'_, Self, Self::Acc>) -> Result<()>;

    /// y = x w / sqrt(mean(x^2) + eps) for each row of width `w.len()` (Zhang & Sennrich 2019, arXiv:1910.07467).
    fn rms_norm(
        &self,
        y: Out<'_, Self, Self::Act>,
        x: In<'_, Self, Self::Acc>,
        w: &Self::Buf<Self::Acc>,
        eps: f32,
    ) -> Result<()>;

    /// y = x, in the type of operands.
    fn operand(&self, y: Out<'_, Self, Self::Act>, x: In<'_, Self, Self::Acc>) -> Result<()>;

    /// x += act(r), elementwise.
    fn add_activated(&self, x: Out<'_, Self, Self::Acc>, r: In<'_, Self, Self::Acc>, act: Activation) -> Result<()>;

    /// x += r, then y = rms_norm(x).
    fn add_rms_norm(
        &self,
        y: Out<'_, Self, Self::Act>,
        x: &mut Self::Buf<Self::Acc>,
        r: In<'_, Self, Self::Acc>,
        w: &Self::Buf<Self::Acc>,
        rows: usize,
        eps: f32,
    ) -> Result<()> {
        let n = rows * w.len();
        self.add(x.head_mut(n), r)?;
        self.rms_norm(y, x.head(n), w, eps)
    }

    /// x += rms_norm(r): the residual sum behind Gemma's post-norms.
    fn add_normed(
        &self,
        x: Out<'_, Self, Self::Acc>,
        r: In<'_, Self, Self::Acc>,
        w: &Self::Buf<Self::Acc>,
        eps: f32,
    ) -> Result<()>;

    /// Each head of `head_dim = w.len()` columns of x is RMS-normalised in place (q/k norm).
    fn head_norm(&self, x: Out<'_, Self, Self::Acc>, w: &Self::Buf<Self::Acc>, eps: f32) -> Result<()>;

    /// y\[r, o\] = sum_i w\[o, i\] x\[r, i\] (+ bias\[o\]).
    fn linear(
        &self,
        y: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Act>,
        w: &Self::Weight,
        bias: Option<&Self::Buf<Self::Acc>>,
    ) -> Result<()>;

    /// Three linear layers of one input: q, k and v.
    fn qkv(
        &self,
        q: Out<'_, Self, Self::Acc>,
        k: Out<'_, Self, Self::Acc>,
        v: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Act>,
        w: [&Linear<Self>; 3],
    ) -> Result<()> {
        self.linear(q, x, &w[0].w, w[0].bias.as_ref())?;
        self.linear(k, x, &w[1].w, w[1].bias.as_ref())?;
        self.linear(v, x, &w[2].w, w[2].bias.as_ref())
    }

    /// y = act(gate) * up, elementwise.
    fn glu(
        &self,
        y: Out<'_, Self, Self::Act>,
        gate: In<'_, Self, Self::Acc>,
        up: In<'_, Self, Self::Acc>,
        act: Activation,
    ) -> Result<()>;

    /// y = act(W_gate x) * (W_up x). `scratch` holds at least twice as many elements as y.
    #[allow(clippy::too_many_arguments)]
    fn linear_glu(
        &self,
        y: Out<'_, Self, Self::Act>,
        x: In<'_, Self, Self::Act>,
        gate: &Self::Weight,
        up: &Self::Weight,
        act: Activation,
        scratch: &mut Self::Buf<Self::Acc>,
        rows: usize,
    ) -> Result<()> {
        let n = rows * gate.rows();
        self.linear(scratch.view_mut(0..n), x, gate, None)?;
        self.linear(scratch.view_mut(n..2 * n), x, up, None)?;
        self.glu(y, scratch.view(0..n), scratch.view(n..2 * n), act)
    }

    /// h\[r\] = A x\[r\], `[rows, ranks]`, A `[ranks, in]` of the row's group: [`Train::lora_shrink`] for the few rows of a decoding
    /// pass. h and A are in the accumulator's type throughout, and how rows are grouped never changes a bit of them.
    fn shrink_rows(
        &self,
        h: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Act>,
        ranks: usize,
        groups: &[Group<'_, Self>],
    ) -> Result<()>;

    /// y\[r\] += scale B h\[r, part\], B `[out, part.n]` of the row's group: [`Train::lora_expand`] by the rules of
    /// [`Backend::shrink_rows`].
    fn expand_rows(
        &self,
        y: Out<'_, Self, Self::Acc>,
        h: In<'_, Self, Self::Acc>,
        part: Ranks,
        groups: &[Group<'_, Self>],
    ) -> Result<()>;

    /// Rotates every head of x in place: pair (i, i + head_dim/2) of row r by the angle whose cosine and sine are
    /// `table[r * head_dim + i]` and `table[r * head_dim + head_dim/2 + i]`. A negated sine is the inverse (backward).
    fn rope(&self, x: Out<'_, Self, Self::Acc>, table: In<'_, Self, Self::Acc>, head_dim: usize) -> Result<()>;

    /// An empty cache: `layers` layers, `capacity` rows, `kv_dim` columns for each of keys and values. Memory is reserved
    /// here and touched as rows arrive.
    fn kv_alloc(&self, layers: usize, capacity: usize, kv_dim: usize) -> Result<Self::Kv>;

    /// Writes the pass's keys and values (`[rows, kv_dim]`) to the rows [`Segment::range`] of each segment's cache.
    fn kv_stage(
        &self,
        segments: &mut [Segment<'_, Self>],
        layer: usize,
        k: In<'_, Self, Self::Acc>,
        v: In<'_, Self, Self::Acc>,
    ) -> Result<()>;

    /// In all layers row `past + i` becomes what row `past + rows[i]` was, for all i. `rows` ascends strictly.
    fn kv_commit(&self, kv: &mut Self::Kv, past: usize, rows: &[u32]) -> Result<()>;

    /// [`Backend::kv_commit`] for every segment, straight from verification: segment s, which has staged rows, keeps those
    /// of `path[s * stride..][..counts[s]]`.
    fn kv_commit_batch(
        &self,
        segments: &mut [Segment<'_, Self>],
        path: In<'_, Self, u32>,
        counts: In<'_, Self, u32>,
        stride: usize,
    ) -> Result<()> {
        let (mut rows, mut n) = (vec![0; segments.len() * stride], vec![0; segments.len()]);
        self.download(path, &mut rows)?;
        self.download(counts, &mut n)?;
        for ((s, rows), n) in segments.iter_mut().zip(rows.chunks(stride)).zip(n) {
            self.kv_commit(s.kv, s.past, &rows[..n as usize])?;
        }
        Ok(())
    }

    /// Copies the first `len` rows of all layers.
    fn kv_copy(&self, dst: &mut Self::Kv, src: &Self::Kv, len: usize) -> Result<()>;

    /// Rotation of q and k and staging of k and v in one: what stands between `qkv` and `attention`. `table` is that of
    /// [`Backend::rope`] and tells the number of rows.
    #[allow(clippy::too_many_arguments)]
    fn rope_stage(
        &self,
        q: &mut Self::Buf<Self::Acc>,
        k: &mut Self::Buf<Self::Acc>,
        v: &Self::Buf<Self::Acc>,
        table: In<'_, Self, Self::Acc>,
        segments: &mut [Segment<'_, Self>],
        layer: usize,
        spec: &AttnSpec,
    ) -> Result<()> {
        let rows: usize = segments.iter().map(|s| s.rows).sum();
        let n = rows * spec.kv_dim();
        self.rope(q.head_mut(rows * spec.q_dim()), table, spec.head_dim)?;
        self.rope(k.head_mut(n), table, spec.head_dim)?;
        self.kv_stage(segments, layer, k.head(n), v.head(n))
    }

    /// y\[r, h\] = softmax_j(scale q\[r, h\].k\[j\]) v\[j\] over the rows j of its segment's cache that r may see.
    fn attention(
        &self,
        y: Out<'_, Self, Self::Act>,
        q: In<'_, Self, Self::Acc>,
        segments: &[Segment<'_, Self>],
        layer: usize,
        spec: &AttnSpec,
    ) -> Result<()>;

    /// Of each row x of `vocab` logits: `stats` holds max x, ln sum e^x and the entropy of softmax(x) in nats, `argmax` the
    /// lowest id of the largest. A row with NaN, or whose largest is not finite, has three NaN and [`NO_TOKEN`].
    fn logits_stats(
        &self,
        stats: Out<'_, Self, Self::Acc>,
        argmax: Out<'_, Self, u32>,
        logits: In<'_, Self, Self::Acc>,
        vocab: usize,
    ) -> Result<()>;

    /// The `k` largest of each row of `vocab` logits with their ids, largest first, lower ids first among equals. k is 1 to
    /// 64, at most `vocab`. Logits hold no NaN.
    fn top_k(
        &self,
        values: Out<'_, Self, Self::Acc>,
        ids: Out<'_, Self, u32>,
        logits: In<'_, Self, Self::Acc>,
        vocab: usize,
        k: usize,
    ) -> Result<()>;

    /// Divides positive logits by their penalty's factor and multiplies others by it, in rows of `vocab`. No logit has two
    /// penalties. A node of a tree has those of the text before it and of the tokens on its own path.
    fn penalize(&self, logits: Out<'_, Self, Self::Acc>, vocab: usize, penalties: &[Penalty]) -> Result<()>;

    /// x\[r, t\] = -inf in every row r of `vocab` logits, for each of these tokens t: they are never drawn nor the largest, and have no
    /// part in the probability, as the MASK token of a diffusion model must not (Sahoo et al. 2024, arXiv:2406.07524).
    fn forbid(&self, logits: Out<'_, Self, Self::Acc>, vocab: usize, tokens: &[u32]) -> Result<()>;

    /// n tokens of each row of logits, `[rows, n]`, drawn without replacement as the row's [`Draw`] says; n is 1 to 64.
    fn sample(&self, tokens: Out<'_, Self, u32>, logits: In<'_, Self, Self::Acc>, draws: &[Draw]) -> Result<()>;

    /// The distribution that [`Backend::sample`] draws a row's first token from, `[rows, vocab]`; all 0 where there is none.
    fn distribution(&self, p: Out<'_, Self, Self::Acc>, logits: In<'_, Self, Self::Acc>, draws: &[Draw]) -> Result<()>;

    /// Gives masked positions their tokens, in many sequences at once, as each one's [`Masked`] says. `tokens` holds the tokens of all
    /// sequences, `[R]` `taken` says what the position of each row got, [`NO_TOKEN`] where it stays masked. `eos` are the end tokens. A
    /// call without rows changes nothing.
    fn unmask(
        &self,
        tokens: Out<'_, Self, u32>,
        taken: Out<'_, Self, u32>,
        rows: Candidates<'_, Self>,
        texts: &[Masked<'_>],
        eos: &[u32],
    ) -> Result<()>;

    /// Which drafted tokens stand, in many trees at once, such that the tokens kept follow the target's law exactly.
    fn verify_tree(&self, accepted: Accepted<'_, Self>, trees: &Trees<'_>, rule: Rule<'_, Self>) -> Result<()>;
}
