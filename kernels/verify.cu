// Which drafted tokens stand, for many sequences at once. A tree's node 0 is the last token of the sequence; node c proposes
// token[c] behind node parent[c].
//
//   verify_walk       at node u the target says pick[u]: move to the child with that token, or stop and emit the pick. With argmax
//                     for picks this is greedy decoding; with a draw from each node's target distribution it is sampling from
//                     trees whose children do not depend on chance: one draw decides among all children.
//   verify_siblings   children drawn from q. Child x is accepted if u < min(1, r p(x) / q(x)), with r = 1; behind a rejection
//                     R = sum max(0, r p - q), p = max(0, r p - q) / R, r = R / (R + 1 - r) and, if siblings were drawn without
//                     replacement, q = norm(q without x); when none is left p is drawn from. One child a node is speculative
//                     sampling of a chain.
//   verify_traversal  the same with r = min(1, r p(x) / q(x)) for a child, which is rejected when all below it are and then u >= r
//
// Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2024, arXiv:2402.12374; Weng et al. 2025, arXiv:2505.12398; src/backend/sampling.rs
// says why they are lossless. verify_walk: a warp owns a sequence, bound by latency. The others: a block owns one; p and q of a node
// are never written back, but followed for each token through the rejections so far, whose r and sums are kept; a rejection or the
// last draw reads two rows of the vocabulary. Sums are integers in steps of 2^-44, so their order does not matter.
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
    if (kept == a.stride || pick == NO_TOKEN) break;
    const u32 child =
        verify::first_node(at + 1, tree.nodes, [&](u32 c) { return parents[c] == at && tokens[c] == pick; });
    if (child == tree.nodes) break;
    at = child;
  }
  if (writes) a.counts[sequence] = kept, a.next[sequence] = pick;
}

namespace verify {
constexpr u32 MOST = 512;  // rejections at the nodes of a path, and nodes of it; leaving out children changes no law
constexpr float STEPS = 17592186044416.f;
constexpr weight_t NOTHING = (weight_t)(1e-9f * STEPS);  // less is rounding: p was q

// Rejections: behind the i-th, p is max(0, r[i] p - q / q[i]) / p[i].
struct Rejected {
  float r[MOST], p[MOST], q[MOST];
  u32 token[MOST];
};
// A node that is tried, behind `n` rejections from the `first` on; `mass` is what they have left of q, `child` is tried next.
struct Node {
  u32 at, child, first, n;
  float r, mass;
};
struct Space {
  Choice choice;
  Rejected rejected;
};

// That a rejected token leaves q needs no care here: its p, below its q, is 0 from then on.
DEVICE float left_of(const Rejected& r, const Node& node, float p, float q) {
  for (u32 i = node.first; i < node.first + node.n; i++) p = fmaxf(0.f, r.r[i] * p - q / r.q[i]) / r.p[i];
  return p;
}
DEVICE bool among(const Rejected& r, const Node& node, u32 id) {
  bool yes = false;
  for (u32 i = node.first; i < node.first + node.n; i++) yes |= r.token[i] == id;
  return yes;
}

// The tree of a block's sequence.
struct Drafted {
  const VerifySiblings& a;
  Space& s;
  const Tree tree;
  const Walk walk;
  const u32* parents;
  __device__ __forceinline__ Drafted(const VerifySiblings& a, Space& s)
      : a(a), s(s), tree(a.trees[blockIdx.x]), walk(a.vocab), parents(a.parents + tree.first) {}

  __device__ __forceinline__ const float* p(const Node& node) const { return a.p + (size_t)(tree.first + node.at) * a.vocab; }
  // Of a node without children, whose row may be any, something to read.
  __device__ __forceinline__ const float* q(const Node& node) const {
    return node.n || node.child < tree.nodes ? a.q + (size_t)a.drafts[tree.first + node.at] * a.vocab : p(node);
  }
  __device__ __forceinline__ u32 child_of(u32 at, u32 from) const {
    return first_node(from, tree.nodes, [&](u32 c) { return parents[c] == at; });
  }
  // A node at which none is tried yet; `kept` is the length of the path with it.
  __device__ __forceinline__ Node open(u32 at, u32 kept, u32 first, float r) const {
    if (threadIdx.x == 0) a.path[(size_t)blockIdx.x * a.stride + kept - 1] = at;
    return Node{at, kept < min(a.stride, MOST) && first < MOST ? child_of(at, at + 1) : tree.nodes, first, 0, r, 1.f};
  }
  // min(1, r p / q) for the child that is tried.
  __device__ __forceinline__ float ratio(const Node& node) const {
    const u32 x = a.tokens[tree.first + node.child];
    const float px = p(node)[x], qx = q(node)[x], w = node.r * left_of(s.rejected, node, px, qx);
    const float d = !a.replacement && among(s.rejected, node, x) ? 0.f : qx / node.mass;
    return w < d ? w / d : w > 0.f ? 1.f : 0.f;
  }

