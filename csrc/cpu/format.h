// The floating-point formats that kernels read and write. simd.h converts them to vectors of floats and back.
#pragma once

namespace slotkernels {

enum class Format { FLOAT, BFLOAT, HALF };

struct Input {
  const void* data;  // or null: rows of zeros
  Format format;
};

struct Output {
  void* data;  // or null: nothing is written
  Format format;
};

}  // namespace slotkernels
