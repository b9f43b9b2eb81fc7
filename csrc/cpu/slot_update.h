// What the code of the slot update works on, whatever the level of the CPU. Rows lie one after the other.
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

// What a backward pass knows of its layer norm. `grad` is null if nothing comes through it.
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
