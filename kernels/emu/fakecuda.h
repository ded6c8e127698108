// The part of the CUDA driver that the engine's host code calls, over the emulator. Linked with the kernels into one library that
// takes libcuda.so's place in tests, so that the real host code is tested without a GPU.
//
//   fakecuda.cpp          devices, contexts, modules, launches
//   fakecuda_memory.cpp   memory and copies
//   fakecuda_stream.cpp   streams and events
//   fakecuda_graph.cpp    captures and graphs
//
// - Device memory comes from the heap (so ASan sees it) and begins as NaN; ranges that are freed or too long give CUDA's errors.
// - Work waits in its stream until somebody synchronises, and then runs in a pseudo-random order of streams (EMU_SEED) that
//   respects events: a wait between streams that is missing shows. Host memory that is not pinned is copied at once, as CUDA does.
// - A capture records what its stream is given: arguments by value, host memory by address, as CUDA does. Calls that CUDA forbids
//   meanwhile fail and spoil it. Whatever runs is checked when it runs: a graph whose memory was freed ends the program.
//   Not emulated: memory nodes, captures that spread to other streams.
//
// EMU_SEED: 0 or unset, threads run in order; else pseudo-random schedules. EMU_THREADS: OS threads that share a launch's blocks.
// EMU_CAPABILITY: the compute capability that the device claims, 80 if unset; 90 brings what only Hopper has.
#pragma once
#include "emu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
#define API extern "C" __attribute__((visibility("default"))) CUresult
#define LOCK std::lock_guard<std::recursive_mutex> lock_(fake::mutex)

namespace fake {
enum {
  OK = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_DEVICE = 101,
  ILLEGAL_STATE = 401,
  NOT_FOUND = 500,
  NOT_READY = 600,
  COOPERATIVE_LAUNCH_TOO_LARGE = 720,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_ISOLATION = 905,
  CAPTURED_EVENT = 907,
  CAPTURE_WRONG_THREAD = 908
};
using Clock = std::chrono::steady_clock;
using Op = std::function<bool()>;  // false: it cannot run yet
using Graph = std::vector<Op>;

enum Mode { GLOBAL, THREAD_LOCAL, RELAXED };
struct Capture {
  Mode mode;
  std::thread::id owner;
  Graph graph;
  bool spoilt = false;
};
struct Event {
  uint64_t recorded = 0, done = 0;
  Clock::time_point at;
  const Capture* capture = nullptr;  // in which it was recorded last
};
struct Stream {
  std::deque<Op> queue;
  std::unique_ptr<Capture> capture;
};

extern std::recursive_mutex mutex;
extern std::vector<Stream*> streams;

Stream* stream(void* handle);
// Queues work, or records it where the stream is captured.
CUresult enqueue(void* stream, Op op);
// Runs queued work until `until` (null: every stream) has none left.
void drain(Stream* until);
uint64_t random_bits();
bool in_device(const void* p, size_t bytes);
// What a call that waits or may wait gives: an error, and spoilt captures, where it is forbidden during a capture.
CUresult may_wait();
// The same for work that a captured stream cannot take.
CUresult refuse(Stream* s, CUresult why);
}  // namespace fake
