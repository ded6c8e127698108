//! Pseudo-trajectories: in which order a teacher unmasks, as one rank for each position of an answer.

use serde::{Deserialize, Serialize};

/// How a teacher answered a prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trajectory {
    /// Which example of the data.
    pub example: usize,
    /// The teacher's answer, padding included.
    pub text: Vec<u32>,
    /// For each of its positions the step, from 0 on, at which it stopped being a mask. Counted from the start of the answer, so that
    /// it does not matter how the prompt was written.
    pub ranks: Vec<u32>,
    /// Whether the answer is that of the data.
    pub correct: bool,
}

impl Trajectory {
    /// Whether position `i` is a mask when `decoded` tokens are not. Positions that the teacher never had are.
    pub fn is_masked(&self, i: usize, decoded: usize) -> bool {
        self.ranks.get(i).is_none_or(|&r| r as usize >= decoded)
    }
}

/// Ranks by how easily an autoregressive model says each token of an answer: by its negative log-likelihood, ascending, block after
/// block (TRIMS 2026, arXiv:2604.00666). One causal pass in place of a teacher's many.
pub fn by_likelihood(nll: &[f64], block: usize) -> Vec<u32> {
    let mut ranks = vec![0; nll.len()];
    for (b, part) in nll.chunks(block.max(1)).enumerate() {
        let first = b * block.max(1);
        let mut order: Vec<usize> = (0..part.len()).collect();
        order.sort_by(|&i, &j| part[i].total_cmp(&part[j]).then(i.cmp(&j)));
        order.iter().enumerate().for_each(|(rank, &i)| ranks[first + i] = (first + rank) as u32);
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelier_tokens_come_first_within_their_block() {
        assert_eq!(by_likelihood(&[0.3, 0.1, 0.2, 5.0, 4.0], 3), [2, 0, 1, 4, 3]);
        assert_eq!(by_likelihood(&[1.0, 1.0], 8), [0, 1]);
    }

    /// The published format keeps the whole text after each step; entry j has j + 1 tokens decoded.
    #[test]
    fn ranks_say_what_full_copies_say() {
        let ranks = vec![3, 0, 2, 1];
        let t = Trajectory { ranks: ranks.clone(), ..Trajectory::default() };
        let mut copies = vec![[true; 4]];
        for j in 0..4u32 {
            let mut next = copies[j as usize];
            next[ranks.iter().position(|&r| r == j).unwrap()] = false;
            copies.push(next);
        }
        for (decoded, copy) in copies.iter().enumerate() {
            assert!((0..4).all(|i| copy[i] == t.is_masked(i, decoded)), "{decoded}");
        }
        assert!(t.is_masked(4, 4));
    }
}
