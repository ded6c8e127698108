//! Examples to batches: shuffled by seed and epoch, packed, from any place in the run.

use serde::{Deserialize, Serialize};

use super::Example;
use crate::error::{Result, ensure};
use crate::rng::Rng;

/// Random numbers of a seed that decide the order of examples: one stream for each epoch from here on.
const SHUFFLE: u64 = 0x5348_5546 << 32;
/// Batches that are filled at the same time. More would fill them hardly better and mix the order up.
const OPEN: usize = 16;

/// Limits of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packing {
    /// Most tokens.
    pub rows: usize,
    /// Most sequences.
    pub sequences: usize,
}

/// A place in the run: the batch that comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Times that the data was seen in full.
    pub epoch: u64,
    /// Batches of this epoch that are done.
    pub position: u64,
}

/// What a batch takes whole: one sequence, or several that stay together.
pub trait Row {
    /// Tokens of all its sequences.
    fn tokens(&self) -> usize;

    /// Puts its sequences behind those of `batch`.
    fn add_to(&self, batch: &mut Batch);
}

impl Row for Example {
    fn tokens(&self) -> usize {
        self.tokens.len()
    }

    fn add_to(&self, batch: &mut Batch) {
        batch.push(&self.tokens, |i| self.loss[i]);
    }
}

/// Several sequences, one after another; a row for each token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Length of each sequence; their sum is the number of tokens.
    pub lens: Vec<usize>,
    /// Row whose logits predict, and the token that they should.
    pub labels: Vec<(u32, u32)>,
    /// Which examples of the data they are; empty where there is no data to number.
    pub ids: Vec<usize>,
}

impl Batch {
    /// The sequences of `rows` in their order.
    pub fn new<'a, R: Row + 'a>(rows: impl IntoIterator<Item = &'a R>) -> Self {
        let mut batch = Self::default();
        rows.into_iter().for_each(|r| r.add_to(&mut batch));
        batch
    }

    /// One more sequence, of which the tokens at the places that `learnt` names are labels; the first never is.
    pub fn push(&mut self, tokens: &[u32], learnt: impl Fn(usize) -> bool) {
        let first = self.tokens.len();
        let labels = (1..tokens.len()).filter(|&i| learnt(i));
        self.labels.extend(labels.map(|i| ((first + i - 1) as u32, tokens[i])));
        self.tokens.extend(tokens);
        self.lens.push(tokens.len());
    }
}

/// Divides sequences of lengths `lens`, taken in `order`, into batches: each goes to the first open batch with room for it.
/// At most 16 are open at a time; then the oldest is closed. Returns indices, batch by batch.
///
/// # Panics
/// If one is longer than a batch.
pub fn pack(lens: &[usize], order: &[usize], limits: Packing) -> Vec<Vec<usize>> {
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
    for &i in order {
        assert!(lens[i] <= limits.rows, "a sequence of {} tokens in batches of {}", lens[i], limits.rows);
        let open = batches.len().saturating_sub(OPEN);
        let fits = |b: &&mut (usize, Vec<usize>)| b.0 + lens[i] <= limits.rows && b.1.len() < limits.sequences;
        match batches[open..].iter_mut().find(fits) {
            Some(b) => {
                b.0 += lens[i];
                b.1.push(i);
            }
            None => batches.push((lens[i], vec![i])),
        }
    }
    batches.into_iter().map(|b| b.1).collect()
}

/// The endless order of sequences in a run: epoch after epoch, each packed in an order of its own.
pub struct Order {
    lens: Vec<usize>,
    limits: Packing,
    seed: Option<u64>,
    cursor: Cursor,
    plan: Vec<Vec<usize>>,
}

impl Order {
    /// Of sequences of these lengths, from `cursor` on. Without a seed every epoch is in the order given.
    ///
    /// # Errors
    /// `Usage` where there are no sequences, one does not fit into a batch, or the epoch has no such batch: the data or the
    /// limits are not those that the cursor comes from.
    pub fn new(lens: Vec<usize>, limits: Packing, seed: Option<u64>, cursor: Cursor) -> Result<Self> {
        let longest = lens.iter().max().copied().unwrap_or(0);
        ensure!(longest > 0 && limits.sequences > 0, Usage, "there is nothing to make a batch of");
        ensure!(
            longest <= limits.rows,
            Usage,
            "an example has {longest} tokens, a batch holds {}: raise --batch-tokens or lower --max-length",
            limits.rows
        );
        let mut order = Self { lens, limits, seed, cursor, plan: Vec::new() };
        order.plan = order.plan_epoch();
        let n = order.plan.len();
        ensure!(
            cursor.position < n as u64,
            Usage,
            "the run stopped at batch {} of an epoch that has {n}: not the same data or batch size",
            cursor.position
        );
        Ok(order)
    }

    /// The place of the next batch.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Batches of the current epoch.
    pub fn in_epoch(&self) -> usize {
        self.plan.len()
    }

    fn plan_epoch(&self) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.lens.len()).collect();
        if let Some(seed) = self.seed {
            Rng::stream(seed, SHUFFLE.wrapping_add(self.cursor.epoch)).shuffle(&mut order);
        }
        pack(&self.lens, &order, self.limits)
    }
}

impl Iterator for Order {
    type Item = Vec<usize>;

    /// Which sequences the next batch has. Never `None`.
    fn next(&mut self) -> Option<Vec<usize>> {
        let batch = std::mem::take(&mut self.plan[self.cursor.position as usize]);
        self.cursor.position += 1;
        if self.cursor.position == self.plan.len() as u64 {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, position: 0 };
            self.plan = self.plan_epoch();
        }
        Some(batch)
    }
}

/// The endless sequence of batches of a run.
pub struct Batches<'a, R = Example> {
    rows: &'a [R],
    order: Order,
}

impl<'a, R: Row> Batches<'a, R> {
    /// Batches of `rows` from `cursor` on, in the [`Order`] of a seed.
    ///
    /// # Errors
    /// As [`Order::new`].
    pub fn new(rows: &'a [R], limits: Packing, seed: Option<u64>, cursor: Cursor) -> Result<Self> {
        let lens = rows.iter().map(Row::tokens).collect();
        Ok(Self { rows, order: Order::new(lens, limits, seed, cursor)? })
    }

    /// Every row once, in the order given.
    ///
    /// # Errors
    /// As [`Order::new`]; nothing is wrong with no rows.
    pub fn once(rows: &'a [R], limits: Packing) -> Result<Vec<Batch>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let batches = Self::new(rows, limits, None, Cursor::default())?;
        let n = batches.in_epoch();
        Ok(batches.take(n).collect())
    }

    /// The place of the next batch.
    pub fn cursor(&self) -> Cursor {
        self.order.cursor
    }

    /// Batches of the current epoch.
    pub fn in_epoch(&self) -> usize {
        self.order.in_epoch()
    }
}

impl<R: Row> Iterator for Batches<'_, R> {
    type Item = Batch;

    /// Never `None`.
    fn next(&mut self) -> Option<Batch> {
        let batch = self.order.next()?;
        let sequences = Batch::new(batch.iter().map(|&i| &self.rows[i]));
        Some(Batch { ids: batch, ..sequences })
    }
}
