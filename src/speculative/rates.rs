//! [`Rates`]: how often lookup has been right.

/// Trials after which older ones count half.
const KEPT: f32 = 128.0;
/// Trials that the prior counts as.
const PRIOR: f32 = 4.0;
/// Match lengths from which on the next rate holds, and how often the prior has the next token among the continuations.
const PRIORS: [(usize, f32); 8] = [(1, 0.2), (2, 0.35), (3, 0.5), (4, 0.6), (5, 0.7), (7, 0.8), (11, 0.87), (21, 0.93)];
/// How often a match was seen: once, twice, more often.
const SEEN: usize = 3;
/// Where the match is: in the text itself, in the memory.
const PLACES: usize = 2;

/// How often the token that came was among those that had followed a match.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rate {
    hits: f32,
    trials: f32,
}

/// Rates by place, length, and how often the match was seen.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rates([Rate; PLACES * PRIORS.len() * SEEN]);

/// One of them.
pub(super) type Slot = usize;

impl Default for Rates {
    /// The prior.
    fn default() -> Self {
        let prior = |slot: Slot| PRIORS[slot / SEEN % PRIORS.len()].1 * PRIOR;
        Self(std::array::from_fn(|slot| Rate { hits: prior(slot), trials: PRIOR }))
    }
}

impl Rates {
    /// Bytes of [`Rates::to_bytes`].
    pub const BYTES: usize = 8 * PLACES * PRIORS.len() * SEEN;

    /// What holds for a match of `len` tokens, at least one, that was seen `seen` times, at least once.
    pub fn slot(place: usize, len: usize, seen: usize) -> Slot {
        let length = PRIORS.partition_point(|(from, _)| *from <= len) - 1;
        (place * PRIORS.len() + length) * SEEN + seen.min(SEEN) - 1
    }

    pub fn get(&self, slot: Slot) -> f32 {
        let Rate { hits, trials } = self.0[slot];
        // Certainty would leave nothing for shorter matches.
        (hits / trials).min(0.99)
    }

    pub fn learn(&mut self, slot: Slot, hit: bool) {
        let rate = &mut self.0[slot];
        if rate.trials >= KEPT {
            *rate = Rate { hits: rate.hits / 2.0, trials: rate.trials / 2.0 };
        }
        *rate = Rate { hits: rate.hits + f32::from(u8::from(hit)), trials: rate.trials + 1.0 };
    }

    pub fn to_bytes(&self) -> impl Iterator<Item = u8> {
        self.0.iter().flat_map(|r| [r.hits, r.trials]).flat_map(f32::to_le_bytes)
    }

    /// Of [`Rates::BYTES`] bytes; `None` where they mean nothing.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (mut rates, (each, _)) = (Self::default(), bytes.as_chunks::<8>());
        for (rate, b) in rates.0.iter_mut().zip(each) {
            let [hits, trials] = [0, 4].map(|at| f32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]));
            *rate = Rate { hits, trials };
        }
        let good = |r: &Rate| r.hits >= 0.0 && r.hits <= r.trials && (1.0..=KEPT).contains(&r.trials);
        (bytes.len() == Self::BYTES && rates.0.iter().all(good)).then_some(rates)
    }
}
