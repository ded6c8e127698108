//! Which task a request belongs to, by features of the frozen model that need no label.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// Centroids of the features of each task's training examples, one for the task or one for each kind of example in it, and how far
/// examples scatter around their own in each dimension. Distances divide by the scatter of all together, so that a dimension counts by
/// how well it tells tasks apart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Router {
    centroids: Vec<Vec<f32>>,
    /// The task of each centroid.
    tasks: Vec<usize>,
    /// Sum over all examples of squared deviations from their centroid, by dimension.
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
        ensure!(same, Shape, "features of different lengths");
        let fits = kinds.is_empty() || kinds.len() == features.len();
        ensure!(fits, Shape, "{} kinds of {} examples", kinds.len(), features.len());
        let task = self.tasks();
        let kind = |i: usize| kinds.get(i).copied().unwrap_or(0);
        let mut all: Vec<usize> = (0..features.len()).map(kind).collect();
        all.sort_unstable();
        all.dedup();
        self.scatter.resize(d, 0.0);
        for own in all {
            let mine: Vec<&Vec<f32>> = (0..features.len()).filter(|&i| kind(i) == own).map(|i| &features[i]).collect();
            let mut mean = vec![0.0f64; d];
            for f in &mine {
                mean.iter_mut().zip(*f).for_each(|(m, x)| *m += f64::from(*x) / mine.len() as f64);
            }
            for f in &mine {
                let squares = f.iter().zip(&mean).map(|(x, m)| (f64::from(*x) - m).powi(2));
                self.scatter.iter_mut().zip(squares).for_each(|(s, x)| *s += x);
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

    /// Squared distance to each task's nearest centroid, in units of the scatter, per dimension.
    pub fn distances(&self, feature: &[f32]) -> Vec<f64> {
        let (d, n) = (feature.len().max(1) as f64, self.examples.max(1) as f64);
        let floor = self.scatter.iter().sum::<f64>() / (n * d) * 1e-3 + 1e-12;
        let mut nearest = vec![f64::INFINITY; self.tasks()];
        for (c, &task) in self.centroids.iter().zip(&self.tasks) {
            let parts = c.iter().zip(feature).zip(&self.scatter);
            let square = |((c, x), s): ((&f32, &f32), &f64)| (f64::from(*x) - f64::from(*c)).powi(2) / (s / n + floor);
            nearest[task] = nearest[task].min(parts.map(square).sum::<f64>() / d);
        }
        nearest
    }

    /// The nearest task, the lowest among equals, and the margin to the next: 0 where two are equally near, 1 where the others are
    /// infinitely farther.
    ///
    /// # Errors
    /// A router that knows no task, a feature of another length.
    pub fn route(&self, feature: &[f32]) -> Result<(usize, f64)> {
        let width = self.width();
        let fits = width > 0 && feature.len() == width;
        ensure!(fits, Shape, "a feature of {} values for a router of {width}", feature.len());
        let d = self.distances(feature);
        let best = (0..d.len()).min_by(|&a, &b| d[a].total_cmp(&d[b])).unwrap_or(0);
        let next = (0..d.len()).filter(|&k| k != best).map(|k| d[k]).fold(f64::INFINITY, f64::min);
        Ok((best, if next.is_finite() && next > 0.0 { 1.0 - d[best] / next } else { f64::from(next > 0.0) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn dimensions_count_by_how_well_they_tell_tasks_apart() {
        let mut rng = Rng::new(3);
        // The first dimension is loud and says nothing; the second is quiet and says all.
        let mut prompts = |task: f32, n: usize| -> Vec<Vec<f32>> {
            (0..n).map(|_| vec![10.0 * rng.normal(), task + 0.1 * rng.normal()]).collect()
        };
        let mut router = Router::default();
        router.add(&prompts(0.0, 50), &[]).unwrap();
        router.add(&prompts(1.0, 50), &[]).unwrap();
        for task in 0..2 {
            let right = prompts(task as f32, 100).iter().filter(|f| router.route(f).unwrap().0 == task).count();
            assert!(right >= 99, "{right} of 100");
        }
        assert!(
            router.route(&[0.0]).is_err() && router.add(&[vec![1.0]], &[]).is_err() && router.add(&[], &[]).is_err()
        );
        assert!(Router::default().route(&[]).is_err());
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
        let right = |r: &Router| both.iter().filter(|f| r.route(f).unwrap().0 == 0).count();
        assert!(right(&two) == 40 && right(&one) < 30, "{} {}", right(&two), right(&one));
        assert!((0..20).all(|i| two.route(&middle[i]).unwrap().0 == 1));
        assert!(two.add(&middle, &[1]).is_err());
    }
}
