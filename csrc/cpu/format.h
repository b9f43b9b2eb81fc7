// The floating-point formats that kernels read and write; simd.h loads and stores them as vectors of floats.
#pragma once

namespace slotkernels {

enum class Format { FLOAT, BFLOAT, HALF };

}  // namespace slotkernels
