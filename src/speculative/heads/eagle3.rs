//! EAGLE-3 (Li et al. 2025, arXiv:2503.01840).
//!
//! With E the target's embedding and f_t the inputs of three layers of the target at position t:
//!
//! ```text
//! g = fc [f_t]                             of a drafted row: the output o of the row above
//! s = [norm_e(E(x_{t+1})), norm_h(g)]
//! o = g + attention(s);  o += mlp(norm_p(o))
//! logits of x_{t+2} = U norm_f(o)          over the head's own vocabulary
//! ```

use std::ops::Range;
use std::sync::Arc;

use super::recurrent::{Form, Head, Recurrent, Room, Side};
use super::source::Source;
use crate::backend::{Backend, Buffer, In, Out};
use crate::decode::Session;
use crate::error::{Result, ensure};
use crate::model::Model;

struct Eagle3<B: Backend> {
    taps: Vec<usize>,
    fc: B::Weight,
    input_norm: B::Buf<B::Acc>,
    hidden_norm: B::Buf<B::Acc>,
    norm: B::Buf<B::Acc>,
    eps: f32,
}

/// Key that lists the tapped layers: 0 is the first layer's input, the embedding.
const TAPS: &str = "taps";
/// The same in published files. Some count outputs instead, which is seen by the first being 1: nobody taps the input of layer 1.
const PUBLISHED: [&str; 2] = ["eagle_aux_hidden_state_layer_ids", "eagle_config.eagle_aux_hidden_state_layer_ids"];

pub(super) fn load<B: Backend>(s: &Source<'_, B>, model: Arc<Model<B>>) -> Result<Recurrent<B>> {
    let (c, d) = (s.head.layer()?, s.cfg.hidden);
    s.same_vocabulary(&c)?;
    ensure!(c.layers == 1, Unsupported, "num_hidden_layers is {}; a head has one layer", c.layers);
    for key in ["norm_before_residual", "norm_before_fc", "eagle_config.norm_before_fc"] {
        ensure!(!s.head.flag(key)?, Unsupported, "{key} is true, which is not handled");
    }
    let taps = taps(s)?;
    let tokens = s.tokens()?;
    let form = Eagle3 {
        fc: s.matrix("fc.weight", d, taps.len() * d)?,
        input_norm: s.vector("midlayer.input_layernorm.weight", d)?,
        hidden_norm: s.vector("midlayer.hidden_norm.weight", d)?,
        norm: s.vector("norm.weight", d)?,
        eps: c.eps,
        taps,
    };
    let layer = s.layer("midlayer", c, 2 * d)?;
    let vocabulary = s.vocabulary("lm_head.weight", tokens.as_deref())?;
    let head = Head { model, form: Box::new(form), layer, vocabulary, tokens };
    Ok(Recurrent { head: Arc::new(head), state: None })
}

fn taps<B: Backend>(s: &Source<'_, B>) -> Result<Vec<usize>> {
    let layers = s.cfg.layers;
    let (mut key, mut taps) = (TAPS, s.head.sizes(TAPS)?);
    for published in PUBLISHED {
        if taps.is_none() {
            taps = s.head.sizes(published)?;
            if let Some(taps) = taps.as_mut().filter(|t| t.first() == Some(&1)) {
                taps.iter_mut().for_each(|t| *t += 1);
            }
            key = published;
        }
    }
    let Some(taps) = taps else {
        ensure!(layers >= 5, Config, "{TAPS} is missing: a target of {layers} layers has no layers 2, n/2 and n - 3");
        return Ok(vec![2, layers / 2, layers - 3]);
    };
    let right = taps.len() == 3 && taps.iter().all(|&t| t <= layers);
    ensure!(right, Config, "{key}: {taps:?} are not three of the target's {layers} layers");
    Ok(taps)
}

impl<B: Backend> Form<B> for Eagle3<B> {
    fn name(&self) -> &'static str {
        "eagle3"
    }

    fn taps(&self) -> &[usize] {
        &self.taps
    }

    fn features(&self, session: &Session<B>, rows: Range<usize>, room: &mut Room<B>) -> Result<()> {
        let (be, n, count) = (session.model().backend(), rows.len(), self.taps.len());
        for i in 0..count {
            room.tapped(be, i, session.features(i), rows.clone())?;
        }
        room.side_by_side(be, Side::Joined, count, n)?;
        let g = room.g(n);
        be.linear(room.parts.view_mut(g.clone()), room.s.head(count * g.len()), &self.fc, None)
    }

    fn enter(&self, be: &B, room: &mut Room<B>, rows: usize) -> Result<usize> {
        let (g, eps) = (room.g(rows), self.eps);
        let n = g.len();
        room.enter_by_g(be, rows)?;
        room.clear(be, Side::Joined, 0..2 * n)?;
        be.add_normed(room.joined.head_mut(n), room.parts.head(n), &self.input_norm, eps)?;
        be.add_normed(room.joined.view_mut(g.clone()), room.parts.view(g), &self.hidden_norm, eps)?;
        room.side_by_side(be, Side::Joined, 2, rows)?;
        Ok(2 * n / rows)
    }

    fn leave(&self, be: &B, h: Out<'_, B, B::Act>, x: In<'_, B, B::Acc>) -> Result<()> {
        be.rms_norm(h, x, &self.norm, self.eps)
    }
}
