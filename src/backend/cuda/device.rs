//! A device, its one stream, its kernels, and the small things a pass sends to it.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DriverError, result};
use cudarc::nvrtc::Ptx;

use super::graph::{GraphStats, Graphs, Launch, Tape};
use super::kernels::{self, Kernel};
use super::memory::{CudaBuf, Dst, Src};
use super::train::Sight;
use super::{Args, images};
use crate::dtype::Elem;
use crate::error::{Error, ErrorKind, Result};

/// An NVIDIA GPU as a backend.
pub struct Cuda {
    pub(super) stream: Arc<Stream>,
    small: Mutex<Small>,
    pub(super) sights: Mutex<Vec<Arc<Sight>>>,
    pub(super) row_independent: bool,
}

/// The stream on which everything runs, and the kernels.
pub(super) struct Stream {
    graphs: Mutex<Graphs<Graph>>,
    /// An error of launches that nobody was there to be told of.
    untold: Mutex<Option<Error>>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Where graphs are captured: a capture takes in all that is queued on its stream, copies of other threads too.
    recorder: Arc<CudaStream>,
    functions: HashMap<&'static str, CudaFunction>,
    shared_memory: usize,
    multiprocessors: usize,
}

pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device(e: DriverError) -> Error {
    Error::new(ErrorKind::Device, format!("CUDA: {e}"))
}

fn missing(why: &str) -> Error {
    Error::new(ErrorKind::Device, format!("{why}; use --device cpu"))
}

/// What is the matter with this machine, if it cannot run the kernels.
fn present() -> Result<()> {
    // SAFETY: opens and closes the driver's library, whose initialisers are trusted as every CUDA program trusts them.
    if !unsafe { sys::is_culib_present() } {
        return Err(missing("no CUDA driver on this machine (libcuda was not found)"));
    }
    result::init().map_err(|e| missing(&format!("the CUDA driver does not start ({e})")))?;
    match result::device::get_count() {
        Ok(n) if n > 0 => Ok(()),
        _ => Err(missing("the CUDA driver finds no GPU")),
    }
}

/// Whether this machine and this binary can run CUDA kernels.
pub fn available() -> bool {
    !images::FATBINS.is_empty() && present().is_ok()
}

/// Names of this machine's GPUs that a driver knows, with their compute capabilities.
///
/// # Errors
/// `Device`: no driver, no GPU.
pub fn devices() -> Result<Vec<String>> {
    present()?;
    let count = result::device::get_count().map_err(device)?;
    let name = |i: i32| {
        let context = CudaContext::new(i as usize).map_err(device)?;
        let (major, minor) = context.compute_capability().map_err(device)?;
        Ok(format!("{} ({major}.{minor})", context.name().map_err(device)?))
    };
    (0..count).map(name).collect()
}

/// Bytes that are free on GPU number `ordinal`.
///
/// # Errors
/// `Device`: no driver, no GPU.
pub fn free_memory(ordinal: usize) -> Result<usize> {
    present()?;
    let context = CudaContext::new(ordinal).map_err(device)?;
    Ok(context.mem_get_info().map_err(device)?.0)
}

