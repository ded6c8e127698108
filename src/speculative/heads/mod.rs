//! Draft heads: small networks that read what the target model computed anyway and guess its next tokens.
//!
//! | kind | what it is | tensors |
//! | --- | --- | --- |
//! | [`Kind::Eagle3`] | one layer over three of the target's layers, its own vocabulary | `midlayer.*`, `fc.weight`, `norm.weight`, `lm_head.weight`, `d2t` |
//! | [`Kind::Eagle`] | one layer over the target's last state, the target's vocabulary matrix | `layers.0.*`, `fc.*` |
//! | [`Kind::Hydra`] | one layer over the target's last state, then a network for each token ahead, which reads those before it | `prefix_embeding_layer.*`, `hydra_mlp.*`, `hydra_lm_head.*` |
//! | [`Kind::Medusa`] | a network for each token ahead, from the target's last state alone | `medusa_head.*` |
//!
//! [`load`] finds out the kind by the tensors' names.

mod eagle;
mod eagle3;
mod hydra;
mod layer;
mod medusa;
mod recurrent;
mod source;

use std::fmt;
use std::sync::Arc;

pub(super) use self::hydra::PREFIX as HYDRA_PREFIX;
use self::source::Source;
use super::Draft;
use crate::backend::Backend;
use crate::decode::Session;
use crate::error::{Context, Result, bail, ensure};
use crate::model::Model;
use crate::model::roles::{NamedTensors, TensorSource};

/// Rows that a head reads of a text in one pass.
const CHUNK: usize = 64;

/// The kinds of heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Eagle,
    Eagle3,
    Hydra,
    Medusa,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Eagle => "eagle",
            Kind::Eagle3 => "eagle3",
            Kind::Hydra => "hydra",
            Kind::Medusa => "medusa",
        })
    }
}

impl Kind {
    /// By the names of the tensors.
    ///
    /// # Errors
    /// `Weights` where they are those of no kind.
    pub fn of(head: &dyn NamedTensors) -> Result<Self> {
        let has = |name: &str| head.shape(name).is_some();
        if has("midlayer.self_attn.q_proj.weight") {
            return Ok(Kind::Eagle3);
        }
        if has("layers.0.self_attn.q_proj.weight") && has("fc.weight") {
            return Ok(Kind::Eagle);
        }
        if has(&format!("{}.layers.0.self_attn.q_proj.weight", hydra::PREFIX)) {
            return Ok(Kind::Hydra);
        }
        if medusa_prefix(head).is_some() {
            return Ok(Kind::Medusa);
        }
        let some: Vec<&str> = head.names().into_iter().take(4).collect();
        bail!(Weights, "no draft head of a known kind has tensors such as {}", some.join(", "))
    }
}

/// What the names of Medusa's heads begin with: published files have either.
fn medusa_prefix(head: &dyn NamedTensors) -> Option<&'static str> {
    ["medusa_head.", ""].into_iter().find(|p| head.shape(&format!("{p}0.0.linear.weight")).is_some())
}

/// Makes drafts of one head, which share its weights.
pub type Make<B> = Box<dyn Fn() -> Box<dyn Draft<B>> + Send + Sync>;

fn make<B: Backend, D: Draft<B> + Another + Sync + 'static>(first: D) -> Make<B> {
    Box::new(move || Box::new(first.another()))
}

/// A draft with the same weights and nothing read yet.
trait Another {
    fn another(&self) -> Self;
}

/// Brings a head to the device of `model`, whose weights `target` holds as they are stored. With `quantize` its matrices in
/// plain types become Q8_0: drafting is bound by their bytes.
///
/// # Errors
/// `Weights` and `Config` for what is missing, misshapen or made for another model, by tensor or key; `Unsupported` for a setting
/// that changes the mathematics in a way that is not handled.
pub fn load<B: Backend>(
    model: Arc<Model<B>>,
    target: &dyn TensorSource,
    head: &dyn NamedTensors,
    quantize: bool,
) -> Result<Make<B>> {
    let kind = Kind::of(head)?;
    let on = model.clone();
    let source = Source { be: on.backend(), cfg: on.config(), target, head, quantize };
    let make: Result<Make<B>> = match kind {
        Kind::Eagle => eagle::load(&source, model).map(make),
        Kind::Eagle3 => eagle3::load(&source, model).map(make),
        Kind::Hydra => hydra::load(&source, model).map(make),
        Kind::Medusa => medusa::load(&source, model, medusa_prefix(head).unwrap_or("")).map(make),
    };
    make.context(|| format!("{kind} head"))
}

/// Refuses a session that the head was not loaded for.
fn check<B: Backend>(session: &Session<B>, model: &Arc<Model<B>>, taps: &[usize]) -> Result<()> {
    ensure!(Arc::ptr_eq(session.model(), model), Usage, "this draft head was loaded for another model");
    let same = session.workspace().taps().eq(taps.iter().copied());
    ensure!(same, Usage, "the session does not keep the features of layers {taps:?} that this draft head reads");
    let (committed, vocab) = (session.cache().len(), model.config().vocab);
    let pending = &session.tokens()[committed..];
    let one = matches!(pending, [last] if (*last as usize) < vocab);
    ensure!(one, Usage, "tokens {pending:?} behind the {committed} committed ones: a draft wants one, below {vocab}");
    Ok(())
}

/// The text that the rows of a head's cache were read from.
#[derive(Default)]
struct Followed(Vec<u32>);

impl Followed {
    /// Forgets what `tokens` does not begin with. Returns how many tokens are left.
    fn keep(&mut self, tokens: &[u32]) -> usize {
        let same = self.0.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        self.0.truncate(same);
        same
    }

    /// Says that all of `tokens` has been read.
    fn read(&mut self, tokens: &[u32]) {
        let from = self.keep(tokens);
        self.0.extend_from_slice(&tokens[from..]);
    }
}
