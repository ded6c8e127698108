//! Which task a request belongs to, by features of the frozen model that need no label.

use nalgebra::{Cholesky, DMatrix, DVector, Dyn};
use serde::{Deserialize, Serialize};

use crate::error::{Result, bail, ensure};

/// Most values of a feature for which the router keeps how its dimensions go together; above it keeps each one's scatter alone.
const WHOLE: usize = 512;

/// Centroids of the features of each task's training examples, one for the task or one for each kind of example in it, and how examples
/// scatter around their own. Distances are Mahalanobis': a direction counts by how well it tells tasks apart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Router {
    centroids: Vec<Vec<f32>>,
    /// The task of each centroid.
    tasks: Vec<usize>,
    /// Sum over all examples of the products of deviations from their centroid: `[d, d]`, or of the squares alone, `[d]`.
    scatter: Vec<f64>,
    examples: u64,
}

impl Router {
    /// Learns the next task from the features of its examples. `kinds` says which of them have a centroid together; empty: all.
    ///
    /// # Errors
    /// No example, features of another length than those before, kinds of other examples.
    pub fn add(&mut self, features: &[Vec<f32>], kinds: &[usize]) -> Result<()> {
        ensure!(!features.is_empty(), Usage, "a task without an example to route by");
        let d = features[0].len();
        let same = features.iter().chain(self.centroids.first()).all(|f| f.len() == d);
        ensure!(same && d > 0, Shape, "features of different lengths");
        let fits = kinds.is_empty() || kinds.len() == features.len();
        ensure!(fits, Shape, "{} kinds of {} examples", kinds.len(), features.len());
        let task = self.tasks();
        let kind = |i: usize| kinds.get(i).copied().unwrap_or(0);
        let mut all: Vec<usize> = (0..features.len()).map(kind).collect();
        all.sort_unstable();
        all.dedup();
        self.scatter.resize(if d <= WHOLE { d * d } else { d }, 0.0);
        for own in all {
            let mine: Vec<&Vec<f32>> = (0..features.len()).filter(|&i| kind(i) == own).map(|i| &features[i]).collect();
            let mut mean = vec![0.0f64; d];
            for f in &mine {
                mean.iter_mut().zip(*f).for_each(|(m, x)| *m += f64::from(*x) / mine.len() as f64);
            }
            for f in &mine {
                let away: Vec<f64> = f.iter().zip(&mean).map(|(x, m)| f64::from(*x) - m).collect();
                if d <= WHOLE {
                    let rows = self.scatter.chunks_exact_mut(d).zip(&away);
                    rows.for_each(|(row, x)| row.iter_mut().zip(&away).for_each(|(s, y)| *s += x * y));
                } else {
                    self.scatter.iter_mut().zip(&away).for_each(|(s, x)| *s += x * x);
                }
            }
            self.centroids.push(mean.iter().map(|m| *m as f32).collect());
            self.tasks.push(task);
        }
        self.examples += features.len() as u64;
        Ok(())
    }

    /// Values of a feature; 0 before the first task.
    pub fn width(&self) -> usize {
        self.centroids.first().map_or(0, Vec::len)
    }

    /// Tasks that it knows.
    pub fn tasks(&self) -> usize {
        self.tasks.last().map_or(0, |t| t + 1)
    }

    /// Refuses what [`Router::add`] cannot have made.
    ///
    /// # Errors
    /// `Config`, saying what is wrong.
    pub fn check(&self) -> Result<()> {
        let (d, n) = (self.width(), self.centroids.len());
        let rising = self.tasks.first() == Some(&0) && self.tasks.windows(2).all(|w| w[1] == w[0] || w[1] == w[0] + 1);
        ensure!(d > 0 && self.tasks.len() == n && rising, Config, "centroids of tasks {:?}", self.tasks);
        let whole = d <= WHOLE;
        let widths = self.centroids.iter().all(|c| c.len() == d) && self.scatter.len() == if whole { d * d } else { d };
        ensure!(widths && self.examples > 0, Config, "centroids or scatter of other widths than {d}");
        let numbers =
            self.centroids.iter().flatten().all(|x| x.is_finite()) && self.scatter.iter().all(|x| x.is_finite());
        let own = |i: usize| self.scatter[if whole { i * (d + 1) } else { i }];
        ensure!(numbers && (0..d).all(|i| own(i) >= 0.0), Config, "centroids or scatter that are no numbers");
        Ok(())
    }

