// What encoders add: LayerNorm, GELU without tanh, LayerScale, and their backward. Launches: end of this file.
#pragma once

// y = w (x - mean) s + b, s = 1 / sqrt(mean((x - mean)^2) + eps), row by row. Ba et al. 2016, arXiv:1607.06450.
ARGS(LayerNorm) {
  In<float> x;          // [rows, d] align 4
  In<float> w;          // [d] align 4
  In<float> b;          // [d] align 4
  Out<bf16_t> y;         // [rows, d] align 2
  u32 rows;             // >= 1
  u32 d;                // >= 1
  float eps;            // >= 0
};

// With u = w dy and h = (x - mean) s: dx (+)= s (u - mean(u) - h mean(u h)).
ARGS(LayerNormBwd) {
  InOut<float> dx;      // [rows, d] align 4
  Out<float> stats;     // [rows, 2] align 4 - mean and s, as ColumnDots takes them
  In<float> dy;         // [rows, d] align 4
  In<float> x;          // [rows, d] align 4
  In<float> w;          // [d] align 4
  u32 rows;             // >= 1
  u32 d;                // >= 1
  float eps;            // >= 0
  u32 add;              // <= 1 - whether dx keeps what it was
};

// parts[c, i] = sum over rows c * 64 .. of dy[r, i] x[r, i], or of dy[r, i] (x[r, i] - mean) s with the statistics of the row.
ARGS(ColumnDots) {
  In<float> dy;         // [rows, d] align 4
  In<float> x;          // [rows, d] align 4
  In<float> stats;      // [has_stats, rows, 2] align 4
  Out<float> parts;     // [(rows + 63) / 64, d] align 4
  u32 rows;             // >= 1
  u32 d;                // >= 1
  u32 has_stats;        // <= 1
};

// y = x Phi(x). Hendrycks & Gimpel 2016, arXiv:1606.08415.
ARGS(Gelu) {
  In<float> x;          // [n] align 4
  Out<bf16_t> y;         // [n] align 2
  u32 n;                // >= 1
};

// dx = dy (Phi(x) + x Phi'(x)).
ARGS(GeluBwd) {
  Out<float> dx;        // [n] align 4
  In<float> dy;         // [n] align 4
  In<float> x;          // [n] align 4
  u32 n;                // >= 1
};

// y[r, i] += w[i] x[r, i]. LayerScale: Touvron et al. 2021, arXiv:2103.17239.
ARGS(AddScaled) {
  InOut<float> y;       // [rows, d] align 4
  In<float> x;          // [rows, d] align 4
  In<float> w;          // [d] align 4
  u32 rows;             // >= 1
  u32 d;                // >= 1
};

// dx[r, i] = w[i] dy[r, i].
ARGS(ScaleColumns) {
  Out<float> dx;        // [rows, d] align 4
  In<float> dy;         // [rows, d] align 4
  In<float> w;          // [d] align 4
  u32 rows;             // >= 1
  u32 d;                // >= 1
};

// Launches. "up(a, b)" is a divided by b, rounded up; "any" is any number of blocks: threads stride over what is left.
//
//   layer_norm       LayerNorm      grid (rows), block 256
//   layer_norm_bwd   LayerNormBwd   grid (rows), block 256
//   column_dots      ColumnDots     grid (up(d, 256), up(rows, 64)), block 256; then fold over the parts (train.h)
//   gelu             Gelu           grid any, block 256; and gelu_bwd
//   add_scaled       AddScaled      grid (rows), block 256
//   scale_columns    ScaleColumns   grid (rows), block 256
