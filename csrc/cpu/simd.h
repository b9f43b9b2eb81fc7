// Vectors of floats as long as a register, in the portable extension of GCC and Clang, for one level of x86-64 (see
// levels.h). Functions that kernels call in their loops are inlined (ALWAYS_INLINE).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "format.h"

#undef ALWAYS_INLINE
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace slotkernels::LEVEL {

constexpr int64_t LANES = FLOATS_IN_REGISTER;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));

ALWAYS_INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

ALWAYS_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

ALWAYS_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

template <class V>
ALWAYS_INLINE Ints less(V a, V b) {
  return a < b;
}

template <class V>
ALWAYS_INLINE V where(Ints mask, V yes, V no) {
  return mask ? yes : no;
}

// b where either is NaN. With AVX-512, GCC compiles the portable form to a comparison and a blend; the intrinsic with
// all lanes on is one instruction. (The one without a mask gives a warning in GCC 12.)
#if FLOATS_IN_REGISTER == 16
ALWAYS_INLINE Floats maximum(Floats a, Floats b) { return _mm512_maskz_max_ps(-1, a, b); }
ALWAYS_INLINE Floats minimum(Floats a, Floats b) { return _mm512_maskz_min_ps(-1, a, b); }
#else
ALWAYS_INLINE Floats maximum(Floats a, Floats b) { return where(less(b, a), a, b); }
ALWAYS_INLINE Floats minimum(Floats a, Floats b) { return where(less(a, b), a, b); }
#endif

// from[index[l]] in lane l; indices are 0..LANES - 1.
ALWAYS_INLINE Floats pick(const float* from, Ints index) {
#if FLOATS_IN_REGISTER > 4  // one instruction, and GCC
  return __builtin_shuffle(load(from), index);
#else
  Floats value;
  for (int64_t l = 0; l < LANES; ++l) value[l] = from[index[l]];
  return value;
#endif
}

// 2^f - 1 for -1/2 <= f <= 1/2: relative error below 1e-7.
ALWAYS_INLINE Floats exp2_rest(Floats f) {
  Floats q = 0.001326472731307149f * f + 0.009671512991189957f;  // minimax of (2^f - 1) / f
  q = q * f + 0.05550733581185341f;
  q = q * f + 0.24022242426872253f;
  q = q * f + 0.6931470036506653f;
  return q * f;
}

// The parts of 2^(n + f) for an integer n in [-127, 128], which is 0 at n = -127 and infinity at n = 128, and f in
// [-1/2, 1/2]. `shifted` is n + ROUND, whose lowest bits hold n + 127.
constexpr float ROUND = 0x1.8p23f + 127;  // adding it rounds to an integer

ALWAYS_INLINE Floats exp2_parts(Floats shifted, Floats f) {
  return (exp2_rest(f) + 1.0f) * (Floats)((Ints)shifted << 23);
}

// 2^t for t <= 0. Relative error below 2e-7; exactly 1 at 0; 0 below -126; NaN for NaN.
ALWAYS_INLINE Floats exp2_nonpositive(Floats t) {
  const Floats shifted = t + ROUND;
  return where(less(t, Floats{} - 126.0f), Floats{}, exp2_parts(shifted, t - (shifted - ROUND)));
}

// 2^t. Relative error below 2e-7; exactly 1 at 0; 0 below -126.5; infinity from 127.5; NaN for NaN.
ALWAYS_INLINE Floats exp2_any(Floats t) {
  t = minimum(Floats{} + 128.0f, maximum(Floats{} - 127.0f, t));
  const Floats shifted = t + ROUND;
  return exp2_parts(shifted, t - (shifted - ROUND));
}

