//! A draft of a few numbers, whose loss is a parabola: what a learner does with it is known in closed form.

use quadriga::backend::Buffer;
use quadriga::backend::naive::Naive;
use quadriga::model::Param;
use quadriga::speculative::Lookup;
use quadriga::speculative::train::{Measured, Sequence};

use super::*;

/// What the toy is asked, and what it is to answer.
#[derive(Default)]
pub struct Script {
    /// Minimum of the loss.
    pub target: f32,
    /// Where passes of the target would be long.
    pub goal: f32,
    /// Rows of a pass.
    pub rows: usize,
    /// All sequences it has learnt from.
    pub seen: Vec<Sequence>,
}

pub struct Toy<B: Train> {
    be: Arc<B>,
    w: Param<B>,
    script: Arc<Mutex<Script>>,
}

impl<B: Train> Trainable<B> for Toy<B> {
    fn params(&self) -> Vec<&Param<B>> {
        vec![&self.w]
    }
    fn params_mut(&mut self) -> Vec<&mut Param<B>> {
        vec![&mut self.w]
    }
    fn refresh(&mut self) -> Result<()> {
        Ok(())
    }
    fn pass(&mut self, sequences: &[&Sequence], learn: bool) -> Result<Measured> {
        let mut script = self.script.lock().unwrap();
        let n = self.w.len();
        let mut w = vec![0.0; n];
        self.be.download_acc(self.w.w.head(n), &mut w)?;
        let right = if (w[0] - script.goal).abs() < 0.9 { 90 } else { 10 };
        if learn {
            script.seen.extend(sequences.iter().map(|&s| s.clone()));
            let g: Vec<f32> = w.iter().map(|w| w - script.target).collect();
            if script.rows > 0 {
                self.be.upload_acc(self.w.g.as_mut().unwrap().head_mut(n), &g)?;
            }
        }
        let loss = 0.5 * f64::from(w[0] - script.target).powi(2);
        Ok(Measured { loss, rows: script.rows, asked: vec![100], right: vec![right] })
    }
    fn to_host(&self) -> Result<Vec<NamedTensor>> {
        let mut w = vec![0.0; self.w.len()];
        self.be.download_acc(self.w.w.head(w.len()), &mut w)?;
        Ok(vec![("w".into(), vec![w.len()], w)])
    }
}

/// A class of `n` numbers, all 0 in the beginning, at a text's place `taps`.
pub fn class<B: Train>(world: &World<B>, how: &Learning, n: usize) -> (Class<B>, Arc<Mutex<Script>>) {
    let script = Arc::new(Mutex::new(Script { target: 1.0, goal: 0.0, rows: 1, ..Script::default() }));
    let be = world.model.device().clone();
    let mut w = Param::new(&*be, "w".into(), [1, n], &vec![0.0; n]).unwrap();
    w.train(&be, true).unwrap();
    let toy = Toy { be, w, script: script.clone() };
    let lookup = || -> Make<B> { Box::new(|| Box::new(Lookup::default())) };
    let make: Maker<B> = Arc::new(move |_| Ok(lookup()));
    (Class::new(&world.model, Box::new(toy), make(&[]).unwrap(), make, how), script)
}

pub fn naive() -> World<Naive> {
    World::new(Naive)
}

/// Plain settings of a rule: rate 0.1, nothing clipped, a version watched for 32 passes.
pub fn plain(rule: &str) -> Learning {
    let mut how = Learning { guard: (32, 0.15), replay: 0.0, ..eager(rule) };
    (how.optimizer.lr, how.optimizer.clip) = (0.1, 0.0);
    how.rows = 1 << 20; // Updates are asked for.
    how
}

/// The first number after each of these targets' updates; every version proves good.
pub fn follow(how: &Learning, targets: &[f32]) -> Vec<f32> {
    let world = naive();
    let how = Learning { guard: (1, 1e9), ..how.clone() };
    let (class, script) = class(&world, &how, 3);
    let step = |&target: &f32| {
        script.lock().unwrap().target = target;
        class.with(|l| l.update().unwrap());
        pulse(&world, &class, 2);
        class.newest().first().copied().unwrap_or(0.0)
    };
    targets.iter().map(step).collect()
}
