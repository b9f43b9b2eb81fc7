// Data of the slot update that all levels of the CPU share. Rows are contiguous.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "format.h"
#include "scratch.h"

namespace slotkernels {

// Weight and bias of a layer norm [dim].
struct Norm {
  const float *weight, *bias;
  int64_t dim;
  float eps;
};

// Results of both forward passes.
struct Normalised {
  Output slots, normalised;  // [rows, dim]
  float *mean, *rstd;        // [rows]
};

// The layer norm in a backward pass. `grad` is null if no gradient comes through it.
struct NormGradient {
  Input grad;  // [rows, dim]
  const float *weight, *mean, *rstd;
  int64_t dim;
};

struct GruInputs {
  Input gates_input, gates_hidden;  // [rows, 3 dim]
  Input slots;                      // [rows, dim]
};

struct GruGradients {
  Output gates_input, gates_hidden;  // [rows, 3 dim]
  Output slots;                      // [rows, dim]
};

}  // namespace slotkernels
