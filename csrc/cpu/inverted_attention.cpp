// Inverted attention on CPUs, as in kernels/slotkernels/slot_attention/reference.py. One thread computes a sample,
// always in the same order of operations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "inverted_attention.h"
#include "tensors.h"

#define KERNELS "inverted_attention_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

Attention view(const Tensor& q, const Tensor& k, const Maybe& v, const Maybe& bias, const Maybe& mask, double scale,
               double weight_eps, double total_eps, int64_t groups) {
  const Tensor& values = v ? *v : k;
  return {q.const_data_ptr<float>(),
          k.const_data_ptr<float>(),
          values.const_data_ptr<float>(),
          pointer(bias),
          mask ? mask->const_data_ptr<bool>() : nullptr,
          q.size(1),
          k.size(1),
          k.size(2),
          values.size(2),
          k.stride(0),
          values.stride(0),
          groups,
          mask ? mask->size(1) : 1,
          static_cast<float>(scale),
          static_cast<float>(weight_eps),
          static_cast<float>(total_eps)};
}

// Samples for each thread, at least: about 20 µs of work.
int64_t grain(const Attention& call) { return 1 + (1 << 19) / (call.slots * call.tokens * call.dim); }

// Tensors are contiguous, except that samples of k and v may have any stride.
std::tuple<Tensor, Tensor, Tensor> inverted_attention(const Tensor& q, const Tensor& k, const Maybe& v,
                                                      const Maybe& bias, const Maybe& mask, double scale,
                                                      double weight_eps, double total_eps, int64_t groups,
                                                      bool return_attention) {
  const Attention call = view(q, k, v, bias, mask, scale, weight_eps, total_eps, groups);
  const int64_t batch = q.size(0);
  Tensor updates = empty({batch, call.slots, call.value_dim}), total = empty({batch, call.slots});
  Tensor attention = empty(return_attention ? Sizes{batch, call.slots, call.tokens} : Sizes{0});
  const Attended to{updates.mutable_data_ptr<float>(), total.mutable_data_ptr<float>(),
                    return_attention ? attention.mutable_data_ptr<float>() : nullptr};
  const auto attend = BEST_LEVEL(attend_samples);
  torch::stable::parallel_for(0, batch, grain(call),
                              [&](int64_t begin, int64_t end) { attend(call, begin, end, to); });
  return {updates, total, attention};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> inverted_attention_backward(
    const Maybe& grad_updates, const Maybe& grad_total, const Maybe& grad_attention, const Tensor& q, const Tensor& k,
    const Maybe& v, const Maybe& bias, const Maybe& mask, double scale, double weight_eps, double total_eps,
    int64_t groups, const Tensor& updates, const Tensor& total, const Maybe& attention,
    bool need_q, bool need_k, bool need_v, bool need_bias) {
  const Attention call = view(q, k, v, bias, mask, scale, weight_eps, total_eps, groups);
  const int64_t batch = q.size(0);
  const auto gradient = [](bool needed, const Sizes& sizes) { return empty(needed ? sizes : Sizes{0}); };
  Tensor grad_q = gradient(need_q, {batch, call.slots, call.dim});
  Tensor grad_k = gradient(need_k, {batch, call.tokens, call.dim});
  Tensor grad_v = gradient(need_v, {batch, call.tokens, call.value_dim});
  Tensor grad_bias = gradient(need_bias, {batch, call.slots});
  const Cotangents from{pointer(grad_updates), pointer(grad_total), pointer(grad_attention),
                        updates.const_data_ptr<float>(), total.const_data_ptr<float>(), pointer(attention)};
  const Gradients to{need_q ? grad_q.mutable_data_ptr<float>() : nullptr,
                     need_k ? grad_k.mutable_data_ptr<float>() : nullptr,
                     need_v ? grad_v.mutable_data_ptr<float>() : nullptr,
                     need_bias ? grad_bias.mutable_data_ptr<float>() : nullptr};
  const auto differentiate = BEST_LEVEL(differentiate_samples);
  torch::stable::parallel_for(0, batch, grain(call),
                              [&](int64_t begin, int64_t end) { differentiate(call, begin, end, from, to); });
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("inverted_attention", TORCH_BOX(&slotkernels::inverted_attention));
  m.impl("inverted_attention_backward", TORCH_BOX(&slotkernels::inverted_attention_backward));
}
