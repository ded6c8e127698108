//! Low-rank adapters.

use half::bf16;

use super::super::device::{Slot, Small};
use super::super::memory::{Dst, Src};
use super::super::ops::{THREADS, rows_of};
use super::super::{Cuda, args, kernels as k};
use crate::backend::sampling::width;
use crate::backend::{Group, Ranks};
use crate::error::{Result, ensure};

/// Rows of a tile, and of a part of a sum over rows.
const TILE: usize = 8;
const CHUNK: usize = 256;

fn check(part: Ranks) -> Result<()> {
    let Ranks { stride, first, n } = part;
    ensure!(first + n <= stride, Shape, "columns {first}..{} of {stride}", first + n);
    Ok(())
}

impl Cuda {
    /// The table of groups on the device, and how many tiles they have.
    fn groups(
        &self,
        small: &mut Small,
        groups: &[Group<'_, Self>],
        rows: usize,
        matrix: usize,
    ) -> Result<(Src<'static, args::LoraGroup>, usize)> {
        let (mut table, mut first, mut tile) = (Vec::with_capacity(groups.len()), 0, 0);
        for g in groups.iter().filter(|g| g.rows > 0) {
            let found = g.matrix.len();
            ensure!(found == matrix, Shape, "a low-rank matrix of {found} elements, not {matrix}");
            table.push(args::LoraGroup {
                matrix: g.matrix.address(),
                first: first as u32,
                rows: g.rows as u32,
                tile: tile as u32,
                scale: g.scale,
            });
            first += g.rows;
            tile += g.rows.div_ceil(TILE);
        }
        ensure!(first == rows, Shape, "low-rank groups of {first} rows, in a pass of {rows}");
        Ok((small.table(&self.stream, &table)?, tile))
    }

    pub(in super::super) fn run_lora_shrink(
        &self,
        h: Dst<'_, f32>,
        x: Src<'_, bf16>,
        ranks: usize,
        groups: &[Group<'_, Self>],
    ) -> Result<()> {
        let rows = rows_of("lora_shrink", h.len(), ranks)?;
        if rows == 0 {
            return Ok(());
        }
        let width = width("lora_shrink", x.len(), rows)?;
        let mut small = self.small();
        let (groups, tiles) = self.groups(&mut small, groups, rows, ranks * width)?;
        let n = groups.len() as u32;
        let args = args::LoraShrink::new(groups, x, h, n, rows as u32, width as u32, ranks as u32)?;
        self.launch(k::LORA_SHRINK, args, [tiles, ranks.div_ceil(4), 1], THREADS, 0)
    }

    pub(in super::super) fn run_lora_expand(
        &self,
        y: Dst<'_, f32>,
        h: Src<'_, f32>,
        part: Ranks,
        groups: &[Group<'_, Self>],
    ) -> Result<()> {
        check(part)?;
        let rows = rows_of("lora_expand", h.len(), part.stride)?;
        if rows == 0 {
            return Ok(());
        }
        let width = width("lora_expand", y.len(), rows)?;
        let mut small = self.small();
        let (groups, tiles) = self.groups(&mut small, groups, rows, part.n * width)?;
        let (n, r, w) = (groups.len() as u32, rows as u32, width as u32);
        let (stride, first, ranks) = (part.stride as u32, part.first as u32, part.n as u32);
        let args = args::LoraExpand::new(groups, h, y, n, r, w, stride, first, ranks)?;
        self.launch(k::LORA_EXPAND, args, [tiles, width.div_ceil(THREADS), 1], THREADS, 0)
    }

    pub(super) fn run_lora_expand_bwd(
        &self,
        dh: Dst<'_, f32>,
        dy: Src<'_, f32>,
        part: Ranks,
        groups: &[Group<'_, Self>],
    ) -> Result<()> {
        check(part)?;
        let rows = rows_of("lora_expand_bwd", dh.len(), part.stride)?;
        if rows == 0 {
            return Ok(());
        }
        let width = width("lora_expand_bwd", dy.len(), rows)?;
        let mut small = self.small();
        let (groups, tiles) = self.groups(&mut small, groups, rows, part.n * width)?;
        let (n, r, w) = (groups.len() as u32, rows as u32, width as u32);
        let (stride, first, ranks) = (part.stride as u32, part.first as u32, part.n as u32);
        let args = args::LoraExpandBwd::new(groups, dy, dh, n, r, w, stride, first, ranks)?;
        self.launch(k::LORA_EXPAND_BWD, args, [tiles, part.n.div_ceil(4), 1], THREADS, 0)
    }

    pub(super) fn run_lora_shrink_bwd(
        &self,
        dx: Dst<'_, f32>,
        dh: Src<'_, f32>,
        ranks: usize,
        groups: &[Group<'_, Self>],
    ) -> Result<()> {
        let rows = rows_of("lora_shrink_bwd", dh.len(), ranks)?;
        if rows == 0 {
            return Ok(());
        }
        let width = width("lora_shrink_bwd", dx.len(), rows)?;
        let mut small = self.small();
        let (groups, tiles) = self.groups(&mut small, groups, rows, ranks * width)?;
        let n = groups.len() as u32;
        let args = args::LoraShrinkBwd::new(groups, dh, dx, n, rows as u32, width as u32, ranks as u32)?;
        self.launch(k::LORA_SHRINK_BWD, args, [tiles, width.div_ceil(THREADS), 1], THREADS, 0)
    }

    pub(super) fn run_lora_bwd_b(
        &self,
        db: Dst<'_, f32>,
        dy: Src<'_, f32>,
        h: Src<'_, f32>,
        part: Ranks,
        scale: f32,
    ) -> Result<()> {
        check(part)?;
        let rows = rows_of("lora_bwd_b", h.len(), part.stride)?;
        if rows == 0 {
            return Ok(());
        }
        let (width, chunks) = (width("lora_bwd_b", dy.len(), rows)?, rows.div_ceil(CHUNK));
        let mut small = self.small();
        let parts = small.room(&self.stream, Slot::Parts, chunks * width * part.n)?;
        let at = parts.address();
        let (stride, first, ranks) = (part.stride as u32, part.first as u32, part.n as u32);
        let args = args::LoraBwdB::new(dy, h, parts, rows as u32, width as u32, stride, first, ranks, scale)?;
        self.launch(k::LORA_BWD_B, args, [width.div_ceil(THREADS), part.n.div_ceil(16), chunks], THREADS, 0)?;
        self.fold(at, db, chunks)
    }

    pub(super) fn run_lora_bwd_a(
        &self,
        da: Dst<'_, f32>,
        dh: Src<'_, f32>,
        x: Src<'_, bf16>,
        ranks: usize,
    ) -> Result<()> {
        let rows = rows_of("lora_bwd_a", dh.len(), ranks)?;
        if rows == 0 {
            return Ok(());
        }
        let (width, chunks) = (width("lora_bwd_a", x.len(), rows)?, rows.div_ceil(CHUNK));
        let mut small = self.small();
        let parts = small.room(&self.stream, Slot::Parts, chunks * width * ranks)?;
        let at = parts.address();
        let args = args::LoraBwdA::new(dh, x, parts, rows as u32, width as u32, ranks as u32)?;
        self.launch(k::LORA_BWD_A, args, [width.div_ceil(THREADS), ranks.div_ceil(16), chunks], THREADS, 0)?;
        self.fold(at, da, chunks)
    }
}
