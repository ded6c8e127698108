// The non-linearities of a gated unit.
#pragma once

DEVICE float silu(float x) { return x / (1.f + gpu::ex2(-1.44269504f * x)); }
DEVICE float gelu_tanh(float x) { return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }
// act 0 is SiLU, 1 GELU in its tanh form.
DEVICE float activate(u32 act, float x) { return act ? gelu_tanh(x) : silu(x); }
// Its derivative.
DEVICE float slope(u32 act, float x) {
  if (act) {
    const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.79788456f * (1.f + 3.f * 0.044715f * x * x);
  }
  const float s = 1.f / (1.f + gpu::ex2(-1.44269504f * x));
  return s * (1.f + x * (1.f - s));
}
