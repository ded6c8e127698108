//! A thread pool for jobs of a few microseconds: fork and join in about a microsecond when idle, asleep soon when not.
//!
//! A job is a count of tasks and a closure. Each thread has a run of task numbers of its own, which it takes in order, so that
//! what it asks memory for beyond one task is what its next one needs; who has done his takes others' from their end.
//! Two rules keep it fast on an idle machine and decent on a busy one: workers spin briefly for the next job before they sleep, and the caller waits only
//! for workers that have *joined* the job, so that one the operating system has not scheduled holds nobody up. The result
//! of a job must not depend on which thread runs which task.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Spins of an idle worker before it sleeps: about 50 µs, longer than the gap between two jobs of a token.
const IDLE_SPINS: u32 = 1500;
/// Spins of the caller at the end of a job before it sleeps: about 20 µs, longer than one task.
const JOIN_SPINS: u32 = 600;

/// `state`: epoch in the high half, OPEN while workers may join, the number of workers inside below it.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

type Job<'a> = &'a (dyn Fn(usize) + Sync);

/// One cache line to itself, so that the counters do not fight over it.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    state: Line<AtomicU64>,
    /// Each thread's tasks that nobody has taken: the first in the high half, one behind the last in the low one.
    left: Box<[Line<AtomicU64>]>,
    job: UnsafeCell<Option<Job<'static>>>,
    caller: UnsafeCell<Option<Thread>>,
    caller_asleep: AtomicBool,
    asleep: Box<[Line<AtomicBool>]>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` and `caller` are written only by the thread that holds `Pool::owner`, while no worker is inside, and read
// only by workers inside; joining (acquire) and opening (release) go through `state`.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is bound to a thread.
unsafe impl Send for Shared {}

/// The pool; dropping it ends its threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    owner: Mutex<()>,
}

thread_local! {
    static INSIDE_JOB: Cell<bool> = const { Cell::new(false) };
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Takes one of thread `of`'s tasks: its first, or (not `own`) its last.
    fn take(&self, of: usize, own: bool) -> Option<usize> {
        let parts = |v: u64| ((v >> 32) as usize, (v & u32::MAX as u64) as usize);
        let taken = self.left[of].0.fetch_update(Relaxed, Relaxed, |v| {
            let (first, end) = parts(v);
            (first < end).then(|| if own { v + (1 << 32) } else { v - 1 })
        });
        taken.ok().map(parts).map(|(first, end)| if own { first } else { end - 1 })
    }

    /// Takes and runs tasks until none is left; a panic is kept for the caller and ends the job early.
    fn work(&self, me: usize, job: Job<'_>) {
        let threads = self.left.len();
        let was = INSIDE_JOB.replace(true);
        let r = catch_unwind(AssertUnwindSafe(|| {
            for other in 0..threads {
                while let Some(i) = self.take((me + other) % threads, other == 0) {
                    job(i);
                }
            }
        }));
        INSIDE_JOB.set(was);
        if let Err(p) = r {
            self.left.iter().for_each(|l| l.0.store(0, Relaxed));
            lock(&self.panic).get_or_insert(p);
        }
    }

    /// The life of worker `me`, thread `me + 1` of the pool.
    fn worker(&self, me: usize) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            let mut state = self.state.0.load(Acquire);
            while state >> 32 == seen {
                if self.stop.load(Acquire) {
                    return;
                }
                if spins < IDLE_SPINS {
                    spins += 1;
                    std::hint::spin_loop();
                } else {
                    self.asleep[me].0.store(true, SeqCst);
                    if self.state.0.load(SeqCst) >> 32 == seen && !self.stop.load(SeqCst) {
                        std::thread::park();
                    }
                    self.asleep[me].0.store(false, SeqCst);
                }
                state = self.state.0.load(Acquire);
            }
            seen = state >> 32;
            while state >> 32 == seen && state & OPEN != 0 {
                match self.state.0.compare_exchange_weak(state, state + 1, AcqRel, Acquire) {
                    Err(s) => state = s,
                    Ok(_) => {
                        // SAFETY: this thread is counted inside, so the caller does not leave `run`, whose borrow the
                        // job is, nor write the cell, before the count is back to zero.
                        if let Some(job) = unsafe { *self.job.get() } {
                            self.work(me + 1, job);
                        }
                        // SAFETY: still inside; the handle is cloned before this thread leaves.
                        let caller = unsafe { (*self.caller.get()).clone() };
                        let left = self.state.0.fetch_sub(1, SeqCst) - 1;
                        if left & (OPEN | INSIDE) == 0 && self.caller_asleep.load(SeqCst) {
                            caller.iter().for_each(Thread::unpark);
                        }
                        break;
                    }
                }
            }
        }
    }
}

impl Pool {
    /// A pool in which `threads` threads (at least one) run a job: the caller and `threads - 1` workers.
    pub fn new(threads: usize) -> Self {
        let n = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            state: Line(AtomicU64::new(0)),
            left: (0..=n).map(|_| Line(AtomicU64::new(0))).collect(),
            job: UnsafeCell::new(None),
            caller: UnsafeCell::new(None),
            caller_asleep: AtomicBool::new(false),
            asleep: (0..n).map(|_| Line(AtomicBool::new(false))).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (0..n)
            .filter_map(|i| {
                let s = shared.clone();
                std::thread::Builder::new().name(format!("quadriga-{}", i + 1)).spawn(move || s.worker(i)).ok()
            })
            .collect();
        Self { shared, workers, owner: Mutex::new(()) }
    }

    /// Threads that share a job.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(0)`, .., `f(tasks - 1)`, each once, and returns when all are done. A call from inside a task runs in place.
    ///
    /// # Panics
    /// If a task panics, with its payload.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        // Task numbers are kept in 32 bits.
        if tasks <= 1 || tasks > u32::MAX as usize || self.workers.is_empty() || INSIDE_JOB.get() {
            (0..tasks).for_each(f);
            return;
        }
        let s = &*self.shared;
        let guard = lock(&self.owner);
        let job: Job<'_> = &f;
        let share = |t: usize| (tasks * t / s.left.len()) as u64;
        for (t, left) in s.left.iter().enumerate() {
            left.0.store(share(t) << 32 | share(t + 1), Relaxed);
        }
        // SAFETY: `f` outlives every use: workers read the cell only while counted inside, and this function does not
        // return (or unwind: `work` catches) before the count is zero and the job closed.
        let job: Job<'static> = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        // SAFETY: the owner lock is held and no worker is inside, so nobody else touches the cells.
        unsafe {
            *s.job.get() = Some(job);
            *s.caller.get() = Some(std::thread::current());
        }
        let epoch = (s.state.0.load(Relaxed) >> 32).wrapping_add(1) & 0xFFFF_FFFF;
        s.state.0.store(epoch << 32 | OPEN, SeqCst);
        for (a, w) in s.asleep.iter().zip(&self.workers) {
            if a.0.load(SeqCst) {
                w.thread().unpark();
            }
        }
        s.work(0, job);
        let mut inside = s.state.0.fetch_and(!OPEN, SeqCst) & INSIDE;
        let mut spins = 0;
        while inside != 0 {
            if spins < JOIN_SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                s.caller_asleep.store(true, SeqCst);
                if s.state.0.load(SeqCst) & INSIDE != 0 {
                    std::thread::park();
                }
                s.caller_asleep.store(false, SeqCst);
            }
            inside = s.state.0.load(Acquire) & INSIDE;
        }
        let panic = lock(&s.panic).take();
        drop(guard);
        if let Some(p) = panic {
            resume_unwind(p);
        }
    }

    /// Splits `data` into pieces of `chunk` elements (the last may be shorter) and runs `f(piece number, piece)` on each.
    pub fn run_chunks<T: Send>(&self, data: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let chunk = chunk.max(1);
        let (n, base) = (data.len(), Shards::new(data));
        self.run(n.div_ceil(chunk), |i| {
            let at = i * chunk;
            // SAFETY: pieces of different tasks are disjoint, and each task runs once.
            f(i, unsafe { base.slice(at, chunk.min(n - at)) })
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for w in self.workers.drain(..) {
            w.thread().unpark();
            // A worker never panics outside of a caught task.
            let _ = w.join();
        }
    }
}

/// A mutable slice that several tasks write, each its own elements.
pub struct Shards<'a, T> {
    base: *mut T,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out disjoint parts (the contract of `slice`), like `split_at_mut` across threads.
unsafe impl<T: Send> Sync for Shards<'_, T> {}
// SAFETY: as a `&mut [T]`.
unsafe impl<T: Send> Send for Shards<'_, T> {}

impl<'a, T> Shards<'a, T> {
    /// Shares `data` among tasks.
    pub fn new(data: &'a mut [T]) -> Self {
        Self { base: data.as_mut_ptr(), len: data.len(), _borrow: std::marker::PhantomData }
    }

    /// Elements `at..at + n`.
    ///
    /// # Safety
    /// No two live results overlap.
    ///
    /// # Panics
    /// If the range leaves the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, at: usize, n: usize) -> &mut [T] {
        assert!(at.checked_add(n).is_some_and(|e| e <= self.len), "shard outside its slice");
        // SAFETY: inside the borrowed slice by the assertion; exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at), n) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, AtomicUsize};

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for round in 0..3000 {
                let n = round % 17;
                let hits: Vec<AtomicU32> = (0..n).map(|_| AtomicU32::new(0)).collect();
                pool.run(n, |i| {
                    hits[i].fetch_add(1, Relaxed);
                });
                assert!(hits.iter().all(|h| h.load(Relaxed) == 1), "{threads} threads, {n} tasks");
            }
        }
    }

    #[test]
    fn callers_may_share_and_nest() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        pool.run(3, |_| {
                            pool.run(2, |i| {
                                sum.fetch_add(i, Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Relaxed), 4 * 200 * 3);
    }

    #[test]
    fn sleeping_workers_wake() {
        let pool = Pool::new(3);
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let mut v = vec![0u32; 1000];
            pool.run_chunks(&mut v, 7, |i, c| c.fill(i as u32));
            assert!(v.iter().enumerate().all(|(i, &x)| x == i as u32 / 7));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let r = catch_unwind(AssertUnwindSafe(|| pool.run(8, |i| assert_ne!(i, 5, "task five"))));
        assert!(r.is_err());
        pool.run(8, |_| {});
    }
}
