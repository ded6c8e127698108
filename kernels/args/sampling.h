// From logits to tokens.
#pragma once

// What a row of logits amounts to. A row with NaN, or whose largest is not finite, has NaN and argmax 0xffffffff.
ARGS(LogitsStats) {
  In<float> logits;   // [rows, vocab] align 16
  Out<float> stats;   // [rows, 3] - max; log sum exp(x); entropy of the softmax in nats
  Out<u32> argmax;    // [rows] - the lowest id of equals
  u32 rows;           // >= 1
  u32 vocab;          // >= 1
};

// The k largest of a row, largest first, lower ids first among equals.
ARGS(TopK) {
  In<float> logits;   // [rows, vocab] align 16 - no NaN
  Out<float> values;  // [rows, k]
  Out<u32> ids;       // [rows, k]
  u32 rows;           // >= 1
  u32 vocab;          // >= 1, <= 1048576
  u32 k;              // >= 1, <= 64 - at most vocab
};

// How the token of a row is drawn: temperature, then top-k, top-p and min-p.
RECORD(Draw) {
  u64 seed;
  u64 stream;
  u64 counter;        // the first token's place in the stream; those behind it take the next ones
  float temperature;  // 0: greedy
  float top_p;        // above 0; 1 keeps all
  float min_p;        // 0 keeps all
  u32 top_k;          // 0 keeps all
};

// Tokens of each row, drawn without replacement; 0xffffffff where none is left, or the logits hold NaN or nothing finite.
ARGS(Sample) {
  In<float> logits;  // [rows, vocab] align 16
  In<Draw> draws;    // [rows]
  Out<u32> tokens;   // [rows, n]
  u32 rows;          // >= 1
  u32 vocab;         // >= 1, <= 1048576
  u32 n;             // >= 1, <= 64
};

// The distribution that Sample draws from; all 0 where the logits hold NaN or nothing finite.
ARGS(Distribution) {
  In<float> logits;  // [rows, vocab] align 16
  In<Draw> draws;    // [rows]
  Out<float> p;      // [rows, vocab] align 16
  u32 rows;          // >= 1
  u32 vocab;         // >= 1, <= 1048576
};

// A logit, counted over all rows, and what divides it if it is positive and multiplies it otherwise.
RECORD(Penalty) {
  u32 at;        // below the number of logits; no logit has two penalties
  float factor;  // above 0
};

ARGS(Penalize) {
  InOut<float> logits;    // [count] align 4
  In<Penalty> penalties;  // [n]
  u32 count;              // >= 1
  u32 n;                  // >= 1
};

// Tokens that no row may have.
ARGS(Forbid) {
  InOut<float> logits;  // [rows, vocab] align 4
  In<u32> tokens;       // [n] - below vocab
  u32 rows;             // >= 1
  u32 vocab;            // >= 1
  u32 n;                // >= 1
};

// A sequence with masked positions, which are numbered from its first token; see kernels/unmask.cu.
RECORD(Masked) {
  u32 first;        // of its rows
  u32 rows;
  u32 text;         // its first token
  u32 score;        // 0: entropy, 1: lse - max
  float limit;      // rows of a cost below it are taken
  u32 best;         // so many are taken in any case
  u32 forced_from;  // of positions from here
  u32 forced_to;    // up to here one is taken in any case
  u32 fill_from;    // behind the first end token from here on
  u32 fill_to;      // all becomes eos[0], up to here
};

ARGS(Unmask) {
  In<Masked> texts;    // [sequences] - their tokens lie apart
  In<u32> picks;       // [rows] - 0xffffffff: none
  In<u32> argmax;      // [rows] - 0xffffffff: none
  In<float> stats;     // [rows, 3] - as LogitsStats writes them
  In<u32> positions;   // [rows] - ascending strictly in each sequence
  In<u32> eos;         // [ends]
  InOut<u32> tokens;   // [length]
  Out<u32> taken;      // [rows] - what the position got, or 0xffffffff
  u32 sequences;       // >= 1
  u32 rows;            // >= 1
  u32 length;          // >= 1
  u32 ends;
};

// The nodes of a sequence's tree among those of the pass. Node 0 of a tree is the sequence's last token; parents come first.
RECORD(Tree) {
  u32 first;
  u32 nodes;  // at least 1
};

// Follows the target's picks down the trees. `path` begins with node 0: staged rows to keep, as KvCommitBatch takes them.
ARGS(VerifyWalk) {
  In<Tree> trees;    // [sequences]
  In<u32> tokens;    // [nodes]
  In<u32> parents;   // [nodes] - numbered in the tree; that of node 0 is not read
  In<u32> picks;     // [nodes] - the target's token behind a node: its best, or a draw
  Out<u32> path;     // [sequences, stride]
  Out<u32> counts;   // [sequences] - nodes kept, node 0 included
  Out<u32> next;     // [sequences] - the token behind the last of them
  u32 sequences;     // >= 1
  u32 nodes;         // >= 1
  u32 stride;        // >= 1 - most nodes to keep
};

// A sequence's random numbers: number i is that of counter + i. There are at most `nodes`.
RECORD(Chance) {
  u64 seed;
  u64 stream;
  u64 counter;
};

// Speculative sampling from chains and from trees whose siblings were drawn from q, in the order of their numbers.
ARGS(VerifySiblings) {
  In<Tree> trees;       // [sequences]
  In<u32> tokens;       // [nodes] - below vocab
  In<u32> parents;      // [nodes] - numbered in the tree; that of node 0 is not read
  In<u32> drafts;       // [nodes] - for a node with children: the row of q that they were drawn from
  In<float> p;          // [nodes, vocab] align 16 - the target's distribution behind each node
  In<float> q;          // [drafted, vocab] align 16
  In<Chance> chances;   // [sequences]
  Out<u32> path;        // [sequences, stride]
  Out<u32> counts;      // [sequences]
  Out<u32> next;        // [sequences]
  u32 sequences;        // >= 1
  u32 nodes;            // >= 1
  u32 drafted;          // >= 1
  u32 vocab;            // >= 1, <= 1048576
  u32 stride;           // >= 1
  u32 replacement;      // <= 1 - 1: siblings were drawn with replacement
};

// Launches.
//
//   logits_stats      LogitsStats      grid (rows), block 1024
//   top_k             TopK             grid (rows), block 1024
//   sample            Sample           grid (rows), block 1024
//   distribution      Distribution     grid (rows), block 1024
//   penalize          Penalize         grid (up(n, 128)), block 128
//   forbid            Forbid           grid (up(rows * n, 128)), block 128
//   unmask            Unmask           grid (sequences), block 256
//   verify_walk       VerifyWalk       grid (up(sequences, 4)), block 128
//   verify_siblings   VerifySiblings   grid (sequences), block 512 - from the root down
//   verify_traversal  VerifySiblings   grid (sequences), block 512 - from the leaves up, at most 512 nodes a tree
//
// No dynamic shared memory and no scratch. The blocks of 1024 and 512 may be any power of two from 32 threads; results are the same bits,
// but for the last ones of lse and entropy.
