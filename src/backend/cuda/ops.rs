//! The ops of [`Backend`], each one launch (attention two).

use half::bf16;

use super::args;
use super::device::{Cuda, Slot};
use super::kernels::{self as k, Family, Kernel};
use super::kv::{CudaKv, table};
use super::memory::{CudaBuf, Dst, Src};
use super::weight::{CudaWeight, Form};
use crate::backend::{
    Accepted, AttnSpec, Backend, Buffer, Candidates, Draw, Group, Mask, Masked, Penalty, Ranks, Rule, Segment, Trees,
    WeightInfo,
};
use crate::dtype::{DType, Elem};
use crate::error::{Result, bail};
use crate::model::config::Activation;
use crate::tensor::HostTensor;

/// Threads of a block of the row operations.
pub(super) const THREADS: usize = 256;
/// Cache rows that one block of attention passes over. Fixed: it decides the order of sums.
const KEY_CHUNK: usize = 256;

pub(super) fn rows_of(what: &'static str, len: usize, d: usize) -> Result<usize> {
    if d == 0 || !len.is_multiple_of(d) {
        bail!(Shape, "{what}: {len} elements are no rows of {d}");
    }
    Ok(len / d)
}

/// Blocks of an elementwise kernel that strides over what they leave.
pub(super) fn spread(n: usize) -> [usize; 3] {
    [n.div_ceil(THREADS).min(4096), 1, 1]
}

