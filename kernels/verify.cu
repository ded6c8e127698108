// Which drafted tokens stand, for many sequences at once. A tree's node 0 is the last token of the sequence; node c proposes
// token[c] behind node parent[c].
//
//   verify_walk       at node u the target says pick[u]: move to the child with that token, or stop and emit the pick. With argmax
//                     for picks this is greedy decoding; with a draw from each node's target distribution it is sampling from
//                     trees whose children do not depend on chance: one draw decides among all children.
//   verify_siblings   children drawn from q without replacement. p and q begin as the node's distributions; a child x is accepted if
//                     u q(x) < p(x), else p = norm(max(0, p - q)), then q = norm(q without x), and the next child is tried; when none
//                     is left p is drawn from. One child a node is speculative sampling of a chain.
//
// Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2024, arXiv:2402.12374. verify_walk: a warp owns a sequence, bound by
// latency. verify_siblings: a block owns one; p and q of a node are never written back, but followed for each token through the
// rejections so far, whose sums are kept; a rejection or the last draw reads two rows of the vocabulary. Sums are integers in
// steps of 2^-44, so their order does not matter.
#include "rt/gpu.cuh"
#include "rt/choose.cuh"
#include "rt/philox.cuh"

namespace verify {
// The first node from c on, below n, for which all lanes' `want` says yes; n if there is none. By whole warps.
template <class F>
DEVICE u32 first_node(u32 c, u32 n, F want) {
  for (; c < n; c += 32) {
    const u32 own = c + (threadIdx.x & 31);
    const unsigned found = __ballot_sync(FULL, own < n && want(own));
    if (found) return c + __ffs(found) - 1;
  }
  return n;
}
}  // namespace verify

KERNEL(verify_walk, VerifyWalk, 128) {
  const u32 sequence = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (sequence >= a.sequences) return;
  const Tree tree = a.trees[sequence];
  const u32 *parents = a.parents + tree.first, *tokens = a.tokens + tree.first;
  u32* path = a.path + (size_t)sequence * a.stride;
  const bool writes = threadIdx.x % 32 == 0;
  u32 at = 0, kept = 0, pick;
  for (;;) {
    if (writes) path[kept] = at;
    kept++;
    pick = a.picks[tree.first + at];
    if (kept == a.stride) break;
    const u32 child =
        verify::first_node(at + 1, tree.nodes, [&](u32 c) { return parents[c] == at && tokens[c] == pick; });
    if (child == tree.nodes) break;
    at = child;
  }
  if (writes) a.counts[sequence] = kept, a.next[sequence] = pick;
}

namespace verify {
constexpr u32 SIBLINGS = 64;  // children of a node that are tried; leaving out the last of them changes no law
constexpr float STEPS = 17592186044416.f;

// The rejections at a node: behind `n` of them p is residual(x) / p[n], q is q(x) / q[n] where x is not among the tokens.
struct Rejected {
  float p[SIBLINGS + 1], q[SIBLINGS + 1];
  u32 token[SIBLINGS];
};
struct Space {
  Choice choice;
  Rejected rejected;
};

// That a rejected token leaves q needs no care here: its p, below its q, is 0 from then on.
DEVICE float residual(const Rejected& r, u32 n, float p, float q) {
  for (u32 i = 0; i < n; i++) p = fmaxf(0.f, p / r.p[i] - q / r.q[i]);
  return p;
}
DEVICE bool among(const Rejected& r, u32 n, u32 id) {
  bool yes = false;
  for (u32 i = 0; i < n; i++) yes |= r.token[i] == id;
  return yes;
}

// `random(i)` is the 64 random bits of the sequence's i-th decision.
template <class R>
DEVICE void siblings(const VerifySiblings& a, R random) {
  GPU_SMEM(Space, space, [1]);
  Rejected& r = space->rejected;
  const Tree tree = a.trees[blockIdx.x];
  const u32* parents = a.parents + tree.first;
  const Walk walk(a.vocab);
  u32* path = a.path + (size_t)blockIdx.x * a.stride;
  u32 at = 0, kept = 0, decisions = 0, next;
  for (;;) {
    if (threadIdx.x == 0) path[kept] = at, r.p[0] = r.q[0] = 1;
    __syncthreads();
    kept++;
    const float* p = a.p + (size_t)(tree.first + at) * a.vocab;
    u32 child = kept < a.stride ? first_node(at + 1, tree.nodes, [&](u32 c) { return parents[c] == at; }) : tree.nodes;
    const float* q = child < tree.nodes ? a.q + (size_t)a.drafts[tree.first + at] * a.vocab : p;
    u32 n = 0, accepted = 0;
    while (child < tree.nodes && n < SIBLINGS) {
      const u32 x = a.tokens[tree.first + child];
      const float px = residual(r, n, p[x], q[x]) / r.p[n], qx = among(r, n, x) ? 0.f : q[x] / r.q[n];
      const double u = (double)(random(decisions++) >> 11) * (1.0 / 9007199254740992.0);
      if (u * qx < px) {
        accepted = child;
        break;
      }
      // What is left of p and q without x, and how much that is.
      if (threadIdx.x == 0) r.token[n] = x;
      __syncthreads();
      weight_t own_p = 0, own_q = 0, sum_p, sum_q;
      walk.each(p, [&](u32 id, float v) {
        own_p += (weight_t)(residual(r, n + 1, v, q[id]) * STEPS);
        if (!among(r, n + 1, id)) own_q += (weight_t)(q[id] * STEPS);
      });
      block_scan(own_p, space->choice, sum_p);
      block_scan(own_q, space->choice, sum_q);
      if (sum_p == 0) break;  // p was q but for rounding: p as it was before x is right
      n++;
      if (threadIdx.x == 0) r.p[n] = (float)sum_p / STEPS, r.q[n] = (float)sum_q / STEPS;
      __syncthreads();
      if (sum_q == 0) break;  // nothing else can have been drafted
      child = first_node(child + 1, tree.nodes, [&](u32 c) { return parents[c] == at; });
    }
    if (accepted) {
      at = accepted;
      __syncthreads();
      continue;
    }
    auto left = [&](u32 id, float v) { return (weight_t)(residual(r, n, v, n ? q[id] : 0.f) * STEPS); };
    weight_t own = 0;
    walk.each(p, [&](u32 id, float v) { own += left(id, v); });
    next = block_draw(walk, p, own, random(decisions++), space->choice, left);
    break;
  }
  if (threadIdx.x == 0) a.counts[blockIdx.x] = kept, a.next[blockIdx.x] = next;
}
}  // namespace verify

KERNEL(verify_siblings, VerifySiblings, 512, 1) {
  const Chance& c = a.chances[blockIdx.x];
  verify::siblings(a, [&](u32 i) { return random_bits(c.seed, c.stream, c.counter + i); });
}
