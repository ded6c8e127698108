//! From the block formats of a file to the planes that `kernels/rt/quant.cuh` defines.

use crate::dtype::{DType, k_scales};

/// Words of a tile of 16 outputs and 64 inputs in each plane; those of `supers` are for four tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Words {
    pub quants: usize,
    pub high: usize,
    pub scales: usize,
    pub supers: usize,
}

/// The planes of a matrix, each `[strips][tiles][words]`.
pub(super) struct Planes<T> {
    pub quants: T,
    pub high: T,
    pub scales: T,
    pub supers: T,
}

/// The planes' sizes; `None` for formats that have none of their own on the device.
pub(super) fn words(dtype: DType) -> Option<Words> {
    let (quants, high, scales, supers) = match dtype {
        DType::Q8_0 => (256, 0, 16, 0),
        DType::Q4_0 => (128, 0, 16, 0),
        DType::Q4_1 => (128, 0, 32, 0),
        DType::Q4_K => (128, 0, 16, 16),
        DType::Q6_K => (128, 64, 16, 8),
        _ => return None,
    };
    Some(Words { quants, high, scales, supers })
}

/// 32 inputs of one output as the file has them.
struct Block {
    /// Unsigned as stored; i8 for Q8_0.
    q: [u8; 32],
    /// The bits of d, and of m or dmin.
    d: [u16; 2],
    /// Integer scale and minimum (Q4_K), or the scales of both halves (Q6_K).
    sub: [u8; 2],
}

fn half(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

/// Block `k` of a row.
fn block(dtype: DType, row: &[u8], k: usize) -> Block {
    let size = dtype.block_bytes();
    let nibbles = |b: &[u8]| std::array::from_fn(|i| b[i % 16] >> (i / 16 * 4) & 15);
    match dtype {
        DType::Q8_0 => {
            let b = &row[k * size..];
            Block { q: std::array::from_fn(|i| b[2 + i]), d: [half(b, 0), 0], sub: [0; 2] }
        }
        DType::Q4_0 => {
            let b = &row[k * size..];
            Block { q: nibbles(&b[2..18]), d: [half(b, 0), 0], sub: [0; 2] }
        }
        DType::Q4_1 => {
            let b = &row[k * size..];
            Block { q: nibbles(&b[4..20]), d: [half(b, 0), half(b, 2)], sub: [0; 2] }
        }
        DType::Q4_K => {
            let (b, j) = (&row[k / 8 * size..], k % 8);
            let (scale, min) = k_scales(&b[4..16])[j];
            let q = &b[16 + j / 2 * 32..];
            Block {
                q: std::array::from_fn(|i| q[i] >> (j % 2 * 4) & 15),
                d: [half(b, 0), half(b, 2)],
                sub: [scale, min],
            }
        }
        _ => {
            let (b, j) = (&row[k / 8 * size..], k % 8);
            let (low, high) = (&b[j / 4 * 64 + j % 2 * 32..], &b[128 + j / 4 * 32..]);
            let q = |i: usize| low[i] >> (j % 4 / 2 * 4) & 15 | (high[i] >> (j % 4 * 2) & 3) << 4;
            Block { q: std::array::from_fn(q), d: [half(b, 208), 0], sub: [b[192 + 2 * j], b[193 + 2 * j]] }
        }
    }
}

/// Packs a matrix of `rows` rows of `cols` inputs; `data` is the file's.
pub(super) fn pack(dtype: DType, rows: usize, cols: usize, data: &[u8], words: Words) -> Planes<Vec<u32>> {
    let (strips, tiles) = (rows.div_ceil(16), cols.div_ceil(64));
    let plane = |words: usize| vec![0u32; strips * tiles * words];
    let mut p = Planes {
        quants: plane(words.quants),
        high: plane(words.high),
        scales: plane(words.scales),
        supers: vec![0; strips * (tiles / 4) * words.supers],
    };
    let row_bytes = cols / dtype.block_len() * dtype.block_bytes();
    for (o, row) in data.chunks_exact(row_bytes.max(1)).take(rows).enumerate() {
        // Output g + 8 i of its strip.
        let (strip, g, i) = (o / 16, o % 8, o / 8 % 2);
        for k in 0..cols / 32 {
            let b = block(dtype, row, k);
            let (tile, second) = (strip * tiles + k / 2, k % 2);
            let quants = &mut p.quants[tile * words.quants..][..words.quants];
            for t in 0..4 {
                let lane = 4 * g + t;
                // The lane's eight inputs, in pairs.
                let input = |n: usize| match dtype {
                    DType::Q6_K => n / 4 * 16 + 4 * t + n % 4,
                    _ => 8 * t + n,
                };
                if dtype == DType::Q8_0 {
                    for h in 0..2 {
                        let bytes = [0, 2, 1, 3].map(|n| b.q[input(4 * h + n)]);
                        quants[(second * 32 + lane) * 4 + 2 * i + h] = u32::from_le_bytes(bytes);
                    }
                    continue;
                }
                let (mut low, mut high) = (0, 0);
                for pair in 0..4 {
                    let [x, y] = [b.q[input(2 * pair)] as u32, b.q[input(2 * pair + 1)] as u32];
                    low |= (x & 15) << (4 * pair) | (y & 15) << (4 * pair + 16);
                    high |= (x >> 4) << (2 * (4 * second + pair)) | (y >> 4) << (2 * (4 * second + pair) + 16);
                }
                quants[(lane * 2 + second) * 2 + i] = low;
                if words.high > 0 {
                    p.high[tile * words.high + lane * 2 + i] |= high;
                }
            }
            let scales = &mut p.scales[tile * words.scales..][..words.scales];
            let halves = |d: u16| (d as u32) << (16 * i);
            match dtype {
                DType::Q8_0 | DType::Q4_0 => scales[g * 2 + second] |= halves(b.d[0]),
                DType::Q4_1 => {
                    scales[g * 4 + second] |= halves(b.d[0]);
                    scales[g * 4 + 2 + second] |= halves(b.d[1]);
                }
                DType::Q4_K => {
                    let word = (b.sub[0] as u32) << (8 * second) | (b.sub[1] as u32) << (16 + 8 * second);
                    scales[g * 2 + i] |= word;
                }
                _ => scales[g * 2 + i] |= u32::from(u16::from_le_bytes(b.sub)) << (16 * second),
            }
            if words.supers > 0 && k % 8 == 0 {
                let supers = &mut p.supers[(strip * (tiles / 4) + k / 8) * words.supers..][..words.supers];
                match dtype {
                    DType::Q4_K => supers[g * 2 + i] = b.d[0] as u32 | (b.d[1] as u32) << 16,
                    _ => supers[g] |= halves(b.d[0]),
                }
            }
        }
    }
    p
}
