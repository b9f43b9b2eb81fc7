// Invariant attention on CPUs, as in kernels/slotkernels/invariant_slot_attention/reference.py. One thread computes a
// sample, always in the same order of operations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "invariant_attention.h"
#include "tensors.h"

#define KERNELS "invariant_attention_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

InvariantAttention view(const Tensor& q, const Tensor& bias, const Tensor& k, const Tensor& v, const Tensor& frame,
                        const Tensor& grid, const Tensor& positions, const Tensor& scales, const Maybe& shift,
                        const Maybe& key_deviation, const Maybe& value_deviation, const Maybe& mask, double scale,
                        double scale_factor, double eps, bool denominator, double scale_eps) {
  return {q.const_data_ptr<float>(),
          bias.const_data_ptr<float>(),
          k.const_data_ptr<float>(),
          v.const_data_ptr<float>(),
          frame.const_data_ptr<float>(),
          grid.const_data_ptr<float>(),
          positions.const_data_ptr<float>(),
          scales.const_data_ptr<float>(),
          pointer(shift),
          pointer(key_deviation),
          pointer(value_deviation),
          mask ? mask->const_data_ptr<bool>() : nullptr,
          q.size(1),
          k.size(1),
          k.size(2),
          static_cast<float>(scale),
          static_cast<float>(scale_factor),
          denominator ? 0.0f : static_cast<float>(eps),
          denominator ? static_cast<float>(eps) : 0.0f,
          static_cast<float>(scale_eps)};
}

