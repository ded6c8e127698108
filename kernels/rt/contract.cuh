// What an argument struct of kernels/args/*.h is made of. One field a line; the comment behind it is its contract, which
// build.rs turns into the Rust struct, its checks and the entry check under emulation:
//
//   ARGS(RmsNorm) {
//     In<float> x;     // [rows, d] align 16
//     Out<bf16_t> y;   // [rows, d] align 16
//     u32 rows;        // >= 1
//     u32 d;           // % 8 == 0
//     float eps;       // > 0
//   };
//
// Extents are products of integer fields and literals, `[rows, (d + 31) / 32, 2]`. Rules of a scalar are separated by commas. What
// follows a dash is prose: `u32 d; // % 8 == 0 - columns`.
#pragma once
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t i32;

// A span that the kernel reads.
template <class T>
struct In {
  const T* p;
  __device__ __forceinline__ operator const T*() const { return p; }
};
// A span that the kernel writes.
template <class T>
struct Out {
  T* p;
  __device__ __forceinline__ operator T*() const { return p; }
};
// A span that the kernel reads and writes.
template <class T>
struct InOut {
  T* p;
  __device__ __forceinline__ operator T*() const { return p; }
};
#define ARGS(Name) struct Name
// A plain struct that spans may hold.
#define RECORD(Name) struct alignas(8) Name
#include "../args/args.h"
#if GPU_EMU && __has_include("args_check.h")
#include "args_check.h"
#endif
