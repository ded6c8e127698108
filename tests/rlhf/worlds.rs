//! The synthetic worlds of the specification, from a generator that any language can write down.
#![allow(dead_code)]

/// SplitMix64 by counter.
pub struct Stream {
    seed: u64,
    count: u64,
}

impl Stream {
    pub fn new(seed: u64) -> Self {
        Self { seed, count: 0 }
    }

    pub fn bits(&mut self) -> u64 {
        self.count += 1;
        let z = self.seed.wrapping_add(self.count.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (-53f64).exp2()
    }

    pub fn normal(&mut self) -> f64 {
        let (a, b) = (self.uniform(), self.uniform());
        (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }

    pub fn normals(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.normal()).collect()
    }

    pub fn uniforms(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.uniform()).collect()
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

pub fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

pub fn mean(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len() as f64;
    x.sum::<f64>() / n
}

/// `x` at this length.
fn scaled(mut x: Vec<f64>, length: f64) -> Vec<f64> {
    let scale = length / norm(&x);
    x.iter_mut().for_each(|x| *x *= scale);
    x
}

fn unit_rows(x: &mut [f64], d: usize) {
    x.chunks_exact_mut(d).for_each(|row| {
        let n = norm(row);
        row.iter_mut().for_each(|x| *x /= n);
    });
}

/// Rows longer than 1 become 1 long.
fn clip_rows(x: &mut [f64], d: usize) {
    x.chunks_exact_mut(d).for_each(|row| {
        let n = norm(row).max(1.0);
        row.iter_mut().for_each(|x| *x /= n);
    });
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Comparisons of two answers on the unit sphere.
pub struct Passive {
    pub d: usize,
    pub theta: Vec<f64>,
    pub z: Vec<f64>,
    pub y: Vec<f64>,
}

impl Passive {
    pub fn new(seed: u64, d: usize, rounds: usize, length: f64) -> Self {
        let mut s = Stream::new(seed);
        let theta = scaled(s.normals(d), length);
        let mut answers = s.normals(rounds * 2 * d);
        unit_rows(&mut answers, d);
        let z: Vec<f64> = answers.chunks_exact(2 * d).flat_map(|a| difference(&a[..d], &a[d..])).collect();
        let label = |(z, u): (&[f64], f64)| f64::from(u8::from(u < sigmoid(dot(z, &theta))));
        let y = z.chunks_exact(d).zip(s.uniforms(rounds)).map(label).collect();
        Self { d, theta, z, y }
    }

    pub fn rounds(&self) -> impl Iterator<Item = (&[f64], f64)> {
        self.z.chunks_exact(self.d).zip(self.y.iter().copied())
    }

    pub fn z(&self, t: usize) -> &[f64] {
        &self.z[t * self.d..][..self.d]
    }

    pub fn error(&self, theta: &[f64]) -> f64 {
        distance(theta, &self.theta)
    }
}

/// A pool in which two prompts of a hundred speak of most directions.
pub struct Scarce {
    pub z: Vec<f64>,
    pub y: Vec<f64>,
    pub rare: Vec<bool>,
    /// Order in which chance would ask.
    pub order: Vec<usize>,
    theta: Vec<f64>,
    evaluation: Vec<f64>,
}

impl Scarce {
    pub const D: usize = 8;
    const PROMPTS: usize = 2000;
    const ANSWERS: usize = 8;

    pub fn new(s: u64) -> Self {
        let d = Self::D;
        let mut stream = Stream::new(1000 + s);
        let mut answers = stream.normals(Self::PROMPTS * 2 * d);
        let rare: Vec<bool> = stream.uniforms(Self::PROMPTS).iter().map(|&u| u < 0.02).collect();
        for (prompt, rare) in answers.chunks_exact_mut(2 * d).zip(&rare) {
            if !rare {
                prompt.chunks_exact_mut(d).for_each(|a| a[1..].iter_mut().for_each(|x| *x *= 0.15));
            }
        }
        clip_rows(&mut answers, d);
        let theta = scaled(stream.normals(d), 3.0);
        let mut evaluation = stream.normals(200 * Self::ANSWERS * d);
        clip_rows(&mut evaluation, d);
        let z: Vec<f64> = answers.chunks_exact(2 * d).flat_map(|a| difference(&a[..d], &a[d..])).collect();
        let coins = Stream::new(5000 + s).uniforms(Self::PROMPTS);
        let y = z.chunks_exact(d).zip(coins).map(|(z, u)| f64::from(u8::from(u < sigmoid(dot(z, &theta))))).collect();
        let keys = Stream::new(9000 + s).uniforms(Self::PROMPTS);
        let mut order: Vec<usize> = (0..Self::PROMPTS).collect();
        order.sort_by(|&i, &j| keys[i].total_cmp(&keys[j]));
        Self { z, y, rare, order, theta, evaluation }
    }

    /// Mean reward that the greedy choice by `theta` falls short of the best one.
    pub fn gap(&self, theta: &[f64]) -> f64 {
        let d = Self::D;
        let prompts = self.evaluation.chunks_exact(Self::ANSWERS * d);
        mean(prompts.map(|prompt| {
            let best = |by: &[f64]| {
                let rewards: Vec<f64> = prompt.chunks_exact(d).map(|a| dot(a, by)).collect();
                (1..rewards.len()).fold(0, |b, i| if rewards[i] > rewards[b] { i } else { b })
            };
            let reward = |j: usize| dot(&prompt[j * d..][..d], &self.theta);
            reward(best(&self.theta)) - reward(best(theta))
        }))
    }
}

/// Prompts of sixteen answers, one after another.
pub struct Users {
    pub answers: Vec<f64>,
    pub coins: Vec<f64>,
    theta: Vec<f64>,
}

impl Users {
    pub const D: usize = 5;
    pub const K: usize = 16;
    pub const ROUNDS: usize = 4000;

    pub fn new(s: u64) -> Self {
        let mut stream = Stream::new(20000 + s);
        let theta = scaled(stream.normals(Self::D), 3.0);
        let mut answers = stream.normals(Self::ROUNDS * Self::K * Self::D);
        unit_rows(&mut answers, Self::D);
        let coins = stream.uniforms(Self::ROUNDS);
        Self { answers, coins, theta }
    }

    /// Answers of round `t`, `[K, D]`.
    pub fn answers(&self, t: usize) -> &[f64] {
        &self.answers[t * Self::K * Self::D..][..Self::K * Self::D]
    }

    /// What answer `j` of round `t` falls short of the best.
    pub fn regret(&self, t: usize, j: usize) -> f64 {
        let rewards: Vec<f64> = self.answers(t).chunks_exact(Self::D).map(|a| dot(a, &self.theta)).collect();
        rewards.iter().copied().fold(f64::MIN, f64::max) - rewards[j]
    }

    pub fn label(&self, t: usize, z: &[f64]) -> f64 {
        f64::from(u8::from(self.coins[t] < sigmoid(dot(z, &self.theta))))
    }
}
