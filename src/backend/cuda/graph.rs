//! Launches that come again, as graphs.
//!
//! What ops queue is put on a tape. Before anything else happens on the stream (a copy, the end of a buffer, a wait) the tape is
//! handed to the driver: one launch after the other the first time, and as a CUDA graph, which is one launch, once
//! the very same launches have come a second time. A step of decoding differs from the last in what stands in device memory
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
    graph: Option<G>,
    used: u64,
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
            self.known.push(Entry { tape: tape.clone(), graph: None, used: self.clock });
            return launch(tape);
        };
        entry.used = self.clock;
        let graph = match &mut entry.graph {
            Some(graph) => graph,
            none => {
                self.stats.captured += 1;
                none.insert(capture(tape)?)
            }
        };
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
        assert_eq!(g.stats, GraphStats { captured: 1, replayed: 2 });
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
    fn a_failure_leaves_nothing_on_the_tape() {
        let mut g = Graphs::<()>::default();
        g.push(ADD, &Add::new(Dst::at(0x100, 1), Src::at(0x200, 1), 1).unwrap(), [1, 1, 1], 32, 0);
        assert_eq!(g.flush(|_| Err("no"), |_| Ok(()), |()| Ok(())), Err("no"));
        assert_eq!(g.flush(|_| Err("again"), |_| Ok(()), |()| Ok(())), Ok(()));
    }
}
