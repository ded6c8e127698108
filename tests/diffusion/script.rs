//! A scripted model: predictions depend on the position alone, never on the text (spec 8.2).

use quadriga::Result;
use quadriga::diffusion::{Choose, Commit, Denoise, Job, Rank, RowStat, Schedule, Settings, decode};
use quadriga::model::ModelConfig;
use quadriga::model::config::{Diffusion, Family};

pub const PROMPT: usize = 4;
pub const MASK: u32 = 30;
pub const EOS: u32 = 2;

/// The token and the entropy predicted for generated position i.
pub type Script = Box<dyn Fn(usize) -> (u32, f64)>;

pub struct Scripted {
    pub script: Script,
    /// Of each pass the first and one behind the last position, rows of the cache that it saw, rows that it kept.
    pub passes: Vec<(usize, usize, usize, usize)>,
}

pub fn config(shift: bool) -> ModelConfig {
    let mut cfg = ModelConfig::base(Family::Llama, 32, 8, 1, 1, 8);
    cfg.eos = vec![EOS];
    cfg.diffusion = Some(Diffusion { mask: MASK, shift, block: None });
    cfg
}

/// p >= 1/2 with -p ln p - (1-p) ln (1-p) = h.
pub fn probability(h: f64) -> f64 {
    let entropy = |p: f64| if p >= 1.0 { 0.0 } else { -p * p.ln() - (1.0 - p) * (1.0 - p).ln() };
    let (mut low, mut high) = (0.5, 1.0);
    for _ in 0..200 {
        let mid = (low + high) / 2.0;
        if entropy(mid) > h { low = mid } else { high = mid }
    }
    low
}

impl Scripted {
    pub fn new(script: impl Fn(usize) -> (u32, f64) + 'static) -> Self {
        Self { script: Box::new(script), passes: Vec::new() }
    }
}

impl Denoise for Scripted {
    fn run(&mut self, jobs: &[Job<'_>]) -> Result<Vec<Vec<RowStat>>> {
        let mut found = Vec::new();
        for job in jobs {
            let (pass, text) = (job.pass, job.text);
            let shift = usize::from(text.model().shift);
            self.passes.push((pass.spans[0].start, pass.spans.last().unwrap().end, pass.past, pass.keep));
            let one = |&row: &u32| {
                // The row of the head, which knows nothing of what the schedule takes it for.
                let i = pass.position(row) + shift - text.prompt();
                let (token, h) = (self.script)(i);
                let p = probability(h);
                let (max, second) = (p.ln() as f32, (1.0 - p).ln() as f32);
                // As the published decoder computes it: its epsilon decides where an entropy equals the threshold.
                let entropy = -[p, 1.0 - p].map(|p| p * (p + 1e-8).ln()).iter().sum::<f64>() as f32;
                RowStat { argmax: token, token, max, lse: 0.0, entropy, second }
            };
            found.push(pass.wanted.iter().map(one).collect());
        }
        Ok(found)
    }
}

/// The intended token of position i, and its entropy: every fourth is easy.
pub fn easy(i: usize) -> (u32, f64) {
    (10 + i as u32 % 7, if i.is_multiple_of(4) { 0.01 } else { 0.55 + 0.001 * i as f64 })
}

/// d3LLM's settings of the traces.
pub fn settings(best: bool) -> Settings {
    let choose = Choose::Threshold { by: Rank::Entropy, at: 0.5, best, every: false };
    Settings { block: 32, choose, early_stop: false, ..Settings::default() }
}

pub fn threshold(s: Settings, at: f32) -> Settings {
    let Choose::Threshold { by, best, every, .. } = s.choose else { panic!() };
    Settings { choose: Choose::Threshold { by, at, best, every }, ..s }
}

/// Decodes `tokens` masks; hears of each pass.
pub fn run(
    settings: Settings,
    shift: bool,
    tokens: usize,
    model: &mut Scripted,
    mut on: impl FnMut(&Schedule, &[Commit]),
) -> Schedule {
    let mut texts = [Schedule::new(&config(shift), settings, &[1; PROMPT], tokens).unwrap()];
    decode(model, &mut texts, &mut |_, s, c| {
        on(s, c);
        Ok(())
    })
    .unwrap();
    let [text] = texts;
    text
}
