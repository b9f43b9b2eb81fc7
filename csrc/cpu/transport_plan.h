// Arguments of the transport plan's kernels: one problem and the state of its iterations, as plain pointers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "format.h"

namespace slotkernels {

constexpr int64_t CHUNK = 64;  // rows that one thread computes; the order of sums does not depend on the threads
constexpr int64_t PAD = 16;    // numbers to which vectors and rows of the matrix are padded

// If a factor of the absorbed form leaves 2^±40, the potentials are absorbed again: see transport_plan/reference.py.
constexpr double SMALLEST_SUM = 0x1p-40, LARGEST_SUM = 0x1p40;

// T is float or double. Vectors are padded with zeros, except where it says otherwise.
template <class T>
struct Transport {
  Input cost;                // [N, M] of this problem; double if T is
  int64_t n, m, stride;      // stride: M padded
  T scale;                   // log2(e) / eps
  T *matrix;                 // [N, stride] 2^(f0 + g0 - scale C)
  T *a, *b;                  // [N], [M] weights
  T *u, *v;                  // [N], [M] factors: a 2^(f - f0), b 2^(g - g0)
  T *row_sums, *sums, *next_sums;  // [N], [M], [M]: 2^(f0 - f), 2^(g0 - g), and those of the next columns
  T *lone_rows, *lone_columns;     // 1 for points that no pair reaches, and for padding, else 0
  T *row_logs, *column_logs;       // log2 of a 2^f and of b 2^g, where the log domain starts from them
  T *partial, *highest;            // [chunks, stride] sums of columns over a chunk's rows, and what they are relative to
  T *f0, *g0;                      // the potentials in the matrix
  double *f, *g, *next_g;          // potentials, where the log domain or the history takes them
};

}  // namespace slotkernels
