//! One decoder layer, as heads have it.

use crate::backend::{AttnSpec, Backend, Buffer, In, Linear, Mask, Segment};
use crate::error::Result;
use crate::model::ModelConfig;

/// Weights of a decoder layer. What q, k and v read is up to the head, and so is the norm before them.
pub(super) struct Layer<B: Backend> {
    pub q: Linear<B>,
    pub k: Linear<B>,
    pub v: Linear<B>,
    pub o: B::Weight,
    pub mlp_norm: B::Buf<B::Acc>,
    pub gate: B::Weight,
    pub up: B::Weight,
    pub down: B::Weight,
    pub cfg: ModelConfig,
}

/// Where the rows of a pass stand in the layer's cache.
pub(super) struct Place<'a> {
    /// Rows to stay.
    pub past: usize,
    /// Rows of earlier passes behind them.
    pub staged: usize,
    /// Of this pass.
    pub rows: usize,
    /// Who sees whom among all but those to stay.
    pub mask: Mask<'a>,
}

/// Buffers of a pass of up to so many rows.
pub(super) struct LayerRoom<B: Backend> {
    q: B::Buf<B::Acc>,
    k: B::Buf<B::Acc>,
    v: B::Buf<B::Acc>,
    a: B::Buf<B::Act>,
    r: B::Buf<B::Acc>,
    h: B::Buf<B::Act>,
    g: B::Buf<B::Act>,
    gate_up: B::Buf<B::Acc>,
    rope: B::Buf<B::Acc>,
    table: Vec<f32>,
}

impl<B: Backend> LayerRoom<B> {
    pub fn new(be: &B, c: &ModelConfig, rows: usize) -> Result<Self> {
        Ok(Self {
            q: be.alloc(rows * c.q_dim())?,
            k: be.alloc(rows * c.kv_dim())?,
            v: be.alloc(rows * c.kv_dim())?,
            a: be.alloc(rows * c.q_dim())?,
            r: be.alloc(rows * c.hidden)?,
            h: be.alloc(rows * c.hidden)?,
            g: be.alloc(rows * c.ffn)?,
            gate_up: be.alloc(2 * rows * c.ffn)?,
            rope: be.alloc(rows * c.head_dim)?,
            table: vec![0.0; rows * c.head_dim],
        })
    }
}

impl<B: Backend> Layer<B> {
    /// x += attention(s), then x += mlp(norm(x)): keys and values are staged in `kv`.
    pub fn run(
        &self,
        be: &B,
        room: &mut LayerRoom<B>,
        x: &mut B::Buf<B::Acc>,
        s: In<'_, B, B::Act>,
        kv: &mut B::Kv,
        at: &Place<'_>,
    ) -> Result<()> {
        let (c, rows) = (&self.cfg, at.rows);
        let spec =
            AttnSpec { heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim, scale: c.attn_scale, window: None };
        let (n, nq, nk, ng, nr) =
            (rows * c.hidden, rows * c.q_dim(), rows * c.kv_dim(), rows * c.ffn, rows * c.head_dim);
        let LayerRoom { q, k, v, a, r, h, g, gate_up, rope, table } = room;
        let positions = (0..rows).map(|i| at.mask.position(at.past, at.staged + i));
        c.rope.fill(positions, c.head_dim, table);
        be.upload_acc(rope.head_mut(nr), &table[..nr])?;
        be.qkv(q.head_mut(nq), k.head_mut(nk), v.head_mut(nk), s, [&self.q, &self.k, &self.v])?;
        let mut segments = [Segment { kv, past: at.past, staged: at.staged, rows, mask: at.mask }];
        be.rope_stage(q, k, v, rope.head(nr), &mut segments, 0, &spec)?;
        be.attention(a.head_mut(nq), q.head(nq), &segments, 0, &spec)?;
        be.linear(r.head_mut(n), a.head(nq), &self.o, None)?;
        be.add_rms_norm(h.head_mut(n), x, r.head(n), &self.mlp_norm, rows, c.eps)?;
        be.linear_glu(g.head_mut(ng), h.head(n), &self.gate, &self.up, c.activation, gate_up, rows)?;
        be.linear(r.head_mut(n), g.head(ng), &self.down, None)?;
        be.add(x.head_mut(n), r.head(n))
    }
}
