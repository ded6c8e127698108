// The stand-in driver: what a capture records, when it runs, and what is forbidden meanwhile.
#include "harness.h"

struct Bump {
  float* x;
  const float* by;  // added to every element, read when the kernel runs
  float more;       // likewise, but an argument
  uint32_t n;
};
KERNEL(bump, Bump, 32) {
  for (uint32_t i = threadIdx.x; i < a.n; i += blockDim.x) a.x[i] += *a.by + a.more;
}

#include "../fakecuda.cpp"
#include "../fakecuda_graph.cpp"
#include "../fakecuda_memory.cpp"
#include "../fakecuda_stream.cpp"
#include <sys/wait.h>
#include <unistd.h>

namespace {
constexpr uint32_t N = 40;

struct Device {
  void *stream, *f;
  CUdeviceptr x, by;
  float host[N], one = 1;

  Device() {
    cuStreamCreate(&stream, 1);
    cuModuleGetFunction(&f, nullptr, "bump");
    cuMemAlloc_v2(&x, sizeof host);
    cuMemAlloc_v2(&by, sizeof one);
    cuMemsetD8Async(x, 0, sizeof host, stream);
    send(1);
  }
  ~Device() {
    cuMemFree_v2(x);
    if (by) cuMemFree_v2(by);
    cuStreamDestroy_v2(stream);
  }
  // `by` becomes v, ahead of what is queued from now on.
  void send(float v) {
    one = v;
    cuMemcpyHtoDAsync_v2(by, &one, sizeof one, stream);
  }
  CUresult bump(float more) {
    Bump a{reinterpret_cast<float*>(x), reinterpret_cast<const float*>(by), more, N};
    void* params[] = {&a};
    const CUresult e = cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, stream, params, nullptr);
    a.more = 1e9f;  // the driver has its own copy
    return e;
  }
  CUresult begin(Mode mode = THREAD_LOCAL) { return cuStreamBeginCapture_v2(stream, mode); }
  Graph* captured(float more) {
    Graph *g, *exec;
    CHECK(begin() == OK && bump(more) == OK && cuStreamEndCapture(stream, &g) == OK);
    CHECK(cuGraphInstantiateWithFlags(&exec, g, 0) == OK);
    cuGraphDestroy(g);
    return exec;
  }
  // All elements, which must be alike.
  float value() {
    cuMemcpyDtoHAsync_v2(host, x, sizeof host, stream);
    cuStreamSynchronize(stream);
    for (float v : host) CHECK(v == host[0], "%g beside %g", v, host[0]);
    return host[0];
  }
};

// Whether `f` ends the program; what it says is not shown.
bool dies(const std::function<void()>& f) {
  fflush(stdout);
  const pid_t child = fork();
  if (!child) {
    fclose(stderr);
    f();
    _exit(0);
  }
  int status;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
}  // namespace

TEST(a_capture_runs_nothing_and_a_launch_runs_it_in_order) {
  Device d;
  Graph* exec = d.captured(2);
  CHECK(d.value() == 0);
  cuGraphLaunch(exec, d.stream);
  d.bump(10);
  cuGraphLaunch(exec, d.stream);
  CHECK(d.value() == 3 + 11 + 3);
  cuGraphLaunch(exec, d.stream);
  cuGraphExecDestroy(exec);  // what is in flight still ends
  CHECK(d.value() == 20);
}

TEST(arguments_are_those_of_the_capture_and_memory_that_of_the_launch) {
  Device d;
  Graph* exec = d.captured(2);  // bump() has since changed its own struct
  cuGraphLaunch(exec, d.stream);
  CHECK(d.value() == 3);
  d.send(5);
  cuGraphLaunch(exec, d.stream);
  CHECK(d.value() == 3 + 7);
  d.one = 100;  // changed, not sent
  cuGraphLaunch(exec, d.stream);
  CHECK(d.value() == 3 + 7 + 7);
  cuGraphExecDestroy(exec);
}

TEST(a_captured_copy_reads_host_memory_when_it_runs) {
  Device d;
  float* pinned;
  Graph *g, *exec;
  cuMemHostAlloc(reinterpret_cast<void**>(&pinned), sizeof(float), 0);
  *pinned = 1;
  d.begin();
  cuMemcpyHtoDAsync_v2(d.by, pinned, sizeof(float), d.stream);
  d.bump(0);
  cuStreamEndCapture(d.stream, &g);
  cuGraphInstantiateWithFlags(&exec, g, 0);
  *pinned = 4;
  cuGraphLaunch(exec, d.stream);
  CHECK(d.value() == 4);
  cuGraphExecDestroy(exec);
  cuGraphDestroy(g);
  cuMemFreeHost(pinned);
}

