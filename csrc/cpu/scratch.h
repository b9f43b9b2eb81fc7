// Memory that a kernel works in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace slotkernels {

struct Release {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
typedef std::unique_ptr<float[], Release> Scratch;

// Zeros, aligned to a cache line.
inline Scratch scratch(int64_t floats) {
  void* memory = ::operator new[](floats * sizeof(float), std::align_val_t(64));
  std::fill_n(static_cast<float*>(memory), floats, 0.0f);
  return Scratch(static_cast<float*>(memory));
}

}  // namespace slotkernels
