//! AMX: sums of 32 by 32 lanes are four of the eight tile registers. Compilers know no stable intrinsics, so it is assembly.
#![allow(unsafe_code)]

use std::arch::asm;
use std::sync::LazyLock;

use super::Block;
use super::pack::{LANES, Out, UNIT};

/// Whether the machine has AMX-BF16 and the system lets this process use it.
pub(super) fn available() -> bool {
    static FOUND: LazyLock<bool> = LazyLock::new(|| detected() && permitted());
    *FOUND
}

fn detected() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    #[target_feature(enable = "xsave")]
    fn enabled() -> u64 {
        // SAFETY: OSXSAVE says that the instruction may be used.
        unsafe { _xgetbv(0) }
    }
    let bits = |x: u32, mask: u32| x & mask == mask;
    if !is_x86_feature_detected!("avx512bf16") || __cpuid(0).eax < 7 || !bits(__cpuid(1).ecx, 1 << 27) {
        return false;
    }
    // BF16 and TILE; tile configuration and tile data, saved by the system.
    // SAFETY: OSXSAVE implies XSAVE.
    bits(__cpuid_count(7, 0).edx, 1 << 22 | 1 << 24) && unsafe { enabled() } >> 17 & 3 == 3
}

/// Asks Linux for tile registers, for all threads of the process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a request without pointers.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Palette 1: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = {
    let mut c = Config { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut i = 0;
    while i < 8 {
        (c.row_bytes[i], c.rows[i]) = (64, 16);
        i += 1;
    }
    c
};

pub(super) fn multiply(block: &Block<'_>, out: &Out<'_>) {
    // SAFETY: the path is taken only where AMX is available; the configuration is valid, and released at the end.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, preserves_flags));
        inner(block, out);
        asm!("tilerelease", options(nostack, preserves_flags));
    }
}

/// # Safety
/// AMX and AVX-512, tiles configured; all panels of the block are there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn inner(block: &Block<'_>, out: &Out<'_>) {
    let mut sums = [[0.0f32; UNIT]; UNIT];
    block.each(UNIT, UNIT, |i, j| {
        // The second panel, or again the first where there is none: its sums are not stored.
        let second = |at: usize, lanes: usize| if at + LANES < lanes { block.steps } else { 0 };
        // SAFETY: panels of row i and column j are the block's.
        unsafe {
            let a = block.a.as_ptr().add(i / LANES * block.steps);
            let b = block.b.as_ptr().add(j / LANES * block.steps);
            let (a1, b1) = (a.add(second(i, block.rows)), b.add(second(j, block.cols)));
            tile([a.cast(), a1.cast(), b.cast(), b1.cast()], block.steps, sums.as_mut_ptr().cast());
        }
        out.put::<UNIT>(block, i, j, sums.as_flattened());
    });
}

/// Sums of two panels with two, `steps` tiles each.
///
/// # Safety
/// AMX, tiles configured; the tiles are readable, `sums` has room for 32 by 32.
#[inline]
unsafe fn tile([a0, a1, b0, b1]: [*const u8; 4], steps: usize, sums: *mut f32) {
    // SAFETY: by this function's contract; the last pointers are not used beyond the tiles.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a0} + {line}]",
            "tileloadd tmm6, [{b0} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {line}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {line}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "add {line}, {line}",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 64], tmm1",
            "add {sums}, 2048",
            "tilestored [{sums} + {line}], tmm2",
            "tilestored [{sums} + {line} + 64], tmm3",
            a0 = inout(reg) a0 => _,
            a1 = inout(reg) a1 => _,
            b0 = inout(reg) b0 => _,
            b1 = inout(reg) b1 => _,
            steps = inout(reg) steps => _,
            line = inout(reg) 64usize => _,
            sums = inout(reg) sums => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Products of tiles in registers and nothing else: the roof. Returns how many operations they were.
pub(super) fn register_products() -> f64 {
    const ROUNDS: u64 = 20_000;
    // SAFETY: called only where AMX is available; the configuration is valid, and released at the end.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            "tilerelease",
            config = in(reg) &CONFIG,
            rounds = inout(reg) ROUNDS => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    // Four products of 16 by 32 with 32 by 16 in a round.
    (ROUNDS * 4 * 2 * 16 * 16 * 32) as f64
}
