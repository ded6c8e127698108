// The one header that a kernel includes: one source, two compilers.
//   nvcc         real CUDA; the functions of namespace gpu are inline PTX (hw.cuh)
//   g++, clang++ each CUDA thread is a fiber and warp collectives are rendezvous (emu/emu.h)
//
// Rules of a kernel file: shared memory through GPU_SMEM(T, name, [N][M]) (16-byte aligned) or GPU_DYN_SMEM(T, name); PTX only
// through gpu::*; warp reductions through reduce.cuh; every entry point is KERNEL(name, Args, threads), or KERNEL(name, Args,
// threads, blocks) where registers are to suffice for that many blocks at once; its one argument `a` is a struct of
// kernels/args/*.h.
#pragma once
#if defined(__CUDACC__)
#define GPU_EMU 0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
typedef __nv_bfloat16 bf16_t;
typedef __half f16_t;
#define GPU_SMEM(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define GPU_DYN_SMEM(T, name)                                       \
  extern __shared__ __align__(128) unsigned char gpu_dyn_smem[]; \
  T* name = reinterpret_cast<T*>(gpu_dyn_smem)
#define GPU_UNROLL _Pragma("unroll")
#define KERNEL(name, Args, ...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Args a)
#include "hw.cuh"
#else
#define GPU_EMU 1
#include "../emu/emu.h"
#define KERNEL(name, Args, ...)       \
  extern "C" void name(const Args a); \
  GPU_EXPORT(name)                     \
  extern "C" void name(const Args a)
#endif
#define DEVICE static __device__ __forceinline__
#include "contract.cuh"
#include "reduce.cuh"
#include "widen.cuh"