pub(super) fn number(act: Activation) -> u32 {
    match act {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

/// Of the kernels for 8, 16, 32 and 64 rows the one for `rows`, and its grid; the last three take `strip` outputs a block.
fn few<A: Copy>(kernels: &[Kernel<A>; 4], rows: usize, outputs: usize, strip: usize) -> (Kernel<A>, [usize; 3]) {
    let i = [8, 16, 32].iter().position(|&n| rows <= n).unwrap_or(3);
    let strip = if i == 0 { 16 } else { strip };
    (kernels[i], [outputs.div_ceil(strip), rows.div_ceil(8 << i), 1])
}

impl Cuda {
    pub(super) fn rows_launch<A: super::Args>(&self, kernel: Kernel<A>, args: A, rows: usize) -> Result<()> {
        self.launch(kernel, args, [rows, 1, 1], THREADS, 0)
    }

    /// A product by the kernel that suits the number of rows; all give the same bits.
    fn product<A: super::Args, G>(&self, f: &Family<A, G>, args: A, rows: usize, outputs: usize) -> Result<()> {
        if rows <= 64 {
            let (kernel, grid) = few(&f.few, rows, outputs, 32);
            return self.launch(kernel, args, grid, THREADS, 0);
        }
        // The wide tile does most work for what it reads, but must not leave multiprocessors idle.
        let blocks = |tile: usize| rows.div_ceil(tile) * outputs.div_ceil(tile);
        let wide = usize::from(blocks(128) >= self.stream.multiprocessors());
        let ((kernel, shared), tile) = (f.many[wide], [64, 128][wide]);
        self.launch(kernel, args, [rows.div_ceil(tile), outputs.div_ceil(tile), 1], THREADS, shared)
    }

    /// Sends the table of segments; the guard keeps it until the launch.
    pub(super) fn segments(
        &self,
        small: &mut super::device::Small,
        segments: &[Segment<'_, Self>],
    ) -> Result<Src<'static, args::Seg>> {
        let (mut segs, bits) = table(segments)?;
        let words = small.put(&self.stream, Slot::TreeBits, &bits)?;
        for s in &mut segs {
            s.bits = if s.mask == 2 { words.address() + s.bits } else { 0 };
        }
        small.put(&self.stream, Slot::Segments, &segs)
    }
}

impl Backend for Cuda {
    type Act = bf16;
    type Acc = f32;
    type Buf<T: Elem> = CudaBuf<T>;
    type Weight = CudaWeight;
    type Kv = CudaKv;

    fn alloc<T: Elem>(&self, n: usize) -> Result<CudaBuf<T>> {
        CudaBuf::zeros(&self.stream, n)
    }

    fn upload<T: Elem>(&self, dst: Dst<'_, T>, src: &[T]) -> Result<()> {
        self.stream.upload(dst, src)
    }

    fn download<T: Elem>(&self, src: Src<'_, T>, dst: &mut [T]) -> Result<()> {
        self.stream.download(src, dst)
    }

    fn upload_acc(&self, dst: Dst<'_, f32>, src: &[f32]) -> Result<()> {
        self.stream.upload(dst, src)
    }

    fn download_acc(&self, src: Src<'_, f32>, dst: &mut [f32]) -> Result<()> {
        self.stream.download(src, dst)
    }

    fn weight(&self, t: HostTensor) -> Result<CudaWeight> {
        CudaWeight::new(&self.stream, t)
    }

    fn embed(&self, y: Dst<'_, f32>, table: &CudaWeight, tokens: &[u32], scale: f32) -> Result<()> {
        let (rows, d) = (tokens.len(), table.cols());
        if rows == 0 {
            return Ok(());
        }
        let (v, r, c) = (table.rows() as u32, rows as u32, d as u32);
        let mut small = self.small();
        let tokens = small.put(&self.stream, Slot::Tokens, tokens)?;
        let (kernel, bytes, size) = match &table.form {
            Form::Blocks(dtype, w, p) => {
                let [q, h, s, u] = [w.quants, w.high, w.scales, w.supers].map(|n| n as u32);
                let (quants, high, scales, supers) = (p.quants.all(), p.high.all(), p.scales.all(), p.supers.all());
                let args = args::EmbedBlocks::new(quants, high, scales, supers, tokens, y, v, r, c, q, h, s, u, scale)?;
                let kernel = match dtype {
                    DType::Q8_0 => k::EMBED_Q8_0,
                    DType::Q4_0 => k::EMBED_Q4_0,
                    DType::Q4_1 => k::EMBED_Q4_1,
                    DType::Q4_K => k::EMBED_Q4_K,
                    _ => k::EMBED_Q6_K,
                };
                return self.rows_launch(kernel, args, rows);
            }
            Form::Bf16(b) => (k::EMBED_BF16, Src::at(b.address(), 2 * b.len()), 2),
            Form::Plain(b, 2) => (k::EMBED_F16, b.all(), 2),
            Form::Plain(b, size) => (k::EMBED_F32, b.all(), *size),
        };
        self.rows_launch(kernel, args::Embed::new(bytes, tokens, y, v, r, c, size as u32, scale)?, rows)
    }

    fn gather_rows(&self, y: Dst<'_, f32>, x: Src<'_, f32>, rows: &[u32], d: usize) -> Result<()> {
        let from = rows_of("gather_rows", x.len(), d)?;
        let n = rows.len();
        if n == 0 {
            return Ok(());
        }
        let mut small = self.small();
        let index = if rows.iter().copied().eq(0..n as u32) {
            // A copy, of which a pass may have several: its own slot, and a round size, so that it is sent but once.
            let every: Vec<u32> = (0..n.next_power_of_two() as u32).collect();
            Src::at(small.put(&self.stream, Slot::Every, &every)?.address(), n)
        } else {
            small.put(&self.stream, Slot::Rows, rows)?
        };
        self.rows_launch(k::GATHER_ROWS, args::GatherRows::new(x, index, y, from as u32, n as u32, d as u32)?, n)
    }

    fn add(&self, x: Dst<'_, f32>, r: Src<'_, f32>) -> Result<()> {
        let n = x.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::ADD, args::Add::new(x, r, n as u32)?, spread(n), THREADS, 0)
    }

    fn operand(&self, y: Dst<'_, bf16>, x: Src<'_, f32>) -> Result<()> {
        let n = y.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::SET_BF16, args::SetBf16::new(y, x, n as u32)?, spread(n), THREADS, 0)
    }

    fn add_activated(&self, x: Dst<'_, f32>, r: Src<'_, f32>, act: Activation) -> Result<()> {
        let n = x.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::ADD_ACTIVATED, args::AddActivated::new(x, r, n as u32, number(act))?, spread(n), THREADS, 0)
    }

    fn rms_norm(&self, y: Dst<'_, bf16>, x: Src<'_, f32>, w: &CudaBuf<f32>, eps: f32) -> Result<()> {
        let rows = rows_of("rms_norm", x.len(), w.len())?;
        if rows == 0 {
            return Ok(());
        }
        self.rows_launch(k::RMS_NORM, args::RmsNorm::new(x, w.all(), y, rows as u32, w.len() as u32, eps)?, rows)
    }

    fn add_rms_norm(
        &self,
        y: Dst<'_, bf16>,
        x: &mut CudaBuf<f32>,
        r: Src<'_, f32>,
        w: &CudaBuf<f32>,
        rows: usize,
        eps: f32,
    ) -> Result<()> {
        let (d, x) = (w.len(), x.head_mut(rows * w.len()));
        if rows == 0 {
            return Ok(());
        }
        self.rows_launch(k::ADD_RMS_NORM, args::AddRmsNorm::new(x, r, w.all(), y, rows as u32, d as u32, eps)?, rows)
    }

    fn add_normed(&self, x: Dst<'_, f32>, r: Src<'_, f32>, w: &CudaBuf<f32>, eps: f32) -> Result<()> {
        let rows = rows_of("add_normed", x.len(), w.len())?;
        if rows == 0 {
            return Ok(());
        }
        self.rows_launch(k::ADD_NORMED, args::AddNormed::new(x, r, w.all(), rows as u32, w.len() as u32, eps)?, rows)
    }

    fn head_norm(&self, x: Dst<'_, f32>, w: &CudaBuf<f32>, eps: f32) -> Result<()> {
        let n = rows_of("head_norm", x.len(), w.len())?;
        if n == 0 {
            return Ok(());
        }
        let args = args::HeadNorm::new(x, w.all(), n as u32, w.len() as u32, eps)?;
        self.rows_launch(k::HEAD_NORM, args, n.div_ceil(THREADS / 32))
    }

    fn linear(&self, y: Dst<'_, f32>, x: Src<'_, bf16>, w: &CudaWeight, bias: Option<&CudaBuf<f32>>) -> Result<()> {
        let (outputs, inputs) = (w.rows(), w.cols());
        let rows = rows_of("linear", x.len(), inputs)?;
        if rows == 0 {
            return Ok(());
        }
        let (has_bias, bias) = (u32::from(bias.is_some()), bias.map_or(Src::EMPTY, |b| b.all()));
        let (r, i, o) = (rows as u32, inputs as u32, outputs as u32);
        match &w.form {
            Form::Bf16(w) if inputs % 8 == 0 => {
                self.product(&k::BF16, args::Linear::new(x, w.all(), bias, y, r, i, o, has_bias)?, rows, outputs)
            }
            Form::Bf16(w) => {
                let args = args::LinearOdd::new(x, w.all(), bias, y, r, i, o, has_bias)?;
                self.launch(k::LINEAR_BF16_ODD, args, [outputs.div_ceil(16), rows.div_ceil(8), 1], THREADS, 0)
            }
            Form::Blocks(dtype, _, p) => {
                let (q, h, s, u) = (p.quants.all(), p.high.all(), p.scales.all(), p.supers.all());
                match dtype {
                    DType::Q8_0 => self.product(
                        &k::Q8_0,
                        args::LinearQ8_0::new(x, q, s, bias, y, r, i, o, has_bias)?,
                        rows,
                        outputs,
                    ),
                    DType::Q4_0 => self.product(
                        &k::Q4_0,
                        args::LinearQ4_0::new(x, q, s, bias, y, r, i, o, has_bias)?,
                        rows,
                        outputs,
                    ),
                    DType::Q4_1 => self.product(
                        &k::Q4_1,
                        args::LinearQ4_1::new(x, q, s, bias, y, r, i, o, has_bias)?,
                        rows,
                        outputs,
                    ),
                    DType::Q4_K => {
                        let args = args::LinearQ4_K::new(x, q, s, u, bias, y, r, i, o, has_bias)?;
                        self.product(&k::Q4_K, args, rows, outputs)
                    }
                    _ => {
                        let args = args::LinearQ6_K::new(x, q, h, s, u, bias, y, r, i, o, has_bias)?;
                        self.product(&k::Q6_K, args, rows, outputs)
                    }
                }
            }
            Form::Plain(w, size) => {
                let args = args::Dense::new(w.all(), x, bias, y, r, o, i, *size as u32, has_bias)?;
                let kernel = if *size == 2 { k::DENSE_F16 } else { k::DENSE_F32 };
                self.launch(kernel, args, [outputs.div_ceil(THREADS / 32), rows, 1], THREADS, 0)
            }
        }
    }

    fn linear_glu(
        &self,
        y: Dst<'_, bf16>,
        x: Src<'_, bf16>,
        gate: &CudaWeight,
        up: &CudaWeight,
        act: Activation,
        scratch: &mut CudaBuf<f32>,
        rows: usize,
    ) -> Result<()> {
        let (outputs, inputs) = (gate.rows(), gate.cols());
        if (up.rows(), up.cols()) != (outputs, inputs) {
            bail!(Shape, "gate is [{outputs}, {inputs}], up is [{}, {}]", up.rows(), up.cols());
        }
        let (r, i, o, a) = (rows as u32, inputs as u32, outputs as u32, number(act));
        if (1..=64).contains(&rows) {
            match (&gate.form, &up.form) {
                (Form::Bf16(g), Form::Bf16(u)) if inputs % 8 == 0 => {
                    let args = args::LinearGlu::new(x, g.all(), u.all(), y, r, i, o, a)?;
                    let (kernel, grid) = few(&k::BF16.glu, rows, outputs, 16);
                    return self.launch(kernel, args, grid, THREADS, 0);
                }
                (Form::Blocks(f, _, g), Form::Blocks(other, _, u)) if f == other => {
                    let (gq, gh, gs, gu) = (g.quants.all(), g.high.all(), g.scales.all(), g.supers.all());
                    let (uq, uh, us, uu) = (u.quants.all(), u.high.all(), u.scales.all(), u.supers.all());
                    macro_rules! launch {
                        ($family:ident, $args:ident, $($plane:ident),*) => {{
                            let args = args::$args::new(x, $($plane,)* y, r, i, o, a)?;
                            let (kernel, grid) = few(&k::$family.glu, rows, outputs, 16);
                            return self.launch(kernel, args, grid, THREADS, 0);
                        }};
                    }
                    match f {
                        DType::Q8_0 => launch!(Q8_0, LinearGluQ8_0, gq, gs, uq, us),
                        DType::Q4_0 => launch!(Q4_0, LinearGluQ4_0, gq, gs, uq, us),
                        DType::Q4_1 => launch!(Q4_1, LinearGluQ4_1, gq, gs, uq, us),
                        DType::Q4_K => launch!(Q4_K, LinearGluQ4_K, gq, gs, gu, uq, us, uu),
                        _ => launch!(Q6_K, LinearGluQ6_K, gq, gh, gs, gu, uq, uh, us, uu),
                    }
                }
                _ => {}
            }
        }
        let n = rows * outputs;
        self.linear(scratch.view_mut(0..n), x, gate, None)?;
        self.linear(scratch.view_mut(n..2 * n), x, up, None)?;
        self.glu(y, scratch.view(0..n), scratch.view(n..2 * n), act)
    }

    fn glu(&self, y: Dst<'_, bf16>, gate: Src<'_, f32>, up: Src<'_, f32>, act: Activation) -> Result<()> {
        let n = y.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::GLU, args::Glu::new(gate, up, y, n as u32, number(act))?, spread(n), THREADS, 0)
    }

    fn shrink_rows(&self, h: Dst<'_, f32>, x: Src<'_, bf16>, ranks: usize, groups: &[Group<'_, Self>]) -> Result<()> {
        self.run_lora_shrink(h, x, ranks, groups)
    }

    fn expand_rows(&self, y: Dst<'_, f32>, h: Src<'_, f32>, part: Ranks, groups: &[Group<'_, Self>]) -> Result<()> {
        self.run_lora_expand(y, h, part, groups)
    }

    fn rope(&self, x: Dst<'_, f32>, table: Src<'_, f32>, head_dim: usize) -> Result<()> {
        let rows = rows_of("rope", table.len(), head_dim)?;
        if rows == 0 {
            return Ok(());
        }
        let heads = x.len() / (rows * head_dim);
        self.rows_launch(k::ROPE, args::Rope::new(x, table, rows as u32, heads as u32, head_dim as u32)?, rows)
    }

    fn kv_alloc(&self, layers: usize, capacity: usize, kv_dim: usize) -> Result<CudaKv> {
        CudaKv::alloc(&self.stream, layers, capacity, kv_dim)
    }

    fn kv_stage(
        &self,
        segments: &mut [Segment<'_, Self>],
        layer: usize,
        keys: Src<'_, f32>,
        v: Src<'_, f32>,
    ) -> Result<()> {
        let rows: usize = segments.iter().map(|s| s.rows).sum();
        let Some(kv_dim) = segments.first().map(|s| s.kv.kv_dim).filter(|_| rows > 0) else { return Ok(()) };
        let mut small = self.small();
        let segs = self.segments(&mut small, segments)?;
        let args = args::KvStage::new(segs, keys, v, segs.len() as u32, rows as u32, layer as u32, kv_dim as u32)?;
        self.launch(k::KV_STAGE, args, [rows, (kv_dim / 4).div_ceil(128), 1], 128, 0)
    }

    fn kv_commit(&self, kv: &mut CudaKv, past: usize, rows: &[u32]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let (n, layers, capacity, kv_dim) = (rows.len() as u32, kv.layers as u32, kv.capacity as u32, kv.kv_dim as u32);
        let mut small = self.small();
        let path = small.put(&self.stream, Slot::Path, rows)?;
        let args = args::KvCommit::new(path, kv.data.address(), past as u32, n, layers, capacity, kv_dim)?;
        self.launch(k::KV_COMMIT, args, [(kv.layers * kv.kv_dim / 4).div_ceil(128), 1, 1], 128, 0)
    }

    fn kv_commit_batch(
        &self,
        segments: &mut [Segment<'_, Self>],
        path: Src<'_, u32>,
        counts: Src<'_, u32>,
        stride: usize,
    ) -> Result<()> {
        self.run_kv_commit_batch(segments, path, counts, stride)
    }

    fn kv_copy(&self, dst: &mut CudaKv, src: &CudaKv, len: usize) -> Result<()> {
        dst.copy_from(&self.stream, src, len)
    }

    fn rope_stage(
        &self,
        q: &mut CudaBuf<f32>,
        keys: &mut CudaBuf<f32>,
        v: &CudaBuf<f32>,
        table: Src<'_, f32>,
        segments: &mut [Segment<'_, Self>],
        layer: usize,
        spec: &AttnSpec,
    ) -> Result<()> {
        let rows: usize = segments.iter().map(|s| s.rows).sum();
        if rows == 0 {
            return Ok(());
        }
        let (heads, kv_heads, head_dim) = (spec.heads, spec.kv_heads, spec.head_dim);
        let (q, keys, v) =
            (q.head_mut(rows * spec.q_dim()), keys.head(rows * spec.kv_dim()), v.head(rows * spec.kv_dim()));
        let mut small = self.small();
        let segs = self.segments(&mut small, segments)?;
        let n = segs.len() as u32;
        let args = args::RopeStage::new(
            segs,
            q,
            keys,
            v,
            table,
            n,
            rows as u32,
            layer as u32,
            heads as u32,
            kv_heads as u32,
            head_dim as u32,
        )?;
        let vectors = heads * head_dim / 8 + kv_heads * head_dim / 4;
        self.launch(k::ROPE_STAGE, args, [rows, vectors.div_ceil(128), 1], 128, 0)
    }

    fn attention(
        &self,
        y: Dst<'_, bf16>,
        q: Src<'_, f32>,
        segments: &[Segment<'_, Self>],
        layer: usize,
        spec: &AttnSpec,
    ) -> Result<()> {
        let rows: usize = segments.iter().map(|s| s.rows).sum();
        if rows == 0 {
            return Ok(());
        }
        let (kv_heads, head_dim, group) = (spec.kv_heads, spec.head_dim, spec.heads / spec.kv_heads);
        let longest = segments.iter().map(|s| s.rows * group).max().unwrap_or(0);
        let trees = segments.iter().any(|s| matches!(s.mask, Mask::Tree(_)));
        let prefill = match head_dim {
            64 => Some((k::PREFILL_64, 128)),
            96 => Some((k::PREFILL_96, 128)),
            128 => Some((k::PREFILL_128, 128)),
            256 => Some((k::PREFILL_256, 64)),
            _ => None,
        };
        let prefill = prefill.filter(|_| !self.row_independent && !trees && longest >= 128);
        let (kernel, tile) = match (head_dim, longest <= 16) {
            (64, true) => (k::ATTEND_64_M16, 16),
            (64, false) => (k::ATTEND_64_M64, 64),
            (96, true) => (k::ATTEND_96_M16, 16),
            (96, false) => (k::ATTEND_96_M64, 64),
            (128, true) => (k::ATTEND_128_M16, 16),
            (128, false) => (k::ATTEND_128_M64, 64),
            (256, true) => (k::ATTEND_256_M16, 16),
            (256, false) => (k::ATTEND_256_M32, 32),
            _ => (k::ATTEND_ANY_M16, 16),
        };
        let keys = segments.iter().map(|s| s.range().end).max().unwrap_or(0);
        // Blocks without keys leave at once. So many that a growing context changes the launch, and its graph, rarely.
        let chunks = keys.div_ceil(KEY_CHUNK).next_power_of_two();
        let ld = head_dim.div_ceil(16) * 16 + 8;
        let shared = |stages: usize| 2 * (tile * ld + stages * 128 * ld + tile * 72) + 24 * tile;
        let stages = if shared(2) <= self.stream.shared_memory() { 2 } else { 1 };
        let heads = rows * kv_heads * group;
        let mut small = self.small();
        let parts = small.room(&self.stream, Slot::Parts, chunks * heads * head_dim)?;
        let stats = small.room(&self.stream, Slot::Stats, chunks * heads * 2)?;
        let segs = self.segments(&mut small, segments)?;
        let window = spec.window.map_or(0, |w| w as u32);
        let args = args::Attention::new(
            segs,
            q,
            y,
            parts,
            stats,
            segs.len() as u32,
            rows as u32,
            layer as u32,
            kv_heads as u32,
            group as u32,
            head_dim as u32,
            window,
            KEY_CHUNK as u32,
            chunks as u32,
            stages as u32,
            spec.scale,
        )?;
        let tiles = |tile: usize| (rows * group + segs.len() * (tile - 1)) / tile;
        if let Some((kernel, tile)) = prefill {
            let shared = 2 * (tile + 128) * (head_dim + 8) + 8 * tile;
            return self.launch(kernel, args, [tiles(tile), kv_heads, 1], 128, shared);
        }
        self.launch(kernel, args, [tiles(tile), chunks, kv_heads], 128, shared(stages))?;
        if chunks > 1 {
            self.launch(k::ATTEND_MERGE, args, [(heads * head_dim / 4).div_ceil(128), 1, 1], 128, 0)?;
        }
        Ok(())
    }

    fn logits_stats(
        &self,
        stats: Dst<'_, f32>,
        argmax: Dst<'_, u32>,
        logits: Src<'_, f32>,
        vocab: usize,
    ) -> Result<()> {
        self.run_logits_stats(stats, argmax, logits, vocab)
    }

    fn top_k(
        &self,
        values: Dst<'_, f32>,
        ids: Dst<'_, u32>,
        logits: Src<'_, f32>,
        vocab: usize,
        k: usize,
    ) -> Result<()> {
        self.run_top_k(values, ids, logits, vocab, k)
    }

    fn penalize(&self, logits: Dst<'_, f32>, vocab: usize, penalties: &[Penalty]) -> Result<()> {
        self.run_penalize(logits, vocab, penalties)
    }

    fn forbid(&self, logits: Dst<'_, f32>, vocab: usize, tokens: &[u32]) -> Result<()> {
        self.run_forbid(logits, vocab, tokens)
    }

    fn sample(&self, tokens: Dst<'_, u32>, logits: Src<'_, f32>, draws: &[Draw]) -> Result<()> {
        self.run_sample(tokens, logits, draws)
    }

    fn distribution(&self, p: Dst<'_, f32>, logits: Src<'_, f32>, draws: &[Draw]) -> Result<()> {
        self.run_distribution(p, logits, draws)
    }

    fn unmask(
        &self,
        tokens: Dst<'_, u32>,
        taken: Dst<'_, u32>,
        rows: Candidates<'_, Self>,
        texts: &[Masked<'_>],
        eos: &[u32],
    ) -> Result<()> {
        self.run_unmask(tokens, taken, rows, texts, eos)
    }

    fn verify_tree(&self, accepted: Accepted<'_, Self>, trees: &Trees<'_>, rule: Rule<'_, Self>) -> Result<()> {
        self.run_verify_tree(accepted, trees, rule)
    }
}
