//! Diffusion decoding of the embedded API: texts that are filled, several in a pass.

use std::sync::Arc;

use super::Engine;
use crate::backend::Backend;
use crate::diffusion::{ModelDenoiser, OnPass, Outcome, Schedule, Settings, decode};
use crate::error::Result;
use crate::model::Model;

impl Engine {
    /// How this model is best decoded, to be changed at will: the threshold of d3LLM for its kind.
    pub fn diffusion_settings(&self) -> Settings {
        Settings::for_model(self.config())
    }

    /// `prompt` and `tokens` masks behind it, to be filled by [`Engine::diffuse`].
    ///
    /// # Errors
    /// As [`Engine::infill`].
    pub fn blank(&self, prompt: &[u32], tokens: usize, settings: Settings) -> Result<Schedule> {
        let mask = self.config().diffusion.map_or(0, |d| d.mask);
        self.infill(prompt, &vec![mask; tokens], settings)
    }

    /// `prompt` and a text behind it whose masks are to be filled by [`Engine::diffuse`]; all other tokens of it stay.
    ///
    /// # Errors
    /// A model that is none of diffusion; impossible settings; a text without masks, or too long.
    pub fn infill(&self, prompt: &[u32], text: &[u32], settings: Settings) -> Result<Schedule> {
        let mut cfg = self.config().clone();
        cfg.eos = self.eos();
        Schedule::infill(&cfg, settings, prompt, text)
    }

    /// Fills `texts`, all in common: each pass computes what every text wants next. A text's result does not depend on the others.
    ///
    /// # Errors
    /// Predictions that are not finite; the device's; those of `on`.
    pub fn diffuse(&self, texts: &mut [Schedule], on: OnPass<'_>) -> Result<Vec<Outcome>> {
        self.0.model.diffuse(texts, on)?;
        Ok(texts.iter().map(Outcome::of).collect())
    }
}

/// All texts on a model.
pub(super) fn run<B: Backend>(model: &Arc<Model<B>>, texts: &mut [Schedule], on: OnPass<'_>) -> Result<()> {
    let Some(length) = texts.iter().map(|t| t.tokens().len()).max() else { return Ok(()) };
    let twice = texts.iter().any(|t| t.settings().authors);
    let capacity = if twice { 2 * length + 1 } else { length + 1 };
    let mut denoiser = ModelDenoiser::with_caches(model.clone(), texts.len(), length, capacity)?;
    decode(&mut denoiser, texts, on)
}
