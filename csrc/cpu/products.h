// Products of small matrices, for one level of x86-64 (see levels.h): 4 x 4 tiles of dot products, and rows of
// coefficients times rows of points. Both keep their sums in registers for the whole length of the product.

#include "simd.h"

namespace slotkernels::LEVEL {

constexpr int64_t TILE = 4;

// With 32 registers of 16 floats a tile of dot products is computed at once, else in quarters.
#if REGISTER == 16
constexpr int64_t SIDE = 4;
constexpr int64_t ROWS = 8, VECTORS = 3;
#else
constexpr int64_t SIDE = 2;
constexpr int64_t ROWS = 4, VECTORS = 1;
#endif

ALWAYS_INLINE Floats halves(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

ALWAYS_INLINE Floats quarters(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}

ALWAYS_INLINE Floats pairs(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

ALWAYS_INLINE Floats singles(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// Lane i is the sum of all lanes of v[i], always added in the same order.
ALWAYS_INLINE Floats sums(const Floats (&v)[16]) {
  Floats four[4];
  for (int i = 0; i < 4; ++i) four[i] = quarters(halves(v[i], v[i + 8]), halves(v[i + 4], v[i + 12]));
  return singles(pairs(four[0], four[1]), pairs(four[2], four[3]));
}

// The 16 dot products of 4 rows of a and 4 rows of b, row by row; `length` is a multiple of 16.
ALWAYS_INLINE Floats dots(const float* a, const float* b, int64_t stride, int64_t length) {
  Floats tile[TILE * TILE];
  for (int64_t row = 0; row < TILE; row += SIDE) {
    for (int64_t column = 0; column < TILE; column += SIDE) {
      Floats part[SIDE][SIDE] = {};
      for (int64_t d = 0; d < length; d += LANES) {
        Floats right[SIDE];
        for (int64_t j = 0; j < SIDE; ++j) right[j] = load(b + (column + j) * stride + d);
        for (int64_t i = 0; i < SIDE; ++i) {
          const Floats left = load(a + (row + i) * stride + d);
          for (int64_t j = 0; j < SIDE; ++j) part[i][j] += left * right[j];
        }
      }
      for (int64_t i = 0; i < SIDE; ++i) {
        for (int64_t j = 0; j < SIDE; ++j) tile[(row + i) * TILE + column + j] = part[i][j];
      }
    }
  }
  return sums(tile);
}

ALWAYS_INLINE Floats transposed(Floats tile) {
  return __builtin_shufflevector(tile, tile, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

ALWAYS_INLINE void store_tile(float* to, int64_t stride, Floats tile) {
  float rows[TILE * TILE];
  store(rows, tile);
  for (int64_t i = 0; i < TILE; ++i) std::memcpy(to + i * stride, rows + i * TILE, TILE * sizeof(float));
}

// Dot products of rows [first, first + rows) with rows [second, second + columns) of the same points into both triangles
// of `gram`. With first == second only the upper tiles are computed, of which `diagonal_only` keeps those on the diagonal.
inline void gram_block(const float* points, int64_t stride, int64_t length, int64_t first, int64_t rows, int64_t second,
                       int64_t columns, bool diagonal_only, float* gram, int64_t gram_stride) {
  for (int64_t i = first; i < first + rows; i += TILE) {
    const int64_t start = first == second ? i : second;
    const int64_t end = diagonal_only ? i + 1 : second + columns;
    for (int64_t j = start; j < end; j += TILE) {
      const Floats tile = dots(points + i * stride, points + j * stride, stride, length);
      store_tile(gram + i * gram_stride + j, gram_stride, tile);
      if (i != j) store_tile(gram + j * gram_stride + i, gram_stride, transposed(tile));
    }
  }
}

// One row of points, and its coefficients in R sums.
template <int64_t R>
struct Term {
  const float* point;
  float coefficients[R];
};

// V vectors of R sums at column d.
template <int64_t R, int64_t V>
ALWAYS_INLINE void combine(const Term<R>* terms, int64_t count, int64_t d, Floats (&sum)[R][V]) {
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t v = 0; v < V; ++v) sum[i][v] = Floats{};
  }
  for (const Term<R>* term = terms; term < terms + count; ++term) {
    Floats point[V];
    for (int64_t v = 0; v < V; ++v) point[v] = load(term->point + d + v * LANES);
    for (int64_t i = 0; i < R; ++i) {
      for (int64_t v = 0; v < V; ++v) sum[i][v] += term->coefficients[i] * point[v];
    }
  }
}

}  // namespace slotkernels::LEVEL
