// Stored numbers as f32.
#pragma once

DEVICE float widen(float v) { return v; }
DEVICE float widen(bf16_t v) { return gpu::to_f32(v); }
DEVICE float widen(f16_t v) { return gpu::to_f32(v); }
