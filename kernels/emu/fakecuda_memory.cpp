// Memory and copies.
#include "fakecuda.h"

using namespace fake;

namespace {
using Ranges = std::map<uintptr_t, size_t>;

constexpr size_t MEMORY = 8ull << 30;
Ranges device, pinned;
size_t device_used = 0;

bool within(const Ranges& ranges, const void* p, size_t n) {
  auto it = ranges.upper_bound(uintptr_t(p));
  if (it == ranges.begin()) return false;
  --it;
  return uintptr_t(p) + n <= it->first + it->second;
}

CUresult check(CUdeviceptr p, size_t n) {
  if (in_device(reinterpret_cast<void*>(p), n)) return OK;
  fprintf(stderr, "fakecuda: range %llx+%zu is not device memory\n", p, n);
  return INVALID_VALUE;
}
// The same when work runs: it may have been recorded long ago.
void check_now(CUdeviceptr p, size_t n) {
  if (check(p, n)) abort();
}

void release(CUdeviceptr p) {
  auto it = device.find(p);
  if (it == device.end()) {
    fprintf(stderr, "fakecuda: free of a pointer that is not allocated\n");
    abort();
  }
  device_used -= it->second;
  device.erase(it);
  free(reinterpret_cast<void*>(p));
}

CUresult allocate(CUdeviceptr* p, size_t n) {
  if (!n) return INVALID_VALUE;
  if (n > MEMORY - device_used) return OUT_OF_MEMORY;
  void* memory = aligned_alloc(256, (n + 255) & ~size_t(255));
  if (!memory) return OUT_OF_MEMORY;
  memset(memory, 0xff, n);
  device[uintptr_t(memory)] = n;
  device_used += n;
  *p = CUdeviceptr(memory);
  return OK;
}
}  // namespace

bool fake::in_device(const void* p, size_t bytes) { return !bytes || within(device, p, bytes); }

API cuDeviceTotalMem_v2(size_t* n, int) {
  *n = MEMORY;
  return OK;
}
API cuMemGetInfo_v2(size_t* free, size_t* total) {
  LOCK;
  *total = MEMORY;
  *free = MEMORY - device_used;
  return OK;
}
API cuMemAlloc_v2(CUdeviceptr* p, size_t n) {
  LOCK;
  if (int e = may_wait()) return e;
  return allocate(p, n);
}
API cuMemAllocAsync(CUdeviceptr* p, size_t n, void* s) {
  LOCK;
  return stream(s)->capture ? refuse(stream(s), NOT_SUPPORTED) : allocate(p, n);
}
API cuMemFree_v2(CUdeviceptr p) {
  LOCK;
  if (int e = may_wait()) return e;
  drain(nullptr);
  release(p);
  return OK;
}
API cuMemFreeAsync(CUdeviceptr p, void* s) {
  LOCK;
  if (stream(s)->capture) return refuse(stream(s), NOT_SUPPORTED);
  return enqueue(s, [p] {
    release(p);
    return true;
  });
}
API cuMemHostAlloc(void** p, size_t n, unsigned) {
  LOCK;
  if (int e = may_wait()) return e;
  *p = aligned_alloc(64, (n + 63) & ~size_t(63));
  if (!*p) return OUT_OF_MEMORY;
  pinned[uintptr_t(*p)] = n;
  return OK;
}
API cuMemFreeHost(void* p) {
  LOCK;
  if (int e = may_wait()) return e;
  drain(nullptr);
  pinned.erase(uintptr_t(p));
  free(p);
  return OK;
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void* h, size_t n, void* s) {
  LOCK;
  if (int e = check(d, n)) return e;
  void* to = reinterpret_cast<void*>(d);
  if (within(pinned, h, n) || stream(s)->capture) {  // read when the copy runs
    return enqueue(s, [=] {
      check_now(d, n);
      memcpy(to, h, n);
      return true;
    });
  }
  auto staged = std::make_shared<std::vector<char>>(static_cast<const char*>(h), static_cast<const char*>(h) + n);
  return enqueue(s, [=] {
    memcpy(to, staged->data(), n);
    return true;
  });
}
API cuMemcpyDtoHAsync_v2(void* h, CUdeviceptr d, size_t n, void* s) {
  LOCK;
  if (int e = check(d, n)) return e;
  const CUresult e = enqueue(s, [=] {
    check_now(d, n);
    memcpy(h, reinterpret_cast<void*>(d), n);
    return true;
  });
  if (!e && !stream(s)->capture && !within(pinned, h, n)) drain(stream(s));
  return e;
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr from, size_t n, void* s) {
  LOCK;
  if (check(d, n) || check(from, n)) return INVALID_VALUE;
  return enqueue(s, [=] {
    check_now(d, n), check_now(from, n);
    memmove(reinterpret_cast<void*>(d), reinterpret_cast<void*>(from), n);
    return true;
  });
}
API cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, void* s) {
  LOCK;
  if (int e = check(d, n)) return e;
  return enqueue(s, [=] {
    check_now(d, n);
    memset(reinterpret_cast<void*>(d), v, n);
    return true;
  });
}
API cuMemcpyHtoD_v2(CUdeviceptr d, const void* h, size_t n) {
  LOCK;
  if (int e = may_wait()) return e;
  if (int e = cuMemcpyHtoDAsync_v2(d, h, n, nullptr)) return e;
  drain(stream(nullptr));
  return OK;
}
API cuMemcpyDtoH_v2(void* h, CUdeviceptr d, size_t n) {
  LOCK;
  if (int e = may_wait()) return e;
  drain(nullptr);
  return cuMemcpyDtoHAsync_v2(h, d, n, nullptr);
}
API cuTensorMapEncodeTiled(EmuTensorMap* map, int type, unsigned rank, void* base, const uint64_t* dims, const uint64_t* strides,
                           const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int /*promotion*/, int fill) {
  LOCK;
  const char* why = emu_tensor_map(map, type, rank, base, dims, strides, box, step, interleave, swizzle, fill);
  if (!why) {
    uint64_t last = map->size;  // bytes from the first element to behind the last
    for (unsigned i = 0; i < rank; i++) last += map->last[i] * map->stride[i];
    if (check(CUdeviceptr(base), last)) why = "the tensor is not within device memory";
  }
  if (!why) return OK;
  fprintf(stderr, "fakecuda: tensor map: %s\n", why);
  return INVALID_VALUE;
}