// Samples for each thread, at least: about 20 µs of work.
int64_t grain(const InvariantAttention& call) {
  return 1 + (1 << 17) / std::max<int64_t>(1, call.slots * call.tokens * call.dim);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> invariant_attention(
    const Tensor& q, const Tensor& bias, const Tensor& k, const Tensor& v, const Tensor& frame, const Tensor& grid,
    const Tensor& positions, const Tensor& scales, const Maybe& shift, const Maybe& key_deviation,
    const Maybe& value_deviation, const Maybe& mask, double scale, double scale_factor, double eps, bool denominator,
    double scale_eps) {
  const InvariantAttention call = view(q, bias, k, v, frame, grid, positions, scales, shift, key_deviation,
                                       value_deviation, mask, scale, scale_factor, eps, denominator, scale_eps);
  const int64_t batch = q.size(0);
  Tensor updates = empty({batch, call.slots, call.dim});
  Tensor attention = empty({batch, call.slots, call.tokens}), weights = empty({batch, call.slots, call.tokens});
  Tensor new_positions = empty({batch, call.slots, 2}), new_scales = empty({batch, call.slots, 2});
  const InvariantResults to{updates.mutable_data_ptr<float>(), attention.mutable_data_ptr<float>(),
                            weights.mutable_data_ptr<float>(), new_positions.mutable_data_ptr<float>(),
                            new_scales.mutable_data_ptr<float>()};
  const auto attend = BEST_LEVEL(attend_invariantly);
  torch::stable::parallel_for(0, batch, grain(call),
                              [&](int64_t begin, int64_t end) { attend(call, begin, end, to); });
  return {updates, attention, weights, new_positions, new_scales};
}

// Gradients of q, bias, k, v, frame, grid, positions, scales, shift and both deviations; [0] for those not needed.
typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> Eleven;

Eleven invariant_attention_backward(
    const Maybe& grad_updates, const Maybe& grad_attention, const Maybe& grad_weights, const Maybe& grad_positions,
    const Maybe& grad_scales, const Tensor& q, const Tensor& bias, const Tensor& k, const Tensor& v,
    const Tensor& frame, const Tensor& grid, const Tensor& positions, const Tensor& scales, const Maybe& shift,
    const Maybe& key_deviation, const Maybe& value_deviation, const Maybe& mask, double scale, double scale_factor,
    double eps, bool denominator, double scale_eps, const Tensor& attention, const Tensor& weights,
    const Tensor& new_positions, const Tensor& new_scales, bool need_q, bool need_bias, bool need_k, bool need_v,
    bool need_frame, bool need_grid, bool need_positions, bool need_scales, bool need_shift, bool need_key_deviation,
    bool need_value_deviation) {
  const InvariantAttention call = view(q, bias, k, v, frame, grid, positions, scales, shift, key_deviation,
                                       value_deviation, mask, scale, scale_factor, eps, denominator, scale_eps);
  const int64_t batch = q.size(0), slots = call.slots, tokens = call.tokens, dim = call.dim, rank = call.rank();
  const auto gradient = [](bool needed, const Sizes& sizes) { return empty(needed ? sizes : Sizes{0}); };
  Tensor grad_q = gradient(need_q, {batch, slots, dim}), grad_bias = gradient(need_bias, {batch, slots});
  Tensor grad_k = gradient(need_k, {batch, tokens, dim}), grad_v = gradient(need_v, {batch, tokens, dim});
  Tensor grad_frame = gradient(need_frame, {2, dim}), grad_shift = gradient(need_shift, {dim});
  Tensor grad_grid = gradient(need_grid, {batch, tokens, 2});
  Tensor grad_old_positions = gradient(need_positions, {batch, slots, 2});
  Tensor grad_old_scales = gradient(need_scales, {batch, slots, 2});
  Tensor grad_key_deviation = gradient(need_key_deviation, {batch, slots, tokens});
  Tensor grad_value_deviation = gradient(need_value_deviation, {batch, slots, tokens});

  const bool need_axes = need_frame || need_shift;
  std::vector<float> axes(need_axes ? batch * rank * dim : 0);
  const auto target = [](bool needed, Tensor& tensor) {
    return needed ? tensor.mutable_data_ptr<float>() : nullptr;
  };
  const InvariantCotangents from{pointer(grad_updates),
                                 pointer(grad_attention),
                                 pointer(grad_weights),
                                 pointer(grad_positions),
                                 pointer(grad_scales),
                                 attention.const_data_ptr<float>(),
                                 weights.const_data_ptr<float>(),
                                 new_positions.const_data_ptr<float>(),
                                 new_scales.const_data_ptr<float>()};
  const InvariantGradients to{target(need_q, grad_q),
                              target(need_bias, grad_bias),
                              target(need_k, grad_k),
                              target(need_v, grad_v),
                              need_axes ? axes.data() : nullptr,
                              target(need_grid, grad_grid),
                              target(need_positions, grad_old_positions),
                              target(need_scales, grad_old_scales),
                              target(need_key_deviation, grad_key_deviation),
                              target(need_value_deviation, grad_value_deviation)};
  const auto differentiate = BEST_LEVEL(differentiate_invariantly);
  torch::stable::parallel_for(0, batch, grain(call),
                              [&](int64_t begin, int64_t end) { differentiate(call, begin, end, from, to); });

  // Samples are summed in order, so the result does not depend on the threads.
  const auto add_samples = [&](Tensor& tensor, int64_t first, int64_t count) {
    float* sum = tensor.mutable_data_ptr<float>();
    std::fill_n(sum, count, 0.0f);
    for (int64_t b = 0; b < batch; ++b) {
      const float* part = axes.data() + b * rank * dim + first;
      for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
    }
  };
  if (need_frame) add_samples(grad_frame, 0, 2 * dim);
  if (need_shift) add_samples(grad_shift, 2 * dim, dim);
  return {grad_q,     grad_bias,          grad_k,          grad_v,     grad_frame,        grad_grid,
          grad_old_positions, grad_old_scales, grad_shift, grad_key_deviation, grad_value_deviation};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("invariant_attention", TORCH_BOX(&slotkernels::invariant_attention));
  m.impl("invariant_attention_backward", TORCH_BOX(&slotkernels::invariant_attention_backward));
}
