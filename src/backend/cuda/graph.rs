//! Launches that come again, as graphs.
//!
//! What ops queue is put on a tape. Before anything else happens on the stream (a copy, the end of a buffer, a wait) the tape is
//! handed to the driver: one launch after the other the first time, and as a CUDA graph, which is one launch, once
//! the very same launches have come a second time (if the driver refuses, one after the other for good). A step of decoding differs from the last in what stands in device memory
//! (tokens, positions, lengths), and not in its launches, until the context reaches another chunk of keys. Since a
//! graph is used only where every kernel, grid and argument is the same, there is nothing to keep up to date and nothing
//! that could be stale.

use super::Args;
use super::kernels::Kernel;

/// Launches that are worth a graph; below, one by one.
const LEAST: usize = 8;
/// Tapes that are known at a time.
const KNOWN: usize = 16;
/// Launches after which a tape is handed over, whatever comes next.
const MOST: usize = 4096;

/// One launch, its arguments apart.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Launch {
    pub kernel: &'static str,
    pub grid: [u32; 3],
    pub block: u32,
    pub shared: u32,
    /// Where its arguments begin on the tape.
    args: usize,
}

/// Launches in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tape {
    launches: Vec<Launch>,
    args: Vec<u64>,
}

impl Tape {
    fn push<A: Args>(&mut self, kernel: Kernel<A>, args: &A, grid: [usize; 3], block: usize, shared: usize) {
        let at = self.args.len();
        args.put(&mut self.args);
        let grid = grid.map(|n| n as u32);
        self.launches.push(Launch { kernel: kernel.name, grid, block: block as u32, shared: shared as u32, args: at });
    }

    /// Each launch and its arguments, laid out as the kernel declares them.
    pub fn iter(&self) -> impl Iterator<Item = (&Launch, &[u64])> {
        self.launches.iter().map(|l| (l, &self.args[l.args..]))
    }

    fn clear(&mut self) {
        self.launches.clear();
        self.args.clear();
    }
}

/// Passes that went to the device as graphs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphStats {
    /// Graphs made.
    pub captured: u64,
    /// Launches of graphs.
    pub replayed: u64,
    /// Tapes that the driver would not capture; they are launched one by one.
    pub refused: u64,
}

/// The tape, and what has been on it before. `G` is a graph, freed when dropped.
pub(super) struct Graphs<G> {
    tape: Tape,
    known: Vec<Entry<G>>,
    /// Counts tapes.
    clock: u64,
    /// Whether there are to be graphs.
    pub on: bool,
    pub stats: GraphStats,
}

struct Entry<G> {
    tape: Tape,
    graph: Made<G>,
    used: u64,
}

enum Made<G> {
    NotYet,
    Graph(G),
    Refused,
}

impl<G> Default for Graphs<G> {
    fn default() -> Self {
        Self { tape: Tape::default(), known: Vec::new(), clock: 0, on: true, stats: GraphStats::default() }
    }
}

impl<G> Graphs<G> {
    /// Queues a launch; says whether the tape must be handed over at once.
    pub fn push<A: Args>(&mut self, k: Kernel<A>, args: &A, grid: [usize; 3], block: usize, shared: usize) -> bool {
        self.tape.push(k, args, grid, block, shared);
        !self.on || self.tape.launches.len() >= MOST
    }

    /// Empties the tape: by `launch`, which plays it, or by `replay`, if `capture` makes (or has made) a graph of it.
    pub fn flush<E>(
        &mut self,
        launch: impl FnOnce(&Tape) -> Result<(), E>,
        capture: impl FnOnce(&Tape) -> Result<G, E>,
        replay: impl FnOnce(&G) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut tape = std::mem::take(&mut self.tape);
        let done = match tape.launches.len() {
            0 => Ok(()),
            1..LEAST => launch(&tape),
            _ if !self.on => launch(&tape),
            _ => self.play(&tape, launch, capture, replay),
        };
        // Its memory serves the next one, which begins empty even if this one failed.
        tape.clear();
        self.tape = tape;
        done
    }

