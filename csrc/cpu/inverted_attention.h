// Data of inverted attention that all levels of the CPU share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace slotkernels {

constexpr int64_t TOKENS = 64;  // of a tile, which stays in the cache; a multiple of every level's LANES

// One call, all float32. Rows are contiguous; samples of k and v are `k_sample` and `v_sample` apart.
struct Attention {
  const float *q, *k, *v;  // v is k if they are the same
  const float* bias;       // or null
  const bool* mask;        // [B, mask_groups, M], or null
  int64_t slots, tokens, dim, value_dim, k_sample, v_sample, groups, mask_groups;
  float scale, weight_eps, total_eps;
};

// Results of the forward pass; `attention` may be null.
struct Attended {
  float *updates, *total, *attention;
};

// Gradients of the results (each may be null), and the results that the backward pass reads. If the attention is null,
// it is computed again.
struct Cotangents {
  const float *updates, *total, *attention;
  const float *forward_updates, *forward_total, *forward_attention;
};

// Gradients of the inputs; null where none is needed. If keys are also the values, `k` is the sum of both gradients.
struct Gradients {
  float *q, *k, *v, *bias;
};

}  // namespace slotkernels
