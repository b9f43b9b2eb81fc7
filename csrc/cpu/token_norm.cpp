// The layer norm of tokens on CPUs, as in kernels/slotkernels/slot_attention/reference.py. Each thread computes some of
// the rows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "slot_update.h"
#include "tensors.h"

#define KERNELS "token_norm_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

constexpr int64_t ELEMENTS = 1 << 14;  // least for a thread: twice the time of its start

// Contiguous tokens [B, M, D]; `dtype` is that of the result.
std::tuple<Tensor, Tensor, Tensor> token_norm(const Tensor& tokens, double eps, ScalarType dtype) {
  const int64_t rows = tokens.size(0) * tokens.size(1), dim = tokens.size(2);
  Tensor normalised = empty(sizes(tokens), dtype);
  Tensor mean = empty({tokens.size(0), tokens.size(1)}), rstd = empty({tokens.size(0), tokens.size(1)});
  const Input from = input(tokens);
  const Output to = output(normalised);
  float *means = mean.mutable_data_ptr<float>(), *rstds = rstd.mutable_data_ptr<float>();
  const auto solve = BEST_LEVEL(token_norm_rows);
  torch::stable::parallel_for(0, rows, 1 + ELEMENTS / dim, [&](int64_t begin, int64_t end) {
    solve(from, dim, static_cast<float>(eps), begin, end, to, means, rstds);
  });
  return {normalised, mean, rstd};
}

Tensor token_norm_backward(const Tensor& grad, const Tensor& tokens, const Tensor& mean, const Tensor& rstd) {
  const int64_t rows = tokens.size(0) * tokens.size(1), dim = tokens.size(2);
  Tensor result = empty(sizes(tokens), tokens.scalar_type());
  const Input from = input(tokens), cotangent = input(grad);
  const Output to = output(result);
  const float *means = mean.const_data_ptr<float>(), *rstds = rstd.const_data_ptr<float>();
  const auto solve = BEST_LEVEL(token_norm_backward_rows);
  torch::stable::parallel_for(0, rows, 1 + ELEMENTS / dim, [&](int64_t begin, int64_t end) {
    solve(from, cotangent, dim, means, rstds, begin, end, to);
  });
  return result;
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("token_norm", TORCH_BOX(&slotkernels::token_norm));
  m.impl("token_norm_backward", TORCH_BOX(&slotkernels::token_norm_backward));
}