    /// The router with its metric worked out, for many features.
    ///
    /// # Errors
    /// A router that knows no task, or was damaged.
    pub fn ready(&self) -> Result<Ready> {
        self.check()?;
        let (d, n) = (self.width(), self.examples as f64);
        let whole = d <= WHOLE;
        let own = |i: usize| self.scatter[if whole { i * (d + 1) } else { i }] / n;
        let floor = (0..d).map(own).sum::<f64>() / d as f64 * 1e-3 + 1e-12;
        if !whole {
            let metric = Metric::Diagonal((0..d).map(|i| own(i) + floor).collect());
            return Ok(Ready { router: self.clone(), metric });
        }
        // Products between dimensions are estimated from few examples: the fewer, the less they count.
        let trust = n / (n + d as f64);
        let at = |i: usize, j: usize| match i == j {
            true => own(i) + floor,
            false => trust * self.scatter[i * d + j] / n,
        };
        let Some(cholesky) = DMatrix::from_fn(d, d, at).cholesky() else {
            bail!(Config, "a scatter that no features have");
        };
        Ok(Ready { router: self.clone(), metric: Metric::Whole(cholesky) })
    }
}

enum Metric {
    Diagonal(Vec<f64>),
    Whole(Cholesky<f64, Dyn>),
}

/// [`Router::ready`].
pub struct Ready {
    router: Router,
    metric: Metric,
}

impl Ready {
    /// Squared distance to each task's nearest centroid, per dimension.
    ///
    /// # Errors
    /// A feature of another length.
    pub fn distances(&self, feature: &[f32]) -> Result<Vec<f64>> {
        let (d, width) = (feature.len(), self.router.width());
        ensure!(d == width, Shape, "a feature of {d} values for a router of {width}");
        let mut nearest = vec![f64::INFINITY; self.router.tasks()];
        for (c, &task) in self.router.centroids.iter().zip(&self.router.tasks) {
            let away = c.iter().zip(feature).map(|(c, x)| f64::from(*x) - f64::from(*c));
            let square = match &self.metric {
                Metric::Diagonal(s) => away.zip(s).map(|(x, s)| x * x / s).sum::<f64>(),
                Metric::Whole(cholesky) => {
                    let away = DVector::from_iterator(d, away);
                    cholesky.l_dirty().solve_lower_triangular(&away).map_or(f64::INFINITY, |y| y.norm_squared())
                }
            };
            nearest[task] = nearest[task].min(square / d as f64);
        }
        Ok(nearest)
    }

