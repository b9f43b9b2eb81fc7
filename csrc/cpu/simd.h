// Vectors of 16 floats in GCC's and Clang's portable extension, and functions compiled for every level of x86-64.
//
// A function marked EVERY_CPU exists once for AVX-512, once for AVX2 and once for the baseline; the loader picks. What it
// calls must be inlined into it (ALWAYS_INLINE), so that the call is compiled for the same level. Without AVX-512 the
// compiler splits a vector into two or four.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace slotkernels {

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

ALWAYS_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

ALWAYS_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

}  // namespace slotkernels