    fn play<E>(
        &mut self,
        tape: &Tape,
        launch: impl FnOnce(&Tape) -> Result<(), E>,
        capture: impl FnOnce(&Tape) -> Result<G, E>,
        replay: impl FnOnce(&G) -> Result<(), E>,
    ) -> Result<(), E> {
        self.clock += 1;
        let Some(entry) = self.known.iter_mut().find(|e| e.tape == *tape) else {
            if self.known.len() == KNOWN {
                let oldest = (0..KNOWN).min_by_key(|&i| self.known[i].used).unwrap_or(0);
                self.known.swap_remove(oldest);
            }
            self.known.push(Entry { tape: tape.clone(), graph: Made::NotYet, used: self.clock });
            return launch(tape);
        };
        entry.used = self.clock;
        if let Made::NotYet = entry.graph {
            // All its kernels have run once: to load them is not left to the capture.
            entry.graph = capture(tape).map_or(Made::Refused, Made::Graph);
            match entry.graph {
                Made::Graph(_) => self.stats.captured += 1,
                _ => self.stats.refused += 1,
            }
        }
        let Made::Graph(graph) = &entry.graph else { return launch(tape) };
        self.stats.replayed += 1;
        replay(graph)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::args::Add;
    use super::super::kernels::ADD;
    use super::super::memory::{Dst, Src};
    use super::*;

    /// A step of `launches` launches over `n` elements, and how it came to the device.
    fn step(g: &mut Graphs<usize>, n: u32, launches: usize) -> &'static str {
        for _ in 0..launches {
            let args = Add::new(Dst::at(0x100, n as usize), Src::at(0x200, n as usize), n).unwrap();
            assert_eq!(g.push(ADD, &args, [1, 1, 1], 32, 0), !g.on);
        }
        let how = Cell::new("nothing");
        let count = |t: &Tape| t.iter().count();
        let launch = |t: &Tape| {
            assert_eq!(count(t), launches);
            how.set("launched");
            Ok::<_, ()>(())
        };
        let replay = |&graph: &usize| {
            assert_eq!(graph, launches);
            how.set("replayed");
            Ok(())
        };
        g.flush(launch, |t| Ok(count(t)), replay).unwrap();
        how.get()
    }

    #[test]
    fn the_second_time_is_a_graph() {
        let mut g = Graphs::default();
        assert_eq!(step(&mut g, 4, 0), "nothing");
        assert_eq!(step(&mut g, 4, LEAST), "launched");
        assert_eq!(step(&mut g, 5, LEAST), "launched");
        assert_eq!(step(&mut g, 4, LEAST), "replayed");
        assert_eq!(step(&mut g, 4, LEAST + 1), "launched");
        assert_eq!(step(&mut g, 4, LEAST), "replayed");
        assert_eq!(g.stats, GraphStats { captured: 1, replayed: 2, refused: 0 });
        for _ in 0..3 {
            assert_eq!(step(&mut g, 4, LEAST - 1), "launched");
        }
        g.on = false;
        assert_eq!(step(&mut g, 4, LEAST), "launched");
    }

    #[test]
    fn the_longest_unused_are_forgotten() {
        let mut g = Graphs::default();
        for n in 1..=KNOWN as u32 {
            assert_eq!(step(&mut g, n, LEAST), "launched");
            assert_eq!(step(&mut g, 1, LEAST), "replayed");
        }
        step(&mut g, 99, LEAST);
        assert_eq!(g.known.len(), KNOWN);
        assert_eq!(step(&mut g, 1, LEAST), "replayed");
        assert_eq!(step(&mut g, 2, LEAST), "launched");
    }

    #[test]
    fn what_cannot_be_captured_is_launched() {
        let mut g = Graphs::<()>::default();
        let mut launched = 0;
        for _ in 0..4 {
            for _ in 0..LEAST {
                g.push(ADD, &Add::new(Dst::at(0x100, 1), Src::at(0x200, 1), 1).unwrap(), [1, 1, 1], 32, 0);
            }
            let launch = |_: &Tape| {
                launched += 1;
                Ok(())
            };
            g.flush(launch, |_| Err("no"), |()| Err("there is nothing to replay")).unwrap();
        }
        assert_eq!((launched, g.stats), (4, GraphStats { captured: 0, replayed: 0, refused: 1 }));
    }

    #[test]
    fn a_failure_leaves_nothing_on_the_tape() {
        let mut g = Graphs::<()>::default();
        g.push(ADD, &Add::new(Dst::at(0x100, 1), Src::at(0x200, 1), 1).unwrap(), [1, 1, 1], 32, 0);
        assert_eq!(g.flush(|_| Err("no"), |_| Ok(()), |()| Ok(())), Err("no"));
        assert_eq!(g.flush(|_| Err("again"), |_| Ok(()), |()| Ok(())), Ok(()));
    }
}