// e^t. Relative error below 3e-7; exactly 1 at 0; 0 below -87.68; infinity from 88.38; NaN for NaN.
ALWAYS_INLINE Floats exp_any(Floats t) {
  t = minimum(Floats{} + 88.73f, maximum(Floats{} - 88.03f, t));
  const Floats shifted = t * 1.44269504088896340736f + ROUND, n = shifted - ROUND;
  const Floats rest = (t - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;  // less n log 2, in two parts
  return exp2_parts(shifted, rest * 1.44269504088896340736f);
}

// log(s) of positive normal numbers: relative error below 2e-7, 0 at 1, NaN for NaN and infinity.
ALWAYS_INLINE Floats log_positive(Floats s) {
  const Ints exponent = ((Ints)s - 0x3f3504f3) >> 23;  // of s = m 2^e with m in [sqrt(1/2), sqrt(2))
  const Floats r = (Floats)((Ints)s - (exponent << 23)) - 1.0f;
  Floats q = 0.08700438588857651f * r - 0.14267492294311523f;  // minimax of (log(1 + r) - r + r^2/2) / r^3
  q = q * r + 0.14914768934249878f;
  q = q * r - 0.1657758355140686f;
  q = q * r + 0.19963063299655914f;
  q = q * r - 0.2500133812427521f;
  q = q * r + 0.3333390951156616f;
  const Floats log1p = r + r * r * (q * r - 0.5f);
  return __builtin_convertvector(exponent, Floats) * 0.693147182464599609375f + log1p + (s - s);
}

// Storage of 16 bits. Loads and stores take float, Bfloat and Half alike.
struct Bfloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

ALWAYS_INLINE Ints load_shorts(const void* from) {
  Shorts value;
  std::memcpy(&value, from, sizeof(value));
  return __builtin_convertvector(value, Ints);
}

ALWAYS_INLINE void store_shorts(void* to, Ints value) {
  const Shorts narrow = __builtin_convertvector(value, Shorts);
  std::memcpy(to, &narrow, sizeof(narrow));
}

ALWAYS_INLINE Floats load(const Bfloat* from) { return (Floats)(load_shorts(from) << 16); }

ALWAYS_INLINE Floats load(const Half* from) {
  const Ints bits = load_shorts(from);
  const Ints sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  const Floats finite = (Floats)magnitude * 0x1p112f;  // exact, for subnormal numbers too
  const Ints special = magnitude | 0x7f800000;         // infinity and NaN
  return (Floats)(sign | where(less(finite, Floats{} + 65536.0f), (Ints)finite, special));
}

ALWAYS_INLINE void store(Bfloat* to, Floats value) {
  const Ints bits = (Ints)value, rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const Ints nan = less(Ints{} + 0x7f800000, bits & 0x7fffffff);
  store_shorts(to, (where(nan, bits | 0x400000, rounded) >> 16) & 0xffff);
}

ALWAYS_INLINE void store(Half* to, Floats value) {
  const Ints bits = (Ints)value, magnitude = bits & 0x7fffffff;
  const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // ties to even
  const Ints subnormal = (Ints)((Floats)magnitude + 0.5f) - 0x3f000000;                   // one ulp of 0.5 is 2^-24
  const Ints special = where(less(Ints{} + 0x7f800000, magnitude), Ints{} + 0x7e00, Ints{} + 0x7c00);
  Ints half = where(less(magnitude, Ints{} + (143 << 23)), normal, special);  // below 2^16
  half = where(less(magnitude, Ints{} + (113 << 23)), subnormal, half);       // below 2^-14
  store_shorts(to, half | ((bits >> 16) & 0x8000));
}

// use(the pointer with its type); Void is const void or void.
template <class Void, class Use>
ALWAYS_INLINE void with_format(Format format, Void* numbers, Use use) {
  constexpr bool CONST = std::is_const_v<Void>;
  switch (format) {
    case Format::FLOAT: return use(static_cast<std::conditional_t<CONST, const float, float>*>(numbers));
    case Format::BFLOAT: return use(static_cast<std::conditional_t<CONST, const Bfloat, Bfloat>*>(numbers));
    case Format::HALF: return use(static_cast<std::conditional_t<CONST, const Half, Half>*>(numbers));
  }
}

// The first `count` <= LANES numbers of a vector, followed by zeros.
template <class T>
ALWAYS_INLINE Floats load_part(const T* from, int64_t count) {
  if (count == LANES) return load(from);
  T part[LANES] = {};
  std::memcpy(part, from, count * sizeof(T));
  return load(part);
}

template <class T>
ALWAYS_INLINE void store_part(T* to, Floats value, int64_t count) {
  if (count == LANES) return store(to, value);
  T part[LANES];
  store(part, value);
  std::memcpy(to, part, count * sizeof(T));
}

// Calls use(i, n) for i = 0, LANES, … below count, where n <= LANES is how many numbers are left at i.
template <class Use>
ALWAYS_INLINE void for_vectors(int64_t count, Use use) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) use(i, LANES);
  if (i < count) use(i, count - i);
}

}  // namespace slotkernels::LEVEL