  // Takes away what the child that was tried would have covered, and goes on to the next; to none if it could not stand.
  __device__ __forceinline__ void reject(Node& node) const {
    const float *p = this->p(node), *q = this->q(node);
    Rejected& r = s.rejected;
    const u32 i = node.first + node.n, after = node.child + 1;
    node.child = tree.nodes;
    __syncthreads();
    if (threadIdx.x == 0) r.r[i] = node.r, r.q[i] = node.mass, r.p[i] = 1, r.token[i] = a.tokens[tree.first + after - 1];
    __syncthreads();
    node.n++;
    weight_t own_p = 0, own_q = 0, sum_p, sum_q;
    walk.each(p, [&](u32 id, float v) {
      own_p += (weight_t)(left_of(r, node, v, q[id]) * STEPS);
      if (!a.replacement && !among(r, node, id)) own_q += (weight_t)(q[id] * STEPS);
    });
    block_scan(own_p, s.choice, sum_p);
    block_scan(own_q, s.choice, sum_q);
    if (sum_p < NOTHING) {  // p as it was is right, if p was q but for rounding or if there never was any; else no one can stand
      node.n--;
      own_p = 0;
      walk.each(p, [&](u32, float v) { own_p += (weight_t)(v * STEPS); });
      block_scan(own_p, s.choice, sum_p);
      if (node.r < 1.f && sum_p) node.r = 0.f;
      return;
    }
    const float sum = (float)sum_p / STEPS;
    node.r = sum / (sum + (1.f - node.r));
    if (!a.replacement) node.mass = (float)sum_q / STEPS;
    if (threadIdx.x == 0) r.p[i] = sum;
    __syncthreads();
    if ((a.replacement || sum_q) && i + 1 < MOST) node.child = child_of(node.at, after);
  }

  // The path ends at this node: a token from what is left of p.
  __device__ __forceinline__ void end(const Node& node, u32 kept, u64 random) const {
    const float *p = this->p(node), *q = this->q(node);
    auto left = [&](u32 id, float v) { return (weight_t)(left_of(s.rejected, node, v, node.n ? q[id] : 0.f) * STEPS); };
    weight_t own = 0;
    walk.each(p, [&](u32 id, float v) { own += left(id, v); });
    const u32 next = block_draw(walk, p, own, random, s.choice, left);
    if (threadIdx.x == 0) a.counts[blockIdx.x] = kept, a.next[blockIdx.x] = next;
  }
};

DEVICE double uniform(u64 random) { return (double)(random >> 11) * (1.0 / 9007199254740992.0); }

// `random(i)` is the 64 random bits of the sequence's i-th decision: a child that is tried, or the last draw.
template <class R>
DEVICE void siblings(const VerifySiblings& a, R random) {
  GPU_SMEM(Space, space, [1]);
  const Drafted d(a, *space);
  u32 kept = 1, decisions = 0;
  Node node = d.open(0, kept, 0, 1.f);
  while (node.child < d.tree.nodes) {
    if (uniform(random(decisions++)) < d.ratio(node)) node = d.open(node.child, ++kept, 0, 1.f);
    else d.reject(node);
  }
  d.end(node, kept, random(decisions));
}

// `random(c)` is the 64 random bits that node c is tested by; those of node 0, which needs no test, are for the last draw.
template <class R>
DEVICE void traversal(const VerifySiblings& a, R random) {
  GPU_SMEM(Space, space, [1]);
  GPU_SMEM(Node, above, [MOST]);
  const Drafted d(a, *space);
  u32 kept = 1;
  Node node = d.open(0, kept, 0, 1.f);
  for (;;) {
    if (node.child < d.tree.nodes) {
      const float r = d.ratio(node);
      if (r > 0.f) {
        if (threadIdx.x == 0) above[kept - 1] = node;
        node = d.open(node.child, ++kept, node.first + node.n, r);
        continue;
      }
    } else {
      if (uniform(random(node.at)) < node.r) break;  // node 0 at the latest
      __syncthreads();
      node = above[--kept - 1];
    }
    d.reject(node);
  }
  d.end(node, kept, random(0));
}
}  // namespace verify

KERNEL(verify_siblings, VerifySiblings, 512, 1) {
  const Chance& c = a.chances[blockIdx.x];
  verify::siblings(a, [&](u32 i) { return random_bits(c.seed, c.stream, c.counter + i); });
}

KERNEL(verify_traversal, VerifySiblings, 512, 1) {
  const Chance& c = a.chances[blockIdx.x];
  verify::traversal(a, [&](u32 i) { return random_bits(c.seed, c.stream, c.counter + i); });
}
