// Single weights of the block formats, from the planes of rt/quant.cuh.
#pragma once

enum Blocks { Q8_0, Q4_0, Q4_1, Q4_K, Q6_K };

// Input k of output o. The arguments have the planes, and their words of a tile.
template <Blocks F, class Args>
DEVICE float weight(const Args& a, u32 inputs, u32 o, u32 k) {
  const u32 tiles = (inputs + 63) / 64, tile = o / 16 * tiles + k / 64, g = o % 8, i = o / 8 % 2, block = k / 32 % 2, n = k % 32;
  const u32* quants = a.quants + (size_t)tile * a.quant_words;
  const u32* scales = a.scales + (size_t)tile * a.scale_words;
  const auto half = [&](u32 word) { return i ? gpu::f16_high(word) : gpu::f16_low(word); };
  if (F == Q8_0) {
    const u32 lane = 4 * g + n / 8, byte = n % 4 == 1 ? 2 : n % 4 == 2 ? 1 : n % 4;
    const u32 word = quants[(block * 32 + lane) * 4 + 2 * i + n / 4 % 2];
    return half(scales[g * 2 + block]) * float(int(word << (24 - 8 * byte)) >> 24);
  }
  // Which of the lane's eight inputs it is, in pairs.
  const u32 lane = 4 * g + (F == Q6_K ? n % 16 / 4 : n / 8), at = F == Q6_K ? n / 16 * 4 + n % 4 : n % 8;
  const u32 nibble = at % 2 * 4 + at / 2;
  const u32 q = quants[(lane * 2 + block) * 2 + i] >> (4 * nibble) & 15;
  if (F == Q4_0) return half(scales[g * 2 + block]) * float(int(q) - 8);
  if (F == Q4_1) return half(scales[g * 4 + block]) * float(q) + half(scales[g * 4 + 2 + block]);
  const u32* supers = a.supers + (size_t)(o / 16 * (inputs / 256) + k / 256) * a.super_words;
  const u32 sub = scales[g * 2 + i];
  if (F == Q4_K) {
    const u32 d = supers[g * 2 + i];
    const float scale = gpu::f16_low(d) * float(sub >> (8 * block) & 255), min = gpu::f16_high(d) * float(sub >> (16 + 8 * block) & 255);
    return scale * float(q) - min;
  }
  const u32 high = a.high[(size_t)tile * a.high_words + lane * 2 + i] >> (2 * (4 * block + at / 2) + 16 * (at % 2)) & 3;
  const float scale = half(supers[g]) * float(int(sub << (24 - 8 * (2 * block + n / 16))) >> 24);
  return scale * float(int(q | high << 4) - 32);
}
