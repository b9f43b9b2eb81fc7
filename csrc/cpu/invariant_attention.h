// Data of invariant attention that all levels of the CPU share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "scratch.h"

namespace slotkernels {

constexpr float SMALLEST_VARIANCE = 1e-12f;    // as in reference.py
constexpr float SMALLEST_SCALE = 1.000001e-6f;  // its root, rounded up; the scale has no gradient up to here

// One call, all float32 and contiguous; shapes as in kernels/slotkernels/invariant_slot_attention/op.py.
struct InvariantAttention {
  const float *q, *bias, *k, *v, *frame, *grid, *positions, *scales;
  const float *shift, *key_deviation, *value_deviation;  // with a layer norm, or all null
  const bool* mask;                                      // or null
  int64_t slots, tokens, dim;
  float scale, scale_factor, weight_eps, total_eps, scale_eps;

  int64_t rank() const { return shift ? 3 : 2; }  // axes of a pre-activation: the frame's two, and the shift
};

// Results of the forward pass.
struct InvariantResults {
  float *updates, *attention, *weights, *positions, *scales;
};

// Gradients of the results (each may be null), and the results that the backward pass reads.
struct InvariantCotangents {
  const float *updates, *attention, *weights, *positions, *scales;
  const float *forward_attention, *forward_weights, *forward_positions, *forward_scales;
};

// Gradients of the inputs; null where none is needed. `axes`: of frame and shift, [B, rank, D], one for each sample.
struct InvariantGradients {
  float *q, *bias, *k, *v, *axes, *grid, *positions, *scales, *key_deviation, *value_deviation;
};

}  // namespace slotkernels
