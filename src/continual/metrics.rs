//! What a stream of tasks left behind: the matrix of scores, and the field's measures of it, each by its convention's name.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// Score on task j after training through task i, `rows[i][j]`, j <= i, in \[0, 1\].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// A row for each task learnt.
    pub rows: Vec<Vec<f64>>,
    /// Scores of the model before the first task, on every task; for forward transfer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub untrained: Vec<f64>,
}

/// All measures of a matrix. Undefined ones (of a single task) are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Mean of the last row ("OP", "ACC").
    pub average: f64,
    /// Mean over the earlier tasks of last minus first score: negative where something was forgotten (Lopez-Paz & Ranzato 2017).
    pub bwt: f64,
    /// The sign and divisor of the TreeLoRA paper: mean over **all** tasks of first minus last score: positive where something was
    /// forgotten.
    pub bwt_paper: f64,
    /// What the released script of that paper prints: gains count as 0, divided by all tasks.
    pub bwt_clipped: f64,
    /// Mean over the earlier tasks of the best score that any earlier row had, minus the last (Chaudhry et al. 2018).
    pub forgetting: f64,
    /// Mean of the diagonal: what was learnt at all.
    pub learning: f64,
    /// Mean over the rows of each row's mean.
    pub incremental: f64,
    /// Mean of all cells with equal weight, as the released script has it.
    pub all_cells: f64,
    /// Mean over the later tasks of the score just before a task is learnt minus that of the untrained model; where rows are whole
    /// squares and the untrained scores are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forward: Option<f64>,
}

impl Scores {
    /// All measures.
    ///
    /// # Errors
    /// A matrix without rows, or row i with fewer than i + 1 scores.
    pub fn measures(&self) -> Result<Measures> {
        let n = self.rows.len();
        ensure!(n > 0, Usage, "no task was learnt");
        for (i, row) in self.rows.iter().enumerate() {
            ensure!(row.len() > i, Shape, "row {i} of the scores has {} entries, of {}", row.len(), i + 1);
        }
        let (r, count, before) = (&self.rows, n as f64, (n - 1).max(1) as f64);
        let last = &r[n - 1];
        let mean = |row: &[f64]| row.iter().sum::<f64>() / row.len() as f64;
        let earlier = |f: &dyn Fn(usize) -> f64| (0..n - 1).map(f).sum::<f64>();
        let drop = |j: usize| r[j][j] - last[j];
        let cells: Vec<f64> = r.iter().enumerate().flat_map(|(i, row)| row[..=i].to_vec()).collect();
        let square = r.iter().all(|row| row.len() == n) && self.untrained.len() == n && n > 1;
        Ok(Measures {
            average: mean(&last[..n]),
            bwt: -earlier(&drop) / before,
            bwt_paper: earlier(&drop) / count,
            bwt_clipped: -earlier(&|j| drop(j).max(0.0)) / count,
            forgetting: earlier(&|j| (j..n - 1).map(|l| r[l][j]).fold(f64::MIN, f64::max) - last[j]) / before,
            learning: (0..n).map(|j| r[j][j]).sum::<f64>() / count,
            incremental: r.iter().enumerate().map(|(i, row)| mean(&row[..=i])).sum::<f64>() / count,
            all_cells: mean(&cells),
            forward: square.then(|| (1..n).map(|j| r[j - 1][j] - self.untrained[j]).sum::<f64>() / before),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} {b}");
    }

    #[test]
    fn a_matrix_by_hand() {
        let s = Scores { rows: vec![vec![0.9], vec![0.5, 0.8], vec![0.6, 0.9, 0.7]], untrained: Vec::new() };
        let m = s.measures().unwrap();
        near(m.average, 2.2 / 3.0);
        near(m.bwt, (-0.3 + 0.1) / 2.0);
        near(m.bwt_paper, 0.2 / 3.0);
        near(m.bwt_clipped, -0.1);
        near(m.forgetting, (0.3 - 0.1) / 2.0);
        near(m.learning, 0.8);
        near(m.incremental, (0.9 + 0.65 + 2.2 / 3.0) / 3.0);
        near(m.all_cells, 4.4 / 6.0);
        assert_eq!(m.forward, None);
    }

    #[test]
    fn forward_transfer_needs_the_square() {
        let s = Scores { rows: vec![vec![0.9, 0.4], vec![0.5, 0.8]], untrained: vec![0.1, 0.25] };
        near(s.measures().unwrap().forward.unwrap(), 0.15);
    }

    #[test]
    fn one_task_forgets_nothing_and_none_is_refused() {
        let one = Scores { rows: vec![vec![0.7]], ..Scores::default() }.measures().unwrap();
        assert_eq!((one.average, one.bwt, one.forgetting), (0.7, 0.0, 0.0));
        assert!(Scores::default().measures().is_err());
        assert!(Scores { rows: vec![vec![]], ..Scores::default() }.measures().is_err());
    }
}