impl Cuda {
    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// `Device`: no driver, no GPU, a driver that refuses the kernels, a binary that was built without them.
    pub fn open(ordinal: usize) -> Result<Self> {
        present()?;
        if images::FATBINS.is_empty() && !cfg!(feature = "emu") {
            return Err(missing("this binary was built without CUDA kernels (no nvcc was found)"));
        }
        let context = CudaContext::new(ordinal).map_err(device)?;
        // SAFETY: before any allocation, and all work goes to one stream, whose order is all the tracking there is to do.
        unsafe { context.disable_event_tracking() };
        let (stream, recorder) = (context.new_stream().map_err(device)?, context.new_stream().map_err(device)?);
        let optin = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_memory = context.attribute(optin).map_err(device)?;
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).map_err(device)? as usize;
        let mut modules = HashMap::new();
        let mut functions = HashMap::new();
        for (file, name) in kernels::all() {
            if !modules.contains_key(file) {
                modules.insert(file, Self::module(&context, file)?);
            }
            let f = modules[file].load_function(name).map_err(device)?;
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let own = f.shared_size_bytes().map_err(device)?;
            f.set_attribute(most, shared_memory - own).map_err(device)?;
            functions.insert(name, f);
        }
        let shared_memory = shared_memory as usize;
        let (graphs, untold) = Default::default();
        let stream = Stream { graphs, untold, context, stream, recorder, functions, shared_memory, multiprocessors };
        let stream = Arc::new(stream);
        Ok(Self { stream, small: Mutex::default(), sights: Mutex::default(), row_independent: true })
    }

    fn module(context: &Arc<CudaContext>, file: &str) -> Result<Arc<CudaModule>> {
        let image = images::FATBINS.iter().find(|(n, _)| *n == file).map(|(_, image)| image.to_vec());
        // The emulator has the kernels linked in and takes any image.
        let Some(image) = image.or(cfg!(feature = "emu").then(|| vec![0; 64])) else {
            return Err(missing(&format!("this binary was built without the kernels of {file}.cu")));
        };
        context.load_module(Ptx::from_binary(image)).map_err(|e| {
            let name = context.name().unwrap_or_default();
            let (major, minor) = context.compute_capability().unwrap_or((0, 0));
            missing(&format!(
                "{name} (compute capability {major}.{minor}) does not take the kernels of {file}.cu ({e})"
            ))
        })
    }

    /// The kernels on CPU threads, behind a stand-in for the CUDA driver: for tests without a GPU.
    #[cfg(feature = "emu")]
    pub fn emulated() -> Result<Self> {
        static LOADED: std::sync::OnceLock<std::result::Result<libloading::Library, String>> =
            std::sync::OnceLock::new();
        let load = || {
            // SAFETY: our own library; its initialisers only list the kernels. It takes the place of libcuda, since the
            // loader gives a library that is already loaded under a name to whoever asks for that name.
            unsafe { libloading::Library::new(env!("QUADRIGA_EMU")) }.map_err(|e| e.to_string())
        };
        match LOADED.get_or_init(load) {
            Ok(_) => Self::open(0),
            Err(e) => Err(Error::new(ErrorKind::Device, format!("the emulator does not load: {e}"))),
        }
    }

    /// Lets long passes use the attention that suits them best, whose sums are in another order than those of short ones: a
    /// row's last bits then depend on the length of its pass.
    pub fn fastest(mut self) -> Self {
        self.row_independent = false;
        self
    }

    /// Hands every kernel to the driver by itself, without graphs.
    pub fn without_graphs(self) -> Self {
        lock(&self.stream.graphs).on = false;
        self
    }

    /// How often passes went to the device as graphs.
    pub fn graph_stats(&self) -> GraphStats {
        lock(&self.stream.graphs).stats
    }

    /// Name of the device.
    pub fn name(&self) -> String {
        self.stream.context.name().unwrap_or_else(|_| "unnamed CUDA device".into())
    }

    /// Waits for everything that was queued.
    ///
    /// # Errors
    /// What a kernel or a copy met.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.flush()?;
        self.stream.stream.synchronize().map_err(device)
    }

    /// The small buffers; held until the launch that reads them is queued, so that no other thread writes in between.
    pub(super) fn small(&self) -> MutexGuard<'_, Small> {
        let mut small = lock(&self.small);
        small.tidy();
        small
    }

    /// Queues a kernel.
    pub(super) fn launch<A: Args>(
        &self,
        kernel: Kernel<A>,
        args: A,
        grid: [usize; 3],
        block: usize,
        shared: usize,
    ) -> Result<()> {
        self.stream.launch(kernel, args, grid, block, shared)
    }
}

