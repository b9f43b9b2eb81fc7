// The Sinkhorn divergence of many small sets on CPUs, as in kernels/slotkernels/sinkhorn/reference.py. One thread
// solves a problem, always in the same order of operations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "sinkhorn.h"
#include "tensors.h"

#define KERNELS "sinkhorn_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

// Float32 and contiguous; the tensor must outlive the pointer.
Maybe readable(const Maybe& tensor) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Float));
}

Points view(const Tensor& x, const Tensor& y, const Maybe& a, const Maybe& b) {
  return {x.const_data_ptr(), y.const_data_ptr(), format(x), x.size(1), y.size(1), x.size(2), pointer(a), pointer(b)};
}

// Problems for each thread, at least: about 20 µs of work.
int64_t grain(const Points& points) {
  const double rows = points.n + points.m;
  return std::max<int64_t>(1, 1e6 / (rows * rows * (points.dim + 200)));
}

double batch_diameter(const Points& points, int64_t batch) {
  std::mutex mutex;
  std::vector<float> low(points.dim, std::numeric_limits<float>::infinity());
  std::vector<float> high(points.dim, -std::numeric_limits<float>::infinity());
  Box all{low.data(), high.data(), true};
  const auto bound = BEST_LEVEL(bound);
  torch::stable::parallel_for(0, batch, grain(points), [&](int64_t begin, int64_t end) {
    const int64_t side = points.dim + 64;  // whole vectors
    const Scratch memory = scratch(2 * side);
    Box box{memory.get(), memory.get() + side, true};
    bound(points, begin, end, box);
    const std::lock_guard<std::mutex> guard(mutex);
    for (int64_t d = 0; d < points.dim; ++d) {
      all.low[d] = std::min(all.low[d], box.low[d]);
      all.high[d] = std::max(all.high[d], box.high[d]);
    }
    all.finite &= box.finite;
  });
  return all.diagonal(points.dim);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(const Tensor& x_, const Tensor& y_, const Maybe& a_,
                                                            const Maybe& b_, std::optional<double> diameter,
                                                            bool per_problem, int64_t p, double blur, double scaling,
                                                            std::optional<double> reach, bool debias, bool potentials,
                                                            bool keep_x, bool keep_y) {
  const Tensor x = torch::stable::contiguous(x_), y = torch::stable::contiguous(y_);
  const Maybe a = readable(a_), b = readable(b_);
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1);
  Tensor value = empty({batch}), f = empty({batch, n}), g = empty({batch, m});
  Tensor pull_x = keep_x ? empty({batch, n, n + m}) : empty({0});
  Tensor pull_y = keep_y ? empty({batch, m, n + m}) : empty({0});

  const Points points = view(x, y, a, b);
  const double start = diameter ? *diameter : per_problem ? 0 : batch_diameter(points, batch);
  const double rho = reach ? std::pow(*reach, p) : std::numeric_limits<double>::infinity();
  Forward call{points, static_cast<int>(p), blur, scaling, start, Penalty(rho, std::pow(blur, p), !potentials)};
  call.per_problem = !diameter && per_problem;
  call.debias = debias;
  call.value = value.mutable_data_ptr<float>();
  call.f = f.mutable_data_ptr<float>();
  call.g = g.mutable_data_ptr<float>();
  call.pull_x = keep_x ? pull_x.mutable_data_ptr<float>() : nullptr;
  call.pull_y = keep_y ? pull_y.mutable_data_ptr<float>() : nullptr;
  const auto solve = BEST_LEVEL(solve);
  torch::stable::parallel_for(0, batch, grain(points), [&](int64_t begin, int64_t end) { solve(call, begin, end); });
  return {value, f, g, pull_x, pull_y};
}

std::tuple<Tensor, Tensor> sinkhorn_backward(const Maybe& grad_value_, const Maybe& grad_f_, const Maybe& grad_g_,
                                             const Tensor& x_, const Tensor& y_, const Maybe& a_, const Maybe& b_,
                                             const Maybe& pull_x_, const Maybe& pull_y_) {
  const Tensor x = torch::stable::contiguous(x_), y = torch::stable::contiguous(y_);
  const Maybe grad_value = readable(grad_value_), grad_f = readable(grad_f_), grad_g = readable(grad_g_);
  const Maybe a = readable(a_), b = readable(b_), pull_x = readable(pull_x_), pull_y = readable(pull_y_);
  const auto gradient = [](const Tensor& points, const Maybe& pull) {
    return empty(pull ? sizes(points) : Sizes{0}, points.scalar_type());
  };
  Tensor grad_x = gradient(x, pull_x), grad_y = gradient(y, pull_y);

  Backward call{view(x, y, a, b), pointer(grad_value), pointer(grad_f), pointer(grad_g),
                pointer(pull_x),  pointer(pull_y),     nullptr,         nullptr};
  if (pull_x) call.grad_x = grad_x.mutable_data_ptr();
  if (pull_y) call.grad_y = grad_y.mutable_data_ptr();
  const auto pull_back = BEST_LEVEL(pull_back);
  torch::stable::parallel_for(0, x.size(0), grain(call.points),
                              [&](int64_t begin, int64_t end) { pull_back(call, begin, end); });
  return {grad_x, grad_y};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&slotkernels::sinkhorn));
  m.impl("sinkhorn_backward", TORCH_BOX(&slotkernels::sinkhorn_backward));
}
