// Clustering of slots on CPUs: one thread a problem.
//
// A problem reads its K x D floats once, widens them to doubles in its scratch and multiplies all pairs there, 4 x 4 at a
// time: doubles, because a product of floats is then exact and ties between slots on a grid stay ties. Floor: the
// K (K + 1) / 2 products of D numbers each.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../linkage.h"
#include "simd.h"

namespace slotkernels {
namespace {

constexpr int64_t LANES_64 = 4;  // compilers split longer vectors badly where registers hold four
constexpr int64_t SIDE = 4;      // 4 x 4 sums stay in registers
constexpr int64_t WORTH_A_THREAD = 1 << 18;  // multiplications
typedef float Floats4 __attribute__((vector_size(4 * LANES_64)));
typedef double Doubles4 __attribute__((vector_size(8 * LANES_64)));

ALWAYS_INLINE Doubles4 load_doubles(const double* from) {
  Doubles4 value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// What comes after a problem is brought into the second-level cache while the problem is computed.
struct Ahead {
  const float *from, *end;
  ALWAYS_INLINE void fetch() {
    if (from < end) __builtin_prefetch(from, 0, 2);
    from += 16;  // a cache line
  }
};

// Products of four rows with four rows. On the diagonal only those above it.
template <bool DIAGONAL>
ALWAYS_INLINE void multiply_tile(const double* const* left, const double* const* right, int64_t width,
                                 Doubles4 (&sums)[SIDE][SIDE], Ahead& ahead) {
  for (auto& row : sums)
    for (auto& sum : row) sum = Doubles4{};
  for (int64_t d = 0; d < width; d += LANES_64) {
    if (d % (2 * LANES_64) == 0) ahead.fetch();
    Doubles4 columns[SIDE];
    for (int64_t c = 0; c < SIDE; ++c) columns[c] = load_doubles(right[c] + d);
    for (int64_t r = 0; r < SIDE; ++r) {
      const Doubles4 row = DIAGONAL ? columns[r] : load_doubles(left[r] + d);
      for (int64_t c = DIAGONAL ? r : 0; c < SIDE; ++c) sums[r][c] += row * columns[c];
    }
  }
}

}  // namespace

// Products of all pairs of `count` rows, [count, count]; `wide` takes the rows as doubles, `width` rounded up to fours.
// The next call will read what follows them, up to `end`.
EVERY_CPU void multiply_pairs(const float* slots, int64_t count, int64_t width, const float* end, double* wide,
                              double* products) {
  Ahead ahead{slots + count * width, std::min(slots + 2 * count * width, end)};
  const int64_t padded = (width + LANES_64 - 1) / LANES_64 * LANES_64;
  for (int64_t i = 0; i < count; ++i) {
    int64_t d = 0;
    for (; d + LANES_64 <= width; d += LANES_64) {
      Floats4 narrow;
      std::memcpy(&narrow, slots + i * width + d, sizeof(narrow));
      const Doubles4 value = __builtin_convertvector(narrow, Doubles4);
      std::memcpy(wide + i * padded + d, &value, sizeof(value));
    }
    for (; d < padded; ++d) wide[i * padded + d] = d < width ? slots[i * width + d] : 0;
  }
  for (int64_t i = 0; i < count; i += SIDE) {
    for (int64_t j = i; j < count; j += SIDE) {
      const double *left[SIDE], *right[SIDE];
      for (int64_t k = 0; k < SIDE; ++k) {
        left[k] = wide + std::min(i + k, count - 1) * padded;
        right[k] = wide + std::min(j + k, count - 1) * padded;
      }
      Doubles4 sums[SIDE][SIDE];
      if (i == j)
        multiply_tile<true>(left, right, padded, sums, ahead);
      else
        multiply_tile<false>(left, right, padded, sums, ahead);
      for (int64_t r = i; r < std::min(i + SIDE, count); ++r)
        for (int64_t c = std::max(r, j); c < std::min(j + SIDE, count); ++c) {
          const Doubles4 sum = sums[r - i][c - j];
          products[r * count + c] = products[c * count + r] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
        }
    }
  }
}

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> cluster_slots(Tensor slots, std::optional<Tensor> mask, double threshold, int64_t n_clusters,
                                         int64_t linkage, int64_t min_clusters) {
  const int64_t batch = slots.size(0), count = slots.size(1), width = slots.size(2), size = count * width;
  const auto integers = torch::headeronly::ScalarType::Long;
  const Tensor labels = torch::stable::new_empty(slots, {batch, count}, integers);
  const Tensor counts = torch::stable::new_empty(slots, {batch}, integers);
  const float* from = slots.const_data_ptr<float>();
  const bool* valid = mask ? mask->const_data_ptr<bool>() : nullptr;
  int64_t *to_labels = labels.mutable_data_ptr<int64_t>(), *to_counts = counts.mutable_data_ptr<int64_t>();
  const Rule rule{static_cast<int>(linkage), threshold, static_cast<int>(n_clusters), static_cast<int>(min_clusters)};

  const int64_t grain = 1 + WORTH_A_THREAD / (count * size);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> wide(count * (width + LANES_64)), doubles(count * (count + 1));
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
      multiply_pairs(from + b * size, count, width, from + end * size, wide.data(), problem.distances);
      distances_of_products(OneLane{}, problem);
      cluster(OneLane{}, problem, rule, to_labels + b * count, to_counts + b);
    }
  });
  return {labels, counts};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) { m.impl("cluster_slots", TORCH_BOX(&slotkernels::cluster_slots)); }
