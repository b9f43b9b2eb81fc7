// The format of a tensor's numbers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "format.h"

namespace slotkernels {

inline Format format(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Format::FLOAT;
    case ScalarType::BFloat16: return Format::BFLOAT;
    case ScalarType::Half: return Format::HALF;
    default: STD_TORCH_CHECK(false, "slotkernels: expected float32, bfloat16 or float16 tensors");
  }
}

}  // namespace slotkernels
