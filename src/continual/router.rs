//! Which task a request belongs to, by features of the frozen model that need no label.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// Mean features of each task's training prompts, and how far its own prompts scatter around it in each dimension. Distances
/// divide by the scatter of all tasks together, so that a dimension counts by how well it tells tasks apart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Router {
    /// One for each task.
    pub centroids: Vec<Vec<f32>>,
    /// Sum over all prompts of squared deviations from their task's centroid, by dimension.
    scatter: Vec<f64>,
    prompts: u64,
}

impl Router {
    /// Learns a task from the features of its prompts.
    ///
    /// # Errors
    /// No prompt, or features of another length than those before.
    pub fn add(&mut self, features: &[Vec<f32>]) -> Result<()> {
        ensure!(!features.is_empty(), Usage, "a task without a prompt to route by");
        let d = features[0].len();
        let same = features.iter().chain(self.centroids.first()).all(|f| f.len() == d);
        ensure!(same, Shape, "features of different lengths");
        let mut mean = vec![0.0f64; d];
        for f in features {
            mean.iter_mut().zip(f).for_each(|(m, x)| *m += f64::from(*x) / features.len() as f64);
        }
        self.scatter.resize(d, 0.0);
        for f in features {
            let squares = f.iter().zip(&mean).map(|(x, m)| (f64::from(*x) - m).powi(2));
            self.scatter.iter_mut().zip(squares).for_each(|(s, x)| *s += x);
        }
        self.prompts += features.len() as u64;
        self.centroids.push(mean.iter().map(|m| *m as f32).collect());
        Ok(())
    }

    /// Squared distance to each task's centroid, in units of the scatter, per dimension.
    pub fn distances(&self, feature: &[f32]) -> Vec<f64> {
        let (d, n) = (feature.len().max(1) as f64, self.prompts.max(1) as f64);
        let floor = self.scatter.iter().sum::<f64>() / (n * d) * 1e-3 + 1e-12;
        let of = |c: &Vec<f32>| {
            let parts = c.iter().zip(feature).zip(&self.scatter);
            parts.map(|((c, x), s)| (f64::from(*x) - f64::from(*c)).powi(2) / (s / n + floor)).sum::<f64>() / d
        };
        self.centroids.iter().map(of).collect()
    }

    /// The nearest task, the lowest among equals, and the margin to the next: 0 where two are equally near, 1 where the others are
    /// infinitely farther.
    ///
    /// # Errors
    /// A router that knows no task, a feature of another length.
    pub fn route(&self, feature: &[f32]) -> Result<(usize, f64)> {
        let width = self.centroids.first().map_or(0, Vec::len);
        ensure!(
            width > 0 && feature.len() == width,
            Shape,
            "a feature of {} values for a router of {width}",
            feature.len()
        );
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
        router.add(&prompts(0.0, 50)).unwrap();
        router.add(&prompts(1.0, 50)).unwrap();
        for task in 0..2 {
            let right = prompts(task as f32, 100).iter().filter(|f| router.route(f).unwrap().0 == task).count();
            assert!(right >= 99, "{right} of 100");
        }
        assert!(router.route(&[0.0]).is_err() && router.add(&[vec![1.0]]).is_err() && router.add(&[]).is_err());
        assert!(Router::default().route(&[]).is_err());
    }
}
