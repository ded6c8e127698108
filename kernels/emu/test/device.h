// Runs self-test kernels on the emulator or, given compiled images, on a GPU through its driver:
//
//   SELFTEST_IMAGES=selftest.fatbin:selftest_hopper.fatbin test_selftest
//
// SELFTEST_LIBCUDA names the driver's library (libcuda.so.1).
#pragma once
#include "harness.h"
#include <dlfcn.h>
#include <fstream>
#include <iterator>
#include <string>

namespace test {
class Gpu {
 public:
  static Gpu* get() {  // null: the emulator
    static Gpu* gpu = getenv("SELFTEST_IMAGES") ? new Gpu(getenv("SELFTEST_IMAGES")) : nullptr;
    return gpu;
  }
  bool hopper() {
    int major = 0;
    call<int(int*, int, int)>("cuDeviceGetAttribute", &major, 75, 0);
    return major == 9;
  }
  uint64_t alloc(size_t bytes) {
    uint64_t p = 0;
    call<int(uint64_t*, size_t)>("cuMemAlloc_v2", &p, bytes);
    return p;
  }
  void free(uint64_t p) { call<int(uint64_t)>("cuMemFree_v2", p); }
  void upload(uint64_t d, const void* h, size_t n) { call<int(uint64_t, const void*, size_t)>("cuMemcpyHtoD_v2", d, h, n); }
  void download(void* h, uint64_t d, size_t n) { call<int(void*, uint64_t, size_t)>("cuMemcpyDtoH_v2", h, d, n); }
  void launch(const char* name, void* args, unsigned grid, unsigned block, unsigned smem, bool cooperative) {
    void *f = nullptr, *params[] = {args};
    for (void* m : modules)
      if (symbol<int(void**, void*, const char*)>("cuModuleGetFunction")(&f, m, name) == 0) break;
    if (!f) fail(name, "is in none of the images");
    if (smem > 48 << 10) call<int(void*, int, int)>("cuFuncSetAttribute", f, 8, int(smem));
    using U = unsigned;
    if (cooperative) {
      call<int(void*, U, U, U, U, U, U, U, void*, void**)>("cuLaunchCooperativeKernel", f, grid, 1u, 1u, block, 1u, 1u, smem, nullptr, params);
    } else {
      call<int(void*, U, U, U, U, U, U, U, void*, void**, void**)>("cuLaunchKernel", f, grid, 1u, 1u, block, 1u, 1u, smem, nullptr, params,
                                                                   nullptr);
    }
    call<int()>("cuCtxSynchronize");
  }
  template <class F>
  F* symbol(const char* name) {
    void* p = dlsym(library, name);
    if (!p) fail(name, "is not in the driver");
    return reinterpret_cast<F*>(p);
  }
  template <class F, class... A>
  void call(const char* name, A... a) {
    if (int e = symbol<F>(name)(a...)) fail(name, ("failed with error " + std::to_string(e)).c_str());
  }

 private:
  void* library;
  std::vector<void*> modules;
  [[noreturn]] static void fail(const char* what, const char* how) {
    printf("%s %s\n", what, how);
    exit(2);
  }
  explicit Gpu(std::string images) {
    const char* path = getenv("SELFTEST_LIBCUDA");
    library = dlopen(path ? path : "libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!library) fail("the driver", dlerror());
    void* context = nullptr;
    call<int(unsigned)>("cuInit", 0u);
    call<int(void**, int)>("cuDevicePrimaryCtxRetain", &context, 0);
    call<int(void*)>("cuCtxSetCurrent", context);
    for (size_t at = 0; at < images.size();) {
      const size_t end = std::min(images.find(':', at), images.size());
      std::ifstream file(images.substr(at, end - at), std::ios::binary);
      std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
      if (image.empty()) fail(images.substr(at, end - at).c_str(), "cannot be read");
      void* module = nullptr;
      // An image may hold nothing for this GPU (Hopper's own kernels): its tests are skipped, or will not find it.
      if (symbol<int(void**, const void*)>("cuModuleLoadData")(&module, image.data()) == 0) modules.push_back(module);
      at = end + 1;
    }
  }
};

// Memory that kernels read and write: the host's own under emulation, a copy of it on a GPU.
template <class T>
struct Buffer : Array<T> {
  uint64_t device = 0;
  explicit Buffer(size_t n) : Array<T>(n) {
    if (Gpu* g = Gpu::get()) device = g->alloc(n * sizeof(T));
  }
  ~Buffer() {
    if (device) Gpu::get()->free(device);
  }
  T* arg() const { return device ? reinterpret_cast<T*>(device) : this->p; }
  void upload() const {
    if (device) Gpu::get()->upload(device, this->p, this->n * sizeof(T));
  }
  void download() {
    if (device) Gpu::get()->download(this->p, device, this->n * sizeof(T));
  }
};

// Runs a kernel whose output is `out`; under emulation with three schedules, which must agree.
template <class Args, class T, class... Inputs>
void run_kernel(const char* name, Args args, unsigned grid, unsigned block, size_t smem, bool cooperative, Buffer<T>& out, const Inputs&... in) {
  (in.upload(), ...);
  out.upload();
  if (Gpu* g = Gpu::get()) {
    g->launch(name, &args, grid, block, unsigned(smem), cooperative);
  } else if (cooperative) {
    void* params[] = {&args};
    std::vector<T> before(out.p, out.p + out.n), first;
    for (uint64_t seed : {0, 11, 12}) {
      std::copy(before.begin(), before.end(), out.p);
      EmuClosure c = find(name)->bind(params);
      emu_launch_cooperative(c.run, c.state, grid, block, smem, seed);
      c.drop(c.state);
      if (!seed) first.assign(out.p, out.p + out.n);
      CHECK(!memcmp(first.data(), out.p, out.n * sizeof(T)), "%s: schedule %d differs", name, int(seed));
    }
  } else {
    launch3(name, args, grid, block, smem, out);
  }
  out.download();
}

// Sizes from the innermost dimension on; strides in bytes, of all dimensions but that.
inline gpu::TensorMap tensor_map(int type, const void* base, std::vector<uint64_t> dims, std::vector<uint64_t> strides,
                                 std::vector<uint32_t> box, int swizzle) {
  gpu::TensorMap map;
  const std::vector<uint32_t> step(dims.size(), 1);
  const unsigned rank = unsigned(dims.size());
  if (Gpu* g = Gpu::get()) {
    using Encode = int(void*, int, unsigned, const void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int, int, int, int);
    g->call<Encode>("cuTensorMapEncodeTiled", &map, type, rank, base, dims.data(), strides.data(), box.data(), step.data(), 0, swizzle, 0, 0);
  } else if (const char* why = emu_tensor_map(&map, type, rank, base, dims.data(), strides.data(), box.data(), step.data(), 0, swizzle, 0)) {
    CHECK(false, "tensor map: %s", why);
  }
  return map;
}
}  // namespace test
