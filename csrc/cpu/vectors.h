// Vectors of 8 floats, for code that compares, and 16-bit floats to such vectors and back.
//
// GCC splits arithmetic on the 16 floats of simd.h for CPUs with AVX2, but takes comparisons, selections and conversions
// apart element by element: label maps were 20 times slower there. With AVX-512 they are as fast with 8 floats.
#pragma once

#include "simd.h"

namespace slotkernels {

constexpr int64_t WIDTH = 8;
typedef float Float8 __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Mask8 __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits8 __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Half8 __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t Byte8 __attribute__((vector_size(WIDTH)));

ALWAYS_INLINE Float8 load8(const float* from) {
  Float8 value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// Numbers 0..255 as bytes. In two steps: GCC takes the one from 32 to 8 bits apart.
ALWAYS_INLINE Byte8 to_bytes(Mask8 value) {
  return __builtin_convertvector(__builtin_convertvector(value, Half8), Byte8);
}

// Any vector to memory.
template <class Vector>
ALWAYS_INLINE void put(void* to, Vector value) {
  std::memcpy(to, &value, sizeof(value));
}

ALWAYS_INLINE Float8 larger(Float8 a, Float8 b) { return a > b ? a : b; }
ALWAYS_INLINE Float8 smaller(Float8 a, Float8 b) { return a < b ? a : b; }

ALWAYS_INLINE Float8 from_bfloat16(Half8 value) { return (Float8)(__builtin_convertvector(value, Bits8) << 16); }

ALWAYS_INLINE Float8 from_float16(Half8 value) {
  const Bits8 bits = __builtin_convertvector(value, Bits8);
  // Exponents differ by 112; the product also makes subnormal numbers normal. Infinity and NaN have all exponent bits.
  const Bits8 magnitude = (Bits8)((Float8)((bits & 0x7fff) << 13) * 0x1p112f);
  const Bits8 special = (Bits8)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (Float8)(magnitude | special | ((bits & 0x8000) << 16));
}

// Rounds to nearest, ties to even; of a number that is not negative, or NaN.
ALWAYS_INLINE Half8 to_float16(Float8 value) {
  const Float8 limit = Float8{} + 65536.0f;  // becomes infinity
  Bits8 bits = (Bits8)((value > limit ? limit : value) * 0x1p-112f);
  bits = (bits + 0xfff + ((bits >> 13) & 1)) >> 13;
  return __builtin_convertvector(bits, Half8);
}

}  // namespace slotkernels