impl Stream {
    /// Bytes of shared memory that a block may have.
    pub fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    /// Of the device.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub fn zeros(&self, bytes: usize) -> Result<(CudaSlice<u8>, u64)> {
        let memory = self.stream.alloc_zeros::<u8>(bytes.max(1)).map_err(|e| {
            let free = self.context.mem_get_info().map_or(0, |(free, _)| free);
            let says = format!("cannot reserve {bytes} bytes on the GPU, of which {free} are free ({e})");
            Error::new(ErrorKind::Capacity, says)
        })?;
        let (address, _) = cudarc::driver::DevicePtr::device_ptr(&memory, &self.stream);
        Ok((memory, address))
    }

    pub fn upload<T: Elem>(&self, dst: Dst<'_, T>, src: &[T]) -> Result<()> {
        assert_eq!(dst.len(), src.len(), "elements of an upload");
        if src.is_empty() {
            return Ok(());
        }
        self.flush()?;
        // SAFETY: `dst` is as long as `src` and lent for writing; the driver stages pageable memory before it returns.
        unsafe { result::memcpy_htod_async(dst.address(), src, self.stream.cu_stream()) }.map_err(device)
    }

    pub fn download<T: Elem>(&self, src: Src<'_, T>, dst: &mut [T]) -> Result<()> {
        assert_eq!(dst.len(), src.len(), "elements of a download");
        if dst.is_empty() {
            return Ok(());
        }
        self.flush()?;
        // SAFETY: `src` is as long as `dst`, which lives until the stream has been waited for.
        unsafe { result::memcpy_dtoh_async(dst, src.address(), self.stream.cu_stream()) }.map_err(device)?;
        self.stream.synchronize().map_err(device)
    }

    pub fn copy<T: Elem>(&self, dst: Dst<'_, T>, src: Src<'_, T>) -> Result<()> {
        assert_eq!(dst.len(), src.len(), "elements of a copy");
        if dst.len() == 0 {
            return Ok(());
        }
        self.flush()?;
        let bytes = src.len() * size_of::<T>();
        // SAFETY: both are as long, one is lent for writing alone.
        unsafe { result::memcpy_dtod_async(dst.address(), src.address(), bytes, self.stream.cu_stream()) }
            .map_err(device)
    }

    /// Queues a kernel.
    fn launch<A: Args>(&self, k: Kernel<A>, args: A, grid: [usize; 3], block: usize, shared: usize) -> Result<()> {
        if lock(&self.graphs).push(k, &args, grid, block, shared) { self.flush() } else { Ok(()) }
    }

    /// Gives the driver all that is queued, before something else is.
    pub fn flush(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(device)?;
        let done = lock(&self.graphs).flush(|t| self.play(t, &self.stream), |t| self.capture(t), |g| self.replay(g));
        match lock(&self.untold).take() {
            Some(e) => Err(e),
            None => done,
        }
    }

    /// [`Stream::flush`] where there is nobody to be told of an error: the next one is.
    pub fn flush_later_told(&self) {
        if let Err(e) = self.flush() {
            *lock(&self.untold) = Some(e);
        }
    }

    fn play(&self, tape: &Tape, on: &CudaStream) -> Result<()> {
        tape.iter().try_for_each(|(launch, args)| self.run(launch, args, on))
    }

    fn run(&self, launch: &Launch, args: &[u64], on: &CudaStream) -> Result<()> {
        let Launch { kernel, grid, block, shared, .. } = launch;
        let [x, y, z] = *grid;
        let f = self.functions[kernel].cu_function();
        let mut params = [args.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the kernel takes one struct, whose words these are (a kernel's name and type stand together in the table,
        // and both sides of the struct come from one contract, which its constructor has checked); the driver reads as many
        // as the kernel declares, before it returns.
        let run = unsafe { result::launch_kernel(f, (x, y, z), (*block, 1, 1), *shared, on.cu_stream(), &mut params) };
        run.map_err(|e| Error::new(ErrorKind::Device, format!("CUDA: {kernel} [{x}, {y}, {z}] x {block}: {e}")))
    }

    fn capture(&self, tape: &Tape) -> Result<Graph> {
        let (stream, mode) = (self.recorder.cu_stream(), sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        // SAFETY: our stream, which captures nothing yet: the tape's lock is held.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(device)?;
        let played = self.play(tape, &self.recorder);
        // SAFETY: it was begun above, and must end even if a launch failed.
        let graph = unsafe { result::stream::end_capture(stream) }.map_err(device)?;
        // SAFETY: a graph that is valid, as the line above says, and is not used any more after the next one.
        let exec = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: as above.
        unsafe { result::graph::destroy(graph) }.map_err(device)?;
        let exec = Graph { exec: exec.map_err(device)?, context: self.context.clone() };
        played.map(|()| exec)
    }

    /// Makes every further capture fail.
    #[cfg(all(test, feature = "emu"))]
    pub fn occupy_recorder(&self) {
        self.recorder.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: both are ours and live; what the graph's kernels use is what the tape's launches name, by equal arguments.
        unsafe { result::graph::launch(graph.exec, self.stream.cu_stream()) }.map_err(device)
    }
}

/// A graph that can be launched.
struct Graph {
    exec: sys::CUgraphExec,
    context: Arc<CudaContext>,
}

// SAFETY: a handle of the driver, which any thread may use; the lock around it lets one at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made in `capture`, and gone with this.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}

/// What a [`Small`] buffer holds.
#[derive(Clone, Copy)]
pub(super) enum Slot {
    Tokens,
    Rows,
    Every,
    Path,
    Segments,
    TreeBits,
    Parts,
    Stats,
    Draws,
    Trees,
    TreeTokens,
    TreeParents,
    Drafts,
    Chances,
    Penalties,
    Forbidden,
    Texts,
    Positions,
    Ends,
    Ranges,
}

/// Bytes of tables that are kept.
const TABLES: usize = 64 << 20;

/// Buffers that ops share: what the host sends with a pass, and scratch. Each grows to the largest pass.
#[derive(Default)]
pub(super) struct Small {
    entries: [Entry; Slot::Ranges as usize + 1],
    tables: HashMap<Vec<u8>, CudaBuf<u8>>,
    table_bytes: usize,
}

#[derive(Default)]
struct Entry {
    device: Option<CudaBuf<u8>>,
    /// What the device holds, of what was sent from here.
    sent: Vec<u8>,
}

impl Small {
    /// `data` on the device; what is there already is not sent again (the segments of a pass are the same for all layers).
    pub fn put<T: Elem>(&mut self, stream: &Arc<Stream>, slot: Slot, data: &[T]) -> Result<Src<'static, T>> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let dst = self.room::<T>(stream, slot, data.len())?;
        let entry = &mut self.entries[slot as usize];
        if entry.sent != bytes {
            entry.sent.clear();
            if let Some(device) = &mut entry.device {
                stream.upload(crate::backend::Buffer::head_mut(device, bytes.len()), bytes)?;
            }
            entry.sent.extend_from_slice(bytes);
        }
        Ok(Src::at(dst.address(), dst.len()))
    }

    /// `data` on the device, kept under its content: tables of which a step has many, and the next one the same. They last while
    /// the guard does.
    pub fn table<T: Elem>(&mut self, stream: &Arc<Stream>, data: &[T]) -> Result<Src<'static, T>> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        if !self.tables.contains_key(bytes) {
            self.tables.insert(bytes.to_vec(), CudaBuf::of(stream, bytes)?);
            self.table_bytes += bytes.len().max(256);
        }
        Ok(Src::at(self.tables[bytes].address(), data.len()))
    }

    /// Drops the tables when they are too many.
    fn tidy(&mut self) {
        if self.table_bytes > TABLES {
            self.tables.clear();
            self.table_bytes = 0;
        }
    }

    /// Takes `data` for sent: what a forgotten copy would be.
    #[cfg(all(test, feature = "emu"))]
    pub fn pretend<T: Elem>(&mut self, slot: Slot, data: &[T]) {
        self.entries[slot as usize].sent = bytemuck::cast_slice(data).to_vec();
    }

    /// Room for `n` elements, of any content.
    pub fn room<T: Elem>(&mut self, stream: &Arc<Stream>, slot: Slot, n: usize) -> Result<Dst<'static, T>> {
        let entry = &mut self.entries[slot as usize];
        let bytes = n * size_of::<T>();
        let device = match entry.device.take() {
            Some(d) if crate::backend::Buffer::len(&d) >= bytes => d,
            _ => {
                entry.sent.clear();
                CudaBuf::zeros(stream, bytes.next_power_of_two().max(256))?
            }
        };
        let address = device.address();
        entry.device = Some(device);
        Ok(Dst::at(address, n))
    }
}
