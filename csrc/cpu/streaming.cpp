// Sums over all pairs of two large sets of points, in memory that is linear in the points: the Sinkhorn updates and
// gradients of kernels/slotkernels/sinkhorn/streaming/cpp.py. A free thread takes the next band of rows. Results do not
// depend on which thread takes it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <tuple>

#include "streaming.h"
#include "tensors.h"

#define KERNELS "streaming_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

// Calls do_one(0), …, do_one(count - 1). The next free thread takes each, because they take different times.
template <class Do>
void share_out(int64_t count, Do do_one) {
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) do_one(i);
  });
}

Pairs view(const Tensor& x, const Tensor& y, const Tensor& panels, const Tensor& r, const Tensor& s, const Tensor& a,
           const Tensor& b, const Tensor& scale, int64_t n, int64_t m, int64_t p, bool same) {
  const auto pointer = [](const Tensor& tensor) { return tensor.const_data_ptr<float>(); };
  return {pointer(x), pointer(y),     pointer(panels), pointer(r), pointer(a), pointer(s), pointer(b), pointer(scale), n,
          m,          panels.size(2), x.size(2),       static_cast<int>(p), same};
}

std::tuple<Tensor, Tensor> streaming_sums(const Tensor& x, const Tensor& panels, const Tensor& r, const Tensor& s,
                                          const Tensor& a, const Tensor& b, const Tensor& scale, int64_t n, int64_t m,
                                          int64_t p, bool same) {
  const int64_t batch = x.size(0), width = s.size(1);
  Tensor rows = empty({batch, n}, ScalarType::Double);
  Tensor columns = empty({batch, m}, ScalarType::Double);
  const Pairs call = view(x, x, panels, r, s, a, b, scale, n, m, p, same);
  const Bands bands(n);
  const Scratch partial = scratch(batch * bands.count * width);
  double* to_rows = rows.mutable_data_ptr<double>();
  double* to_columns = columns.mutable_data_ptr<double>();
  const auto sums = BEST_LEVEL(sums);
  share_out(batch * bands.count, [&](int64_t i) {
    const int64_t problem = i / bands.count, first = i % bands.count * bands.height * BLOCK;
    sums(call, problem, first, first + bands.height * BLOCK, to_rows + problem * n, partial.get() + i * width);
  });
  for (int64_t problem = 0; problem < batch; ++problem) {
    for (int64_t j = 0; j < m; ++j) {
      double sum = 0;
      for (int64_t band = 0; band < bands.count; ++band) {
        sum += partial[(problem * bands.count + band) * width + j];
      }
      to_columns[problem * m + j] = sum;
    }
  }
  return {rows, columns};
}

std::tuple<Tensor, Tensor> streaming_slopes(const Tensor& x, const Tensor& y, const Tensor& panels, const Tensor& r,
                                            const Tensor& s, const Tensor& b, const Tensor& scale, int64_t n, int64_t m,
                                            int64_t p) {
  const int64_t batch = x.size(0), dim = panels.size(2), count = blocks(n);
  Tensor totals = empty({batch, n}, ScalarType::Double);
  Tensor pulls = empty({batch, n, dim}, ScalarType::Double);
  const Pairs call = view(x, y, panels, r, s, r, b, scale, n, m, p, false);
  double* to_totals = totals.mutable_data_ptr<double>();
  double* to_pulls = pulls.mutable_data_ptr<double>();
  const auto slopes = BEST_LEVEL(slopes);
  share_out(batch * count, [&](int64_t i) {
    const int64_t problem = i / count;
    slopes(call, problem, i % count * BLOCK, to_totals + problem * n, to_pulls + problem * n * dim);
  });
  return {totals, pulls};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("streaming_sums", TORCH_BOX(&slotkernels::streaming_sums));
  m.impl("streaming_slopes", TORCH_BOX(&slotkernels::streaming_slopes));
}
