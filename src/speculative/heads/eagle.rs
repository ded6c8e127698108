//! EAGLE (Li et al. 2024, arXiv:2401.15077).
//!
//! With E the target's embedding and h_t the target's state at position t behind its final norm, of a drafted row the output of
//! the row above:
//!
//! ```text
//! x = fc [E(x_{t+1}), h_t] + bias
//! x += attention(x);  x += mlp(norm(x))    no norm before the attention
//! logits of x_{t+2} = U x                  by the target's matrix
//! ```

use std::ops::Range;
use std::sync::Arc;

use super::recurrent::{Form, Head, Recurrent, Room, Side};
use super::source::Source;
use crate::backend::{Backend, Buffer, In, Linear, Out};
use crate::decode::Session;
use crate::error::{Result, ensure};
use crate::model::Model;

struct Eagle<B: Backend> {
    model: Arc<Model<B>>,
    /// The output of the last layer.
    taps: [usize; 1],
    fc: Linear<B>,
}

pub(super) fn load<B: Backend>(s: &Source<'_, B>, model: Arc<Model<B>>) -> Result<Recurrent<B>> {
    let (c, d) = (s.head.layer()?, s.cfg.hidden);
    s.same_vocabulary(&c)?;
    ensure!(!s.has("layers.1.self_attn.q_proj.weight"), Unsupported, "layers.1: a head has one layer");
    let norm = "layers.0.input_layernorm.weight";
    ensure!(!s.has(norm), Unsupported, "{norm}: EAGLE heads have no norm before the attention");
    let form = Eagle { model: model.clone(), taps: [s.cfg.layers], fc: s.linear("fc", d, 2 * d)? };
    let layer = s.layer("layers.0", c, d)?;
    let head = Head { model, form: Box::new(form), layer, vocabulary: None, tokens: None };
    Ok(Recurrent { head: Arc::new(head), state: None })
}

impl<B: Backend> Form<B> for Eagle<B> {
    fn name(&self) -> &'static str {
        "eagle"
    }

    fn taps(&self) -> &[usize] {
        &self.taps
    }

    fn features(&self, session: &Session<B>, rows: Range<usize>, room: &mut Room<B>) -> Result<()> {
        let (be, g) = (self.model.backend(), room.g(rows.len()));
        room.tapped(be, 0, session.features(0), rows)?;
        room.clear(be, Side::Parts, g.clone())?;
        let (norm, eps, n) = (self.model.final_norm(), self.model.config().eps, g.len());
        be.add_normed(room.parts.view_mut(g), room.joined.head(n), norm, eps)
    }

    fn enter(&self, be: &B, room: &mut Room<B>, rows: usize) -> Result<usize> {
        room.side_by_side(be, Side::Parts, 2, rows)?;
        let n = room.g(rows).len();
        be.linear(room.x.head_mut(n), room.s.head(2 * n), &self.fc.w, self.fc.bias.as_ref())?;
        be.operand(room.s.head_mut(n), room.x.head(n))?;
        Ok(n / rows)
    }

    fn leave(&self, be: &B, h: Out<'_, B, B::Act>, x: In<'_, B, B::Acc>) -> Result<()> {
        be.operand(h, x)
    }
}
