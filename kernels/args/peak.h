// Roofs of the device.
#pragma once

// Products in registers only: y is written so that nothing is left out.
ARGS(MmaPeak) {
  Out<float> y;  // [blocks, 256] align 4
  u32 blocks;    // >= 1
  u32 steps;     // >= 1 - of eight products m16n8k16 a warp
};
