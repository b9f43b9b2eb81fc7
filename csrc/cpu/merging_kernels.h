// Clustering of slots on one thread, for one level of x86-64 (see levels.h).
//
// A problem reads its K x D floats and multiplies all pairs as doubles, 4 x 4 at a time. A product of two floats is
// then exact, and equal distances stay equal. Floats are converted to doubles when they are loaded: that moves half the
// bytes, and uses execution units that do not multiply. Floor: K (K + 1) / 2 products of D numbers each.

#include "simd.h"

namespace slotkernels::LEVEL {

constexpr int64_t LANES_64 = 4;  // with longer vectors the conversion would take longer than the products
constexpr int64_t SIDE = 4;      // 4 x 4 sums stay in registers
typedef float Floats4 __attribute__((vector_size(4 * LANES_64)));
typedef double Doubles4 __attribute__((vector_size(8 * LANES_64)));

// The first `count` <= LANES_64 numbers, followed by zeros.
ALWAYS_INLINE Doubles4 load_doubles(const float* from, int64_t count) {
  Floats4 value{};
  std::memcpy(&value, from, count * sizeof(float));
#if defined(LEVELS) && FLOATS_IN_REGISTER >= 8
  return __builtin_ia32_cvtps2pd256(value);  // GCC 12 makes four instructions of the line below
#else
  return __builtin_convertvector(value, Doubles4);
#endif
}

// Prefetches what follows a problem into the L2 cache while the problem is computed.
struct Ahead {
  const float *from, *end;
  ALWAYS_INLINE void fetch() {
    if (from < end) __builtin_prefetch(from, 0, 2);
    from += 16;  // a cache line
  }
};

// Adds products of four rows with four rows; for a tile on the diagonal, only those above the diagonal.
template <bool DIAGONAL>
ALWAYS_INLINE void multiply(const float* const* left, const float* const* right, int64_t d, int64_t count,
                            Doubles4 (&sums)[SIDE][SIDE]) {
  Doubles4 columns[SIDE];
  for (int64_t c = 0; c < SIDE; ++c) columns[c] = load_doubles(right[c] + d, count);
  for (int64_t r = 0; r < SIDE; ++r) {
    const Doubles4 row = DIAGONAL ? columns[r] : load_doubles(left[r] + d, count);
    for (int64_t c = DIAGONAL ? r : 0; c < SIDE; ++c) sums[r][c] += row * columns[c];
  }
}

template <bool DIAGONAL>
ALWAYS_INLINE void multiply_tile(const float* const* left, const float* const* right, int64_t width,
                                 Doubles4 (&sums)[SIDE][SIDE], Ahead& ahead) {
  for (auto& row : sums)
    for (auto& sum : row) sum = Doubles4{};
  int64_t d = 0;
  for (; d + LANES_64 <= width; d += LANES_64) {
    if (d % (2 * LANES_64) == 0) ahead.fetch();
    multiply<DIAGONAL>(left, right, d, LANES_64, sums);
  }
  if (d < width) multiply<DIAGONAL>(left, right, d, width - d, sums);
}

// Products of all pairs of `count` rows, [count, count]. The next call will read what follows them, up to `end`.
inline void multiply_pairs(const float* slots, int64_t count, int64_t width, const float* end, double* products) {
  Ahead ahead{slots + count * width, std::min(slots + 2 * count * width, end)};
  for (int64_t i = 0; i < count; i += SIDE) {
    for (int64_t j = i; j < count; j += SIDE) {
      const float *left[SIDE], *right[SIDE];
      for (int64_t k = 0; k < SIDE; ++k) {
        left[k] = slots + std::min(i + k, count - 1) * width;
        right[k] = slots + std::min(j + k, count - 1) * width;
      }
      Doubles4 sums[SIDE][SIDE];
      if (i == j)
        multiply_tile<true>(left, right, width, sums, ahead);
      else
        multiply_tile<false>(left, right, width, sums, ahead);
      for (int64_t r = i; r < std::min(i + SIDE, count); ++r)
        for (int64_t c = std::max(r, j); c < std::min(j + SIDE, count); ++c) {
          const Doubles4 sum = sums[r - i][c - j];
          products[r * count + c] = products[c * count + r] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
        }
    }
  }
}

// Solves problems `begin` to `end`, with `width` floats a slot.
inline void cluster_sets(const Rule& rule, const float* slots, const bool* valid, int64_t count, int64_t width,
                         int64_t begin, int64_t end, int64_t* labels, int64_t* counts) {
  std::vector<double> doubles(count * (count + 1));
  std::vector<int> integers(4 * count);
  Problem problem;
  problem.count = problem.stride = static_cast<int>(count);
  problem.distances = doubles.data();
  problem.heights = doubles.data() + count * count;
  problem.sizes = integers.data();
  problem.chain = problem.sizes + count;
  problem.lower = problem.chain + count;
  problem.upper = problem.lower + count;
  for (int64_t b = begin; b < end; ++b) {
    problem.valid = valid == nullptr ? nullptr : valid + b * count;
    multiply_pairs(slots + b * count * width, count, width, slots + end * count * width, problem.distances);
    distances_of_products(OneLane{}, problem);
    cluster(OneLane{}, problem, rule, labels + b * count, counts + b);
  }
}

}  // namespace slotkernels::LEVEL
