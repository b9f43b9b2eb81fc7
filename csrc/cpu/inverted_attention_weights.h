// The steps between the two products of inverted attention, for 16-bit slots and tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "format.h"
#include "scratch.h"

namespace slotkernels {

// One call; all tensors are contiguous. The products (logits, and the gradient of the weights) are [B, tokens, slots].
// All other tensors of slots and tokens are [B, slots, tokens], in the format of the products or, if they are `float`,
// in float32.
struct Competition {
  const float* bias;  // [B, slots], or null
  const bool* mask;   // [B, mask_groups, tokens], or null
  int64_t slots, tokens, groups, mask_groups;
  float scale, weight_eps, total_eps;
  Format format;
};

// From logits to weights; `attention` is floats, or null.
struct Weighing {
  const void* logits;
  float *attention, *total;  // total is [B, slots]
  void* weights;
};

// From the gradient of the weights to that of the logits. `attention` and `grad_attention` are floats. `grad_total`,
// `grad_attention`, `weights` and `grad_bias` may be null.
struct WeighingBackward {
  const void *grad_weights, *grad_updates, *updates;  // the latter two are [B, slots, value_dim]
  int64_t value_dim;
  const float *attention, *total, *grad_total, *grad_attention;
  void *grad_logits, *weights;
  float* grad_bias;  // [B, slots]
};

}  // namespace slotkernels
