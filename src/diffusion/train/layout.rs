//! Noisy sequences to the rows of a training pass: who sees whom, and which row predicts which position.

use crate::backend::Visible;
use crate::error::{Result, ensure};
use crate::model::Pass;
use crate::model::config::{Diffusion, ModelConfig};
use crate::rng::Key;
use crate::train::Batch;

/// A sequence of a batch with some of its answer masked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Noisy {
    /// Clean tokens.
    pub clean: Vec<u32>,
    /// First position that is not the prompt.
    pub start: usize,
    /// Tokens with masks.
    pub noisy: Vec<u32>,
    /// Positions that have a loss, ascending.
    pub learn: Vec<usize>,
}

/// A sequence of a batch: its tokens, and where its answer starts.
pub(super) fn sequences(batch: &Batch) -> impl Iterator<Item = Result<(&[u32], usize)>> {
    let (mut first, mut labels) = (0, batch.labels.as_slice());
    batch.lens.iter().map(move |&n| {
        let mine = labels.partition_point(|l| (l.0 as usize) < first + n);
        let (own, rest) = labels.split_at(mine);
        labels = rest;
        let tokens = &batch.tokens[first..first + n];
        // Labels are counted by the row that predicts them.
        let start = own.first().map_or(n, |l| l.0 as usize + 1 - first);
        first += n;
        ensure!(
            own.len() == n - start,
            Usage,
            "a diffusion model learns whole answers: a sequence has gaps in what is learnt"
        );
        Ok((tokens, start))
    })
}

/// The pass over `sequences` and the label of each of its wanted rows. `see` is the probability with which a row sees each later one, drawn by
/// the key for all sequences alike: below 1 it leads from causal to full attention (Gong et al. 2024, arXiv:2410.17891).
///
/// With blocks a sequence is laid out twice, clean and, its answer, noisy: a noisy row sees its own noisy block and clean rows of the
/// blocks before, so that one pass trains all blocks as decoding will see them (Arriola et al. 2025, arXiv:2503.09573).
///
/// # Errors
/// A shifted model without a prompt; tokens outside the vocabulary.
pub fn layout(cfg: &ModelConfig, model: Diffusion, sequences: &[Noisy], see: (f64, Key)) -> Result<(Pass, Vec<u32>)> {
    let (mut tokens, mut positions, mut visible) = (Vec::new(), Vec::new(), Visible::new());
    let (mut wanted, mut labels) = (Vec::new(), Vec::new());
    let shift = usize::from(model.shift);
    for s in sequences {
        let (first, n) = (tokens.len(), s.clean.len());
        ensure!(
            s.start >= shift,
            Usage,
            "a sequence without a prompt: its first token has nothing to be predicted from"
        );
        labels.extend(s.learn.iter().map(|&i| s.clean[i]));
        match model.block {
            None => {
                tokens.extend(&s.noisy);
                positions.extend(0..n as u32);
                for i in 0..n {
                    visible.push(&ranges(first, i, n, see))?;
                }
                wanted.extend(s.learn.iter().map(|&i| (first + i - shift) as u32));
            }
            Some(block) => {
                let begin = |i: usize| if i < s.start { 0 } else { s.start + (i - s.start) / block * block };
                let end = |i: usize| if i < s.start { s.start } else { n.min(begin(i) + block) };
                let noisy = first + n;
                tokens.extend(s.clean.iter().chain(&s.noisy[s.start..]));
                positions.extend((0..n as u32).chain(s.start as u32..n as u32));
                for i in 0..n {
                    visible.push(&[[first as u32, (first + end(i)) as u32]])?;
                }
                for i in s.start..n {
                    let own = [begin(i), end(i)].map(|p| (noisy + p - s.start) as u32);
                    let before = [first, first + begin(i)].map(|p| p as u32);
                    let ranges = [before, own];
                    visible.push(if before[0] == before[1] { &ranges[1..] } else { &ranges })?;
                }
                wanted.extend(s.learn.iter().map(|&i| {
                    // The row before a block is a clean one, as in decoding.
                    let row = if shift == 1 && begin(i) == i { first + i - 1 } else { noisy + i - shift - s.start };
                    row as u32
                }));
            }
        }
    }
    Ok((Pass::new(cfg, tokens, positions, visible, wanted)?, labels))
}

/// What row `i` of a sequence of `n` rows from `first` on sees.
fn ranges(first: usize, i: usize, n: usize, (see, key): (f64, Key)) -> Vec<[u32; 2]> {
    if see >= 1.0 {
        return vec![[first as u32, (first + n) as u32]];
    }
    let mut out = vec![[first as u32, (first + i + 1) as u32]];
    for j in i + 1..n {
        if key.at(((i as u64) << 32) | j as u64).uniform() < see {
            let at = (first + j) as u32;
            match out.last_mut() {
                Some(r) if r[1] == at => r[1] += 1,
                _ => out.push([at, at + 1]),
            }
        }
    }
    out
}