/// What a driver does of it: the stand-in.
#[cfg(all(test, feature = "emu"))]
mod driven {
    use half::bf16;

    use super::super::device::Slot;
    use super::super::kv::{CudaKv, table};
    use super::super::memory::CudaBuf;
    use super::super::weight::CudaWeight;
    use super::*;
    use crate::backend::cuda::Cuda;
    use crate::backend::{AttnSpec, Backend, Buffer, Mask, Segment};
    use crate::dtype::DType;
    use crate::tensor::HostTensor;

    const D: usize = 8;
    const LAYERS: usize = 6;
    const SPEC: AttnSpec = AttnSpec { heads: 1, kv_heads: 1, head_dim: D, scale: 1.0, window: None };

    /// A step of decoding in small: a token's embedding is its key, its value and its query in every layer.
    struct Step {
        cuda: Cuda,
        embed: CudaWeight,
        x: CudaBuf<f32>,
        y: CudaBuf<bf16>,
        kv: CudaKv,
    }

    impl Step {
        fn new(cuda: Cuda) -> Self {
            let values: Vec<f32> = (0..16 * D).map(|i| (i * i % 23) as f32 / 8.0).collect();
            let host = HostTensor::new(DType::F32, 16, D, bytemuck::cast_slice(&values).to_vec().into()).unwrap();
            let embed = cuda.weight(host).unwrap();
            let (x, y) = (cuda.alloc(D).unwrap(), cuda.alloc(LAYERS * D).unwrap());
            let kv = cuda.kv_alloc(LAYERS, 32, D).unwrap();
            Self { cuda, embed, x, y, kv }
        }

        /// Token `t` behind `past` others.
        fn run(&mut self, past: usize, t: u32) -> Vec<bf16> {
            let Self { cuda, embed, x, y, kv } = self;
            cuda.embed(x.head_mut(D), embed, &[t], 1.0).unwrap();
            // What follows is one tape, whether or not something is sent before it.
            cuda.stream.flush().unwrap();
            let mut segments = [Segment { kv, past, staged: 0, rows: 1, mask: Mask::Causal }];
            for layer in 0..LAYERS {
                let y = y.view_mut(layer * D..(layer + 1) * D);
                cuda.kv_stage(&mut segments, layer, x.all(), x.all()).unwrap();
                cuda.attention(y, x.all(), &segments, layer, &SPEC).unwrap();
            }
            let mut out = vec![bf16::ZERO; LAYERS * D];
            cuda.download(y.all(), &mut out).unwrap();
            out
        }
    }

    fn both() -> (Step, Step) {
        (Step::new(Cuda::emulated().unwrap()), Step::new(Cuda::emulated().unwrap().without_graphs()))
    }

    /// Were a token or a length not sent, the result would show it: the two are planted one by one.
    #[test]
    fn cuda_values_that_are_not_sent_show() {
        for slot in [Slot::Tokens, Slot::Segments] {
            let (mut graphs, mut plain) = both();
            for i in 0..4 {
                assert_eq!(graphs.run(i, i as u32), plain.run(i, i as u32));
            }
            let before = graphs.cuda.graph_stats();
            match slot {
                Slot::Tokens => graphs.cuda.small().pretend(slot, &[9u32]),
                _ => {
                    let segments = [Segment { kv: &mut graphs.kv, past: 4, staged: 0, rows: 1, mask: Mask::Causal }];
                    let (segs, _) = table(&segments).unwrap();
                    graphs.cuda.small().pretend(slot, &segs);
                }
            }
            assert_ne!(graphs.run(4, 9), plain.run(4, 9));
            assert!(before.captured > 0 && graphs.cuda.graph_stats().replayed > before.replayed, "a graph has run");
        }
    }

    #[test]
    fn cuda_steps_that_cannot_be_captured_run_all_the_same() {
        let (mut graphs, mut plain) = both();
        graphs.cuda.stream.occupy_recorder();
        for i in 0..6 {
            assert_eq!(graphs.run(i, i as u32), plain.run(i, i as u32));
        }
        assert_eq!(graphs.cuda.graph_stats(), GraphStats { captured: 0, replayed: 0, refused: 1 });
    }
}
