//! [`Mask`]: who sees whom among the staged rows of a cache.

use crate::error::{Result, ensure};

/// Which staged rows a staged row may see. Committed rows are visible to all, unless a window hides them. All staged rows are
/// numbered together, those of earlier passes first.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// Row i sees rows 0..=i.
    Causal,
    /// Every row sees every row.
    Full,
    /// Row i sees its ancestors and itself.
    Tree(&'a TreeMask),
    /// Every row sees its own block and those before it: the block-causal mask of block diffusion (Arriola et al. 2025,
    /// arXiv:2503.09573). Row i sees the rows below ((i + offset) / block + 1) * block - offset.
    Blocks {
        /// Rows of a block; the last may have fewer.
        block: usize,
        /// Rows that the first block lacks, less than `block`: they are committed already.
        offset: usize,
    },
}

/// Ancestor bits and depths of a token tree of n rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeMask {
    parents: Vec<u32>,
    words: usize,
    bits: Vec<u64>,
    depth: Vec<u32>,
}

impl TreeMask {
    /// No parent: a root, whose predecessor is the last committed row.
    pub const ROOT: u32 = u32::MAX;

    /// From each row's parent, [`Self::ROOT`] or a smaller row number.
    ///
    /// # Errors
    /// A parent that is not an earlier row.
    pub fn new(parents: &[u32]) -> Result<Self> {
        let (n, words) = (parents.len(), parents.len().div_ceil(64));
        let (mut bits, mut depth) = (vec![0u64; n * words], vec![0u32; n]);
        for (i, &p) in parents.iter().enumerate() {
            if p != Self::ROOT {
                ensure!((p as usize) < i, Shape, "tree row {i} names parent {p}, which is not an earlier row");
                let p = p as usize;
                bits.copy_within(p * words..(p + 1) * words, i * words);
                depth[i] = depth[p] + 1;
            }
            bits[i * words + i / 64] |= 1 << (i % 64);
        }
        Ok(Self { parents: parents.to_vec(), words, bits, depth })
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.depth.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.depth.is_empty()
    }

    /// Whether row `i` sees row `j`.
    pub fn sees(&self, i: usize, j: usize) -> bool {
        self.bits[i * self.words + j / 64] >> (j % 64) & 1 == 1
    }

    /// Distance of row `i` from the last committed row, less one: a root has depth 0.
    pub fn depth(&self, i: usize) -> u32 {
        self.depth[i]
    }

    /// Parent of row `i`, or [`Self::ROOT`].
    pub fn parent(&self, i: usize) -> u32 {
        self.parents[i]
    }

    /// Ancestor words of row `i`, bit j set where row j is visible.
    pub fn row(&self, i: usize) -> &[u64] {
        &self.bits[i * self.words..(i + 1) * self.words]
    }
}

impl Mask<'_> {
    /// Rows of a block at most: kernels count in 32 bits.
    pub const MAX_BLOCK: usize = 1 << 30;

    /// Position of staged row `i` when `past` rows are committed.
    pub fn position(&self, past: usize, i: usize) -> usize {
        match self {
            Mask::Causal | Mask::Full | Mask::Blocks { .. } => past + i,
            Mask::Tree(t) => past + t.depth(i) as usize,
        }
    }

    /// Whether staged row `i` sees staged row `j`, windows aside.
    pub fn sees(&self, i: usize, j: usize) -> bool {
        match self {
            Mask::Causal => j <= i,
            Mask::Full => true,
            Mask::Tree(t) => t.sees(i, j),
            Mask::Blocks { block, offset } => (j + offset) / block <= (i + offset) / block,
        }
    }

    /// One behind the last of `staged` staged rows that row `i` sees.
    pub fn end(&self, i: usize, staged: usize) -> usize {
        match self {
            Mask::Causal | Mask::Tree(_) => i + 1,
            Mask::Full => staged,
            Mask::Blocks { block, offset } => staged.min(((i + offset) / block + 1) * block - offset),
        }
    }

    /// Whether it is a mask of `staged` staged rows.
    ///
    /// # Errors
    /// A tree of another size; blocks of no rows, of more than [`Mask::MAX_BLOCK`], or of which the first lacks all of its rows.
    pub fn check(&self, staged: usize) -> Result<()> {
        match *self {
            Mask::Causal | Mask::Full => {}
            Mask::Tree(t) => ensure!(t.len() == staged, Shape, "a tree of {} rows masks {staged} staged rows", t.len()),
            Mask::Blocks { block, offset } => ensure!(
                offset < block && block <= Self::MAX_BLOCK,
                Shape,
                "staged rows in blocks of {block} (at most {}), of which the first lacks {offset}",
                Self::MAX_BLOCK
            ),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_see_themselves_and_what_is_before() {
        // Rows 0 and 1 are the rest of a block of three; row 5 begins one.
        let mask = Mask::Blocks { block: 3, offset: 1 };
        let (block, ends) = ([0, 0, 1, 1, 1, 2], [2, 2, 5, 5, 5, 6]);
        for i in 0..6 {
            assert_eq!((mask.end(i, 6), mask.position(10, i)), (ends[i], 10 + i));
            assert!((0..6).all(|j| mask.sees(i, j) == (block[j] <= block[i])), "row {i}");
        }
        assert_eq!(mask.end(5, 9), 8);
        assert!(
            mask.check(6).is_ok()
                && Mask::Blocks { block: Mask::MAX_BLOCK, offset: Mask::MAX_BLOCK - 1 }.check(1).is_ok()
        );
        for (block, offset) in [(0, 0), (3, 3), (Mask::MAX_BLOCK + 1, 0)] {
            let says = Mask::Blocks { block, offset }.check(6).unwrap_err();
            assert!(says.kind() == crate::error::ErrorKind::Shape && says.to_string().contains("blocks of"), "{says}");
        }
        // A block of one row is causal, one of all rows full.
        for i in 0..4 {
            assert_eq!(Mask::Blocks { block: 1, offset: 0 }.end(i, 4), Mask::Causal.end(i, 4));
            assert_eq!(Mask::Blocks { block: 9, offset: 5 }.end(i, 4), Mask::Full.end(i, 4));
        }
    }
}
