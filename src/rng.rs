//! Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same stream on every backend and thread count.
//!
//! A draw is a pure function of (seed, stream, counter), so a kernel can make the very number that the host would.

/// Ten rounds of Philox4x32 on one counter block.
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut k, mut c) = (key, counter);
    for _ in 0..10 {
        let a = 0xD251_1F53_u64 * c[0] as u64;
        let b = 0xCD9E_8D57_u64 * c[2] as u64;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// A place among all random numbers: one block of a seed's stream. Whoever draws by keys needs no state, and draws the same
/// whatever is computed beside it or before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key {
    /// Chosen by the user.
    pub seed: u64,
    /// One for each sequence and purpose.
    pub stream: u64,
    /// Place in the stream: a token's position, say.
    pub counter: u64,
}

impl Key {
    /// The key `n` places on.
    pub fn at(self, n: u64) -> Self {
        Self { counter: self.counter.wrapping_add(n), ..self }
    }

    /// Its 64 random bits.
    pub fn bits(self) -> u64 {
        let [a, b, ..] = philox(halves(self.seed), counter_block(self.counter, self.stream));
        a as u64 | (b as u64) << 32
    }

    /// Uniform in [0, 1), a multiple of 2^-53.
    pub fn uniform(self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

fn counter_block(counter: u64, stream: u64) -> [u32; 4] {
    let ([a, b], [c, d]) = (halves(counter), halves(stream));
    [a, b, c, d]
}

/// A seeded stream of random numbers; implements [`rand_core::Rng`], so `rand`'s distributions work on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rng {
    key: [u32; 2],
    stream: u64,
    counter: u64,
    block: [u32; 4],
    used: usize,
}

impl Rng {
    /// Stream 0 of `seed`.
    pub fn new(seed: u64) -> Self {
        Self::stream(seed, 0)
    }

    /// An independent stream of the same seed.
    pub fn stream(seed: u64, stream: u64) -> Self {
        Self { key: halves(seed), stream, counter: 0, block: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.key, counter_block(self.counter, self.stream));
            self.counter += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.next_u32() as u64 | (self.next_u32() as u64) << 32
    }

    /// Uniform in [0, 1), a multiple of 2^-24 (exact in f32).
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// Uniform in `0..n` by multiplication; the bias is below n / 2^64.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.next_u64() as u128 * n as u128) >> 64) as usize
    }

    /// Brings a list into a random order (Fisher & Yates).
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        (1..list.len()).rev().for_each(|i| list.swap(i, self.below(i + 1)));
    }

    /// Standard normal by Box-Muller.
    pub fn normal(&mut self) -> f32 {
        let (u, v) = (1.0 - self.uniform() as f64, self.uniform() as f64);
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

impl rand_core::TryRng for Rng {
    type Error = std::convert::Infallible;
    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        Ok(Rng::next_u32(self))
    }
    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        Ok(Rng::next_u64(self))
    }
    fn try_fill_bytes(&mut self, dst: &mut [u8]) -> Result<(), Self::Error> {
        for d in dst.chunks_mut(4) {
            let b = Rng::next_u32(self).to_le_bytes();
            d.copy_from_slice(&b[..d.len()]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the Random123 library.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 2], [!0; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let (k, c) = ([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]);
        assert_eq!(philox(k, c), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn a_key_is_a_block_of_the_stream() {
        let key = Key { seed: 7 << 40 | 3, stream: 5 << 33 | 1, counter: 0 };
        let mut r = Rng::stream(key.seed, key.stream);
        for i in 0..4 {
            assert_eq!(key.at(i).bits(), r.next_u64());
            r.next_u64();
        }
        let zero = Key::default();
        assert_eq!(zero.bits(), 0xe169_c58d_6627_e8d5);
        assert_eq!(zero.uniform(), (0xe169_c58d_6627_e8d5_u64 >> 11) as f64 / (1u64 << 53) as f64);
    }

    #[test]
    fn normals_have_unit_variance() {
        let mut r = Rng::new(1);
        let v: Vec<f32> = (0..100_000).map(|_| r.normal()).collect();
        let mean = v.iter().sum::<f32>() / v.len() as f32;
        let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / v.len() as f32;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.02, "mean {mean}, variance {var}");
    }
}
