// Optimisers: one pass over a tensor, its gradient and its states. A thread owns elements; bound by memory.
#include "rt/gpu.cuh"

KERNEL(optimize, Optimize, 256) {
  for (u32 i = blockIdx.x * 256 + threadIdx.x; i < a.n; i += gridDim.x * 256) {
    float u = a.scale * a.g[i];
    if (a.has_v) {
      const float m = a.m[i] = a.beta1 * a.m[i] + (1.f - a.beta1) * u, v = a.v[i] = a.beta2 * a.v[i] + (1.f - a.beta2) * u * u;
      u = m * a.correct1 / (sqrtf(v * a.correct2) + a.eps);
    } else if (a.has_m) {
      u = a.m[i] = a.beta1 * a.m[i] + u;
    }
    float* from = a.has_anchor ? a.anchor : a.w;
    float w = from[i] - a.lr * (u + a.decay * from[i]);
    if (a.l1 > 0.f) {  // w as it is otherwise: r + (w - r) is not always w
      const float r = a.has_reference ? a.reference[i] : 0.f, gap = w - r;
      w = r + copysignf(fmaxf(fabsf(gap) - a.l1, 0.f), gap);
    }
    from[i] = w;
    if (a.has_anchor) a.w[i] = w - a.lr * u;
  }
}
