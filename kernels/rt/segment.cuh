// Where a row of a pass finds its sequence, its cache, and what it may see.
#pragma once

constexpr u32 MASK_CAUSAL = 0, MASK_FULL = 1, MASK_TREE = 2, MASK_BLOCKS = 3;

// Keys of a layer; its values stand capacity * kv_dim elements behind them.
DEVICE bf16_t* kv_keys(const Seg& s, u32 layer, u32 kv_dim) {
  return reinterpret_cast<bf16_t*>(s.kv) + (size_t)layer * 2 * s.capacity * kv_dim;
}

// The last segment that begins at or before the row. The row is padding if row - first >= rows.
DEVICE Seg segment_of(const Seg* segs, u32 n, u32 row) {
  u32 lo = 0;
  while (n > 1) {
    const u32 half = n / 2;
    if (segs[lo + half].first <= row) lo += half, n -= half;
    else n = half;
  }
  return segs[lo];
}

// Queries of a segment are numbered row * group + head of the group, and cut into tiles of M; tiles are numbered through all
// segments. Gives the tile's segment and its first query. To be called by whole warps; every lane gets the answer.
template <u32 M>
DEVICE bool find_tile(const Seg* segs, u32 n, u32 group, u32 tile, Seg& s, u32& q0) {
  const u32 lane = threadIdx.x & 31;
  for (u32 base = 0; base < n; base += 32) {
    const u32 own = base + lane < n ? (segs[base + lane].rows * group + M - 1) / M : 0;
    u32 upto = own;
    GPU_UNROLL for (int o = 1; o < 32; o *= 2) {
      const u32 below = __shfl_up_sync(FULL, upto, o);
      if (lane >= (u32)o) upto += below;
    }
    const unsigned beyond = __ballot_sync(FULL, upto > tile);
    if (beyond) {
      const int at = __ffs(beyond) - 1;
      s = segs[base + at];
      q0 = (tile - __shfl_sync(FULL, upto - own, at)) * M;
      return true;
    }
    tile -= __shfl_sync(FULL, upto, 31);
  }
  return false;
}

// Cache rows behind which row 0 of the pass stands, and one behind its last row.
DEVICE u32 pass_begin(const Seg& s) { return s.past + s.staged; }
DEVICE u32 pass_end(const Seg& s) { return s.past + s.staged + s.rows; }
// Ancestor words of node n of the tree; row i of the pass is node staged + i.
DEVICE const u64* tree_row(const Seg& s, u32 n) { return reinterpret_cast<const u64*>(s.bits) + (size_t)n * s.words; }
// Ancestors of node n.
DEVICE u32 tree_depth(const Seg& s, u32 n) {
  const u64* w = tree_row(s, n);
  u32 d = 0;
  for (u32 k = 0; k <= n / 64; k++) d += __popcll(w[k]);
  return d - 1;
}
// Position of row i of the pass.
DEVICE u32 position(const Seg& s, u32 i) {
  return s.mask == MASK_TREE ? s.past + tree_depth(s, s.staged + i) : pass_begin(s) + i;
}
// First cache row that the window (0: none) of a query at `pos` may reach. No staged row stands before its position, so this
// bounds cache rows and positions alike.
DEVICE u32 window_begin(u32 pos, u32 window) { return window && pos + 1 > window ? pos + 1 - window : 0; }
// One behind the last cache row that row i of the pass may see.
DEVICE u32 sight_end(const Seg& s, u32 i) {
  if (s.mask == MASK_FULL) return pass_end(s);
  if (s.mask == MASK_BLOCKS)
    return s.past + min(s.staged + s.rows, ((s.staged + i + s.words) / s.block + 1) * s.block - s.words);
  return pass_begin(s) + i + 1;
}

// The lowest n bits, for any n: none below 0, all from 64.
DEVICE u64 low_bits(int n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

// Which of cache rows j0 .. j0 + 63 row i of the pass sees, a bit each.
DEVICE u64 sight(const Seg& s, u32 i, u32 window, u32 j0) {
  const u32 pos = position(s, i), begin = window_begin(pos, window);
  u64 see = low_bits((int)sight_end(s, i) - (int)j0) & ~low_bits((int)begin - (int)j0);
  if (s.mask != MASK_TREE || j0 + 64 <= s.past) return see;
  // Bits of the 64 staged rows from j0 - past on, which may begin before the first and between two words.
  const u64* w = tree_row(s, s.staged + i);
  const int words = s.words, at = (int)j0 - (int)s.past, k = at >> 6, shift = at & 63;
  u64 staged = k >= 0 && k < words ? w[k] >> shift : 0;
  if (shift && k + 1 < words) staged |= w[k + 1] << (64 - shift);
  see &= staged | low_bits(-at);
  if (window && s.past + window <= pos) {  // the window ends inside the tree: ancestors count by their depth
    for (int b = max(0, -at); b < 64; b++)
      if (see >> b & 1 && s.past + tree_depth(s, at + b) < begin) see &= ~(1ull << b);
  }
  return see;
}
