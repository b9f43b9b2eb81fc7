// The steps between the two products of inverted attention on CPUs, for 16-bit slots and tokens, as in
// kernels/slotkernels/slot_attention/reference.py. PyTorch computes the products. One thread computes a sample.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "inverted_attention_weights.h"
#include "tensors.h"

#define KERNELS "inverted_attention_weights_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

// Of products [B, tokens, slots].
Competition view(const Tensor& products, const Maybe& bias, const Maybe& mask, double scale, double weight_eps,
                 double total_eps, int64_t groups) {
  return {pointer(bias),
          mask ? mask->const_data_ptr<bool>() : nullptr,
          products.size(2),
          products.size(1),
          groups,
          mask ? mask->size(1) : 1,
          static_cast<float>(scale),
          static_cast<float>(weight_eps),
          static_cast<float>(total_eps),
          format(products)};
}

// Samples for each thread, at least: about 20 µs of work.
int64_t grain(const Competition& call) { return 1 + (1 << 15) / (call.slots * call.tokens); }

std::tuple<Tensor, Tensor, Tensor> attention_weights(const Tensor& logits, const Maybe& bias, const Maybe& mask,
                                                     double scale, double weight_eps, double total_eps, int64_t groups,
                                                     bool return_attention) {
  const Competition call = view(logits, bias, mask, scale, weight_eps, total_eps, groups);
  const int64_t batch = logits.size(0);
  Tensor weights = empty({batch, call.slots, call.tokens}, logits.scalar_type());
  Tensor total = empty({batch, call.slots});
  Tensor attention = empty(return_attention ? Sizes{batch, call.slots, call.tokens} : Sizes{0});
  const Weighing pass{logits.const_data_ptr(), return_attention ? attention.mutable_data_ptr<float>() : nullptr,
                      total.mutable_data_ptr<float>(), weights.mutable_data_ptr()};
  const auto weigh = BEST_LEVEL(weigh_samples);
  torch::stable::parallel_for(0, batch, grain(call), [&](int64_t begin, int64_t end) { weigh(call, begin, end, pass); });
  return {weights, total, attention};
}

std::tuple<Tensor, Tensor, Tensor> attention_weights_backward(
    const Tensor& grad_weights, const Tensor& grad_updates, const Maybe& grad_total, const Maybe& grad_attention,
    const Tensor& updates, const Tensor& total, const Tensor& attention, const Maybe& mask, double scale,
    double weight_eps, int64_t groups, bool need_weights, bool need_bias) {
  const Competition call = view(grad_weights, Maybe(), mask, scale, weight_eps, 0.0, groups);
  const int64_t batch = grad_weights.size(0);
  const Sizes sizes{batch, call.slots, call.tokens};
  Tensor grad_logits = empty(sizes, grad_weights.scalar_type());
  Tensor weights = empty(need_weights ? sizes : Sizes{0}, grad_weights.scalar_type());
  Tensor grad_bias = empty(need_bias ? Sizes{batch, call.slots} : Sizes{0});
  const WeighingBackward pass{grad_weights.const_data_ptr(),
                              grad_updates.const_data_ptr(),
                              updates.const_data_ptr(),
                              updates.size(2),
                              attention.const_data_ptr<float>(),
                              total.const_data_ptr<float>(),
                              pointer(grad_total),
                              pointer(grad_attention),
                              grad_logits.mutable_data_ptr(),
                              need_weights ? weights.mutable_data_ptr() : nullptr,
                              need_bias ? grad_bias.mutable_data_ptr<float>() : nullptr};
  const auto differentiate = BEST_LEVEL(weigh_samples_backward);
  torch::stable::parallel_for(0, batch, grain(call),
                              [&](int64_t begin, int64_t end) { differentiate(call, begin, end, pass); });
  return {grad_logits, weights, grad_bias};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("attention_weights", TORCH_BOX(&slotkernels::attention_weights));
  m.impl("attention_weights_backward", TORCH_BOX(&slotkernels::attention_weights_backward));
}