    /// The nearest task, the lowest among equals, and the margin to the next: 0 where two are equally near, 1 where the others are
    /// infinitely farther.
    ///
    /// # Errors
    /// As [`Ready::distances`].
    pub fn route(&self, feature: &[f32]) -> Result<(usize, f64)> {
        let d = self.distances(feature)?;
        let best = (0..d.len()).min_by(|&a, &b| d[a].total_cmp(&d[b])).unwrap_or(0);
        let next = (0..d.len()).filter(|&k| k != best).map(|k| d[k]).fold(f64::INFINITY, f64::min);
        Ok((best, if next.is_finite() && next > 0.0 { 1.0 - d[best] / next } else { f64::from(next > 0.0) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn task(r: &Router, f: &[f32]) -> usize {
        r.ready().unwrap().route(f).unwrap().0
    }

    #[test]
    fn dimensions_count_by_how_well_they_tell_tasks_apart() {
        // With many dimensions each has its own scatter, with few all go together.
        for quiet in [1, 700] {
            let mut rng = Rng::new(3);
            // The first dimension is loud and says nothing; the second is quiet and says all.
            let mut prompts = |task: f32, n: usize| -> Vec<Vec<f32>> {
                let one = |_| {
                    let mut f = vec![10.0 * rng.normal(), task + 0.03 * rng.normal()];
                    f.extend((0..quiet).map(|_| rng.normal()));
                    f
                };
                (0..n).map(one).collect()
            };
            let mut router = Router::default();
            router.add(&prompts(0.0, 50), &[]).unwrap();
            router.add(&prompts(1.0, 50), &[]).unwrap();
            for own in 0..2 {
                let right = prompts(own as f32, 100).iter().filter(|f| task(&router, f) == own).count();
                assert!(right >= 95, "{right} of 100, {quiet} more dimensions");
            }
            assert!(router.ready().unwrap().route(&[0.0]).is_err());
            assert!(router.add(&[vec![1.0]], &[]).is_err() && router.add(&[], &[]).is_err());
        }
        assert!(Router::default().ready().is_err());
    }

    #[test]
    fn what_was_damaged_is_refused() {
        let mut good = Router::default();
        good.add(&[vec![0.0, 1.0], vec![1.0, 0.5]], &[]).unwrap();
        good.add(&[vec![2.0, 1.0], vec![3.0, 0.5]], &[]).unwrap();
        good.ready().unwrap();
        let bad = |change: &dyn Fn(&mut Router)| {
            let mut r = good.clone();
            change(&mut r);
            r.ready().err().map(|e| e.kind())
        };
        let config = Some(crate::error::ErrorKind::Config);
        assert_eq!(bad(&|r| r.tasks = vec![5, 0]), config);
        assert_eq!(bad(&|r| r.tasks = vec![1, 2]), config);
        assert_eq!(bad(&|r| r.centroids[1] = vec![1.0]), config);
        assert_eq!(bad(&|r| r.scatter[0] = -1.0), config);
        assert_eq!(bad(&|r| r.centroids[0][0] = f32::NAN), config);
        assert_eq!(bad(&|r| r.scatter = vec![1.0, 100.0, 100.0, 1.0]), config);
        assert_eq!(bad(&|r| r.examples = 0), config);
    }

    #[test]
    fn directions_count_too() {
        let mut rng = Rng::new(5);
        // Loud along the diagonal, told apart across it: neither dimension alone says much.
        let mut prompts = |across: f32, n: usize| -> Vec<Vec<f32>> {
            let one = |_| {
                let (along, across) = (5.0 * rng.normal(), across + 0.1 * rng.normal());
                vec![along + across, along - across]
            };
            (0..n).map(one).collect()
        };
        let mut router = Router::default();
        router.add(&prompts(-0.5, 100), &[]).unwrap();
        router.add(&prompts(0.5, 100), &[]).unwrap();
        let right = prompts(0.5, 100).iter().filter(|f| task(&router, f) == 1).count();
        assert!(right >= 95, "{right}");
    }

    #[test]
    fn a_task_of_several_kinds_has_several_centroids() {
        let mut rng = Rng::new(4);
        // Two kinds on both sides of the other task: their common mean would lie in it.
        let mut at = |x: f32, n: usize| -> Vec<Vec<f32>> { (0..n).map(|_| vec![x + 0.1 * rng.normal()]).collect() };
        let (mut both, kinds) = (at(-1.0, 20), [vec![3; 20], vec![7; 20]].concat());
        both.extend(at(1.0, 20));
        let (mut one, mut two) = (Router::default(), Router::default());
        let middle = at(0.0, 20);
        two.add(&both, &kinds).unwrap();
        one.add(&both, &[]).unwrap();
        two.add(&middle, &[]).unwrap();
        one.add(&middle, &[]).unwrap();
        let right = |r: &Router| both.iter().filter(|f| task(r, f) == 0).count();
        assert!(right(&two) == 40 && right(&one) < 30, "{} {}", right(&two), right(&one));
        assert!((0..20).all(|i| task(&two, &middle[i]) == 1));
        assert!(two.add(&middle, &[1]).is_err());
    }
}
