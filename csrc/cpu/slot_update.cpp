// The slot update on CPUs, as in kernels/slotkernels/slot_update/reference.py. Each thread computes some of the rows.
// The gradients of weight and bias are summed over blocks of rows, then over the blocks in order. Blocks depend only on
// the number of rows, so results do not depend on the threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "slot_update.h"
#include "tensors.h"

#define KERNELS "slot_update_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

constexpr int64_t GRU_ELEMENTS = 1 << 13, ADD_ELEMENTS = 1 << 14;  // least for a thread: twice the time of its start
constexpr int64_t MIN_BLOCK = 32, MAX_BLOCKS = 64;                 // the sums of a block take the time of 2 rows

Tensor floats(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
}

int64_t rows(const Tensor& slots, int64_t dim) { return slots.numel() / dim; }

struct Results {
  Tensor slots, normalised, mean, rstd;

  Results(const Tensor& like, ScalarType dtype)
      : slots(empty(sizes(like), like.scalar_type())),
        normalised(empty(sizes(like), dtype)),
        mean(statistics(like)),
        rstd(statistics(like)) {}

  Normalised view() const {
    return {output(slots), output(normalised), mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>()};
  }

 private:
  static Tensor statistics(const Tensor& like) {
    Sizes rows = sizes(like);
    rows.pop_back();
    return empty(rows);
  }
};

// The blocks of a backward pass, and its sums for weight and bias [blocks, 2, dim].
struct Blocks {
  int64_t rows, dim, length, count;
  Scratch sums;

  Blocks(int64_t rows, int64_t dim)
      : rows(rows),
        dim(dim),
        length(std::max(MIN_BLOCK, (rows + MAX_BLOCKS - 1) / MAX_BLOCKS)),
        count((rows + length - 1) / length),
        sums(scratch(count * 2 * dim)) {}

  int64_t grain(int64_t elements) const { return 1 + elements / (length * dim); }

  void add_to(float* total) const {
    std::fill_n(total, 2 * dim, 0.0f);
    for (int64_t b = 0; b < count; ++b) {
      const float* part = sums.get() + b * 2 * dim;
      for (int64_t i = 0; i < 2 * dim; ++i) total[i] += part[i];
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_norm(const Tensor& gates_input, const Tensor& gates_hidden,
                                                    const Tensor& slots, const Tensor& weight_, const Tensor& bias_,
                                                    double norm_eps) {
  const Tensor weight = floats(weight_), bias = floats(bias_);
  const int64_t dim = weight.size(0);
  const Results results(slots, gates_input.scalar_type());
  const GruInputs from{input(gates_input), input(gates_hidden), input(slots)};
  const Norm norm{weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), dim, static_cast<float>(norm_eps)};
  const Normalised to = results.view();
  const auto solve = BEST_LEVEL(gru_norm_rows);
  torch::stable::parallel_for(0, rows(slots, dim), 1 + GRU_ELEMENTS / dim,
                              [&](int64_t begin, int64_t end) { solve(from, norm, begin, end, to); });
  return {results.slots, results.normalised, results.mean, results.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_norm_backward(const Maybe& grad_slots, const Maybe& grad_normalised,
                                                             const Tensor& gates_input, const Tensor& gates_hidden,
                                                             const Tensor& slots, const Tensor& weight_,
                                                             const Tensor& mean, const Tensor& rstd) {
  const Tensor weight = floats(weight_);
  const int64_t dim = weight.size(0);
  const Sizes wide = sizes(gates_input);
  Tensor grad_input = empty(wide, gates_input.scalar_type()), grad_hidden = empty(wide, gates_input.scalar_type());
  Tensor grad_state = empty(sizes(slots), slots.scalar_type());
  Tensor affine = empty(grad_normalised ? Sizes{2, dim} : Sizes{0});
  const GruInputs from{input(gates_input), input(gates_hidden), input(slots)};
  const Input cotangent = input(grad_slots);
  const NormGradient norm{input(grad_normalised), weight.const_data_ptr<float>(), mean.const_data_ptr<float>(),
                          rstd.const_data_ptr<float>(), dim};
  const GruGradients to{output(grad_input), output(grad_hidden), output(grad_state)};
  const Blocks blocks(rows(slots, dim), dim);
  const auto solve = BEST_LEVEL(gru_norm_backward_blocks);
  torch::stable::parallel_for(0, blocks.count, blocks.grain(GRU_ELEMENTS), [&](int64_t begin, int64_t end) {
    solve(from, cotangent, norm, blocks.rows, blocks.length, begin, end, to, blocks.sums.get());
  });
  if (grad_normalised) blocks.add_to(affine.mutable_data_ptr<float>());
  return {grad_input, grad_hidden, grad_state, affine};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm(const Tensor& slots, const Tensor& update, const Tensor& weight_,
                                                    const Tensor& bias_, double norm_eps) {
  const Tensor weight = floats(weight_), bias = floats(bias_);
  const int64_t dim = weight.size(0);
  const Results results(slots, update.scalar_type());
  const Input left = input(slots), right = input(update);
  const Norm norm{weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), dim, static_cast<float>(norm_eps)};
  const Normalised to = results.view();
  const auto solve = BEST_LEVEL(add_norm_rows);
  torch::stable::parallel_for(0, rows(slots, dim), 1 + ADD_ELEMENTS / dim,
                              [&](int64_t begin, int64_t end) { solve(left, right, norm, begin, end, to); });
  return {results.slots, results.normalised, results.mean, results.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_norm_backward(const Maybe& grad_total, const Tensor& grad_normalised,
                                                     const Tensor& total, const Tensor& weight_, const Tensor& mean,
                                                     const Tensor& rstd) {
  const Tensor weight = floats(weight_);
  const int64_t dim = weight.size(0);
  const bool shared = grad_normalised.scalar_type() == total.scalar_type();
  Tensor grad_slots = empty(sizes(total), total.scalar_type());
  Tensor grad_update = empty(shared ? Sizes{0} : sizes(total), grad_normalised.scalar_type());
  Tensor affine = empty({2, dim});
  const Input values = input(total), cotangent = input(grad_total);
  const NormGradient norm{input(grad_normalised), weight.const_data_ptr<float>(), mean.const_data_ptr<float>(),
                          rstd.const_data_ptr<float>(), dim};
  const Output to_slots = output(grad_slots), to_update = shared ? Output{nullptr, Format::FLOAT} : output(grad_update);
  const Blocks blocks(rows(total, dim), dim);
  const auto solve = BEST_LEVEL(add_norm_backward_blocks);
  torch::stable::parallel_for(0, blocks.count, blocks.grain(ADD_ELEMENTS), [&](int64_t begin, int64_t end) {
    solve(values, cotangent, norm, blocks.rows, blocks.length, begin, end, to_slots, to_update, blocks.sums.get());
  });
  blocks.add_to(affine.mutable_data_ptr<float>());
  return {grad_slots, grad_update, affine};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("gru_norm", TORCH_BOX(&slotkernels::gru_norm));
  m.impl("gru_norm_backward", TORCH_BOX(&slotkernels::gru_norm_backward));
  m.impl("add_norm", TORCH_BOX(&slotkernels::add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&slotkernels::add_norm_backward));
}
