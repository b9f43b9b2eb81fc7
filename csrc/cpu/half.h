// 16-bit floats to vectors of 16 floats and back, in integer arithmetic that every CPU has.
#pragma once

#include "simd.h"

namespace slotkernels {

typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

ALWAYS_INLINE Floats from_bfloat16(Halves value) { return (Floats)(__builtin_convertvector(value, Bits) << 16); }

ALWAYS_INLINE Floats from_float16(Halves value) {
  const Bits bits = __builtin_convertvector(value, Bits);
  // Exponents differ by 112; the product also makes subnormal numbers normal. Infinity and NaN have all exponent bits.
  const Bits magnitude = (Bits)((Floats)((bits & 0x7fff) << 13) * 0x1p112f);
  const Bits special = (Bits)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (Floats)(magnitude | special | ((bits & 0x8000) << 16));
}

// Rounds to nearest, ties to even; of a number that is not negative, or NaN.
ALWAYS_INLINE Halves to_float16(Floats value) {
  const Floats limit = Floats{} + 65536.0f;  // becomes infinity
  Bits bits = (Bits)((value > limit ? limit : value) * 0x1p-112f);
  bits = (bits + 0xfff + ((bits >> 13) & 1)) >> 13;
  return __builtin_convertvector(bits, Halves);
}

}  // namespace slotkernels