TEST(forbidden_calls_spoil_a_capture) {
  Device d;
  void* event;
  cuEventCreate(&event, 0);
  const std::pair<const char*, std::function<CUresult()>> calls[] = {
      {"synchronise the stream", [&] { return cuStreamSynchronize(d.stream); }},
      {"synchronise the context", [] { return cuCtxSynchronize(); }},
      {"query an event", [&] { return cuEventQuery(event); }},
      {"allocate", [] { CUdeviceptr p; return cuMemAlloc_v2(&p, 8); }},
      {"allocate in the stream", [&] { CUdeviceptr p; return cuMemAllocAsync(&p, 8, d.stream); }},
      {"free", [&] { return cuMemFree_v2(d.x); }},
      {"free in the stream", [&] { return cuMemFreeAsync(d.x, d.stream); }},
      {"pin", [] { void* p; return cuMemHostAlloc(&p, 8, 0); }},
      {"copy and wait", [&] { return cuMemcpyDtoH_v2(d.host, d.x, 4); }},
      {"load a module", [] { void* m; return cuModuleLoadData(&m, nullptr); }},
  };
  for (const auto& [what, call] : calls) {
    CHECK(d.begin() == OK && d.bump(1) == OK);
    CHECK(call() != OK, "%s", what);
    int status;
    cuStreamIsCapturing(d.stream, &status);
    CHECK(status == 2, "%s", what);
    CHECK(d.bump(1) == CAPTURE_INVALIDATED, "%s", what);
    Graph* g;
    CHECK(cuStreamEndCapture(d.stream, &g) == CAPTURE_INVALIDATED && !g, "%s", what);
    CHECK(d.value() == 0, "%s", what);  // the stream is well again, and nothing has run
  }
  cuEventDestroy_v2(event);
}

TEST(a_capture_has_one_stream_and_one_thread) {
  Device d, other;
  Graph* g;
  CHECK(cuStreamBeginCapture_v2(nullptr, THREAD_LOCAL) == CAPTURE_UNSUPPORTED);
  CHECK(cuStreamEndCapture(d.stream, &g) == ILLEGAL_STATE);
  CHECK(d.begin() == OK && d.begin() == ILLEGAL_STATE);
  other.bump(1);
  CHECK(other.value() == 2);  // other streams go on
  CUdeviceptr p;
  std::thread([&] { CHECK(cuMemAlloc_v2(&p, 8) == OK && cuMemFree_v2(p) == OK); }).join();  // and other threads
  CHECK(cuStreamEndCapture(d.stream, &g) == OK && g->empty());
  cuGraphDestroy(g);

  CHECK(d.begin(GLOBAL) == OK);
  std::thread([&] { CHECK(cuMemAlloc_v2(&p, 8) == CAPTURE_UNSUPPORTED); }).join();
  CHECK(cuStreamEndCapture(d.stream, &g) == CAPTURE_INVALIDATED);

  CHECK(d.begin() == OK);
  std::thread([&] { CHECK(cuStreamEndCapture(d.stream, &g) == CAPTURE_WRONG_THREAD); }).join();
  CHECK(cuStreamEndCapture(d.stream, &g) == CAPTURE_INVALIDATED);

  void* event;
  cuEventCreate(&event, 0);
  cuEventRecord(event, other.stream);
  CHECK(d.begin() == OK && cuStreamWaitEvent(d.stream, event, 0) == CAPTURE_ISOLATION);
  CHECK(cuStreamEndCapture(d.stream, &g) == CAPTURE_INVALIDATED);
  CHECK(d.begin() == OK && cuEventRecord(event, d.stream) == OK);
  CHECK(cuEventQuery(event) == CAPTURED_EVENT && cuStreamWaitEvent(other.stream, event, 0) == NOT_SUPPORTED);
  CHECK(cuStreamEndCapture(d.stream, &g) == OK);
  cuGraphDestroy(g);
  cuEventDestroy_v2(event);
}

TEST(a_graph_whose_memory_was_freed_is_caught) {
  Device d;
  CUdeviceptr y;
  Graph *g, *exec;
  cuMemAlloc_v2(&y, 4);
  d.begin();
  cuMemcpyDtoDAsync_v2(y, d.by, 4, d.stream);
  cuStreamEndCapture(d.stream, &g);
  cuGraphInstantiateWithFlags(&exec, g, 0);
  const auto run = [&] {
    cuGraphLaunch(exec, d.stream);
    cuStreamSynchronize(d.stream);
  };
  CHECK(!dies(run));
  cuMemFree_v2(y);
  CHECK(dies(run));
  cuGraphExecDestroy(exec);
  cuGraphDestroy(g);
}
