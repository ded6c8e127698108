// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011). A draw is a pure function of (seed, stream, counter), the
// same on the host and on every device.
#pragma once

DEVICE uint4 philox(uint2 key, uint4 c) {
  for (int round = 0; round < 10; round++) {
    const u64 a = (u64)0xD2511F53u * c.x, b = (u64)0xCD9E8D57u * c.z;
    c = make_uint4((u32)(b >> 32) ^ c.y ^ key.x, (u32)b, (u32)(a >> 32) ^ c.w ^ key.y, (u32)a);
    key = make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
  }
  return c;
}
// The counter's block of a seed's stream.
DEVICE uint4 philox(u64 seed, u64 stream, u64 counter) {
  return philox(make_uint2((u32)seed, (u32)(seed >> 32)),
                make_uint4((u32)counter, (u32)(counter >> 32), (u32)stream, (u32)(stream >> 32)));
}
// Its first 64 bits.
DEVICE u64 random_bits(u64 seed, u64 stream, u64 counter) {
  const uint4 r = philox(seed, stream, counter);
  return r.x | (u64)r.y << 32;
}
