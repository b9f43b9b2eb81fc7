// Arguments of the streaming Sinkhorn kernels: all pairs of two sets of points, as plain pointers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "scratch.h"

namespace slotkernels {

constexpr int64_t PANEL = 64;   // columns that are stored together
constexpr int64_t BLOCK = 192;  // rows that a pass over the columns serves: whole panels, and whole tiles of 6 rows
constexpr int64_t FLUSH = 16;   // panels after which float32 sums move to float64

// K_ij = 2^t_ij with t_ij = r_i + s_j + scale x_i·y_j (p = 2), or r_i + s_j - scale |x_i - y_j| (p = 1). r and s are
// whole numbers, so adding them does not round; their fractional parts are factors in `a` and `b`. Sets are padded to
// whole blocks; r and s of padding are far below all other exponents.
struct Pairs {
  const float *x, *y;      // [B, rows or columns padded to blocks, stride]
  const float* panels;     // [B, panels of y, dim, PANEL]
  const float *r, *a;      // [B, rows padded]
  const float *s, *b;      // [B, columns padded]
  const float* scale;      // [B]
  int64_t n, m;            // without padding
  int64_t dim, stride;     // a stride is a multiple of 16
  int p;
  bool same;               // y is x: the pairs below the diagonal equal those above it
};

inline int64_t blocks(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

// Blocks of rows that share a buffer of column sums: few enough that buffers stay linear in the points.
struct Bands {
  static constexpr int64_t MOST = 48;
  int64_t height, count;

  explicit Bands(int64_t rows)
      : height((blocks(rows) + MOST - 1) / MOST), count((blocks(rows) + height - 1) / height) {}
};

}  // namespace slotkernels
