// Includes the header named by KERNELS once for each level of x86-64, in the namespaces v4 (AVX-512), v3 (AVX2) and v1
// of slotkernels, and defines BEST_LEVEL(name): the function of that name for this CPU. As in PyTorch, the environment
// variable ATEN_CPU_CAPABILITY (avx2 or default) asks for less. Other architectures, and Clang, have v1 only.
//
// Inside, LEVEL is the namespace and FLOATS_IN_REGISTER is 16, 8 or 4 (GCC 12 does not update its own macros). Standard
// headers come before: what they define must not depend on the level.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <utility>

#include "glibc.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LEVELS 1
#include <immintrin.h>

#define LEVEL v4
#define FLOATS_IN_REGISTER 16
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#include KERNELS
#pragma GCC pop_options
#undef LEVEL
#undef FLOATS_IN_REGISTER

#define LEVEL v3
#define FLOATS_IN_REGISTER 8
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#include KERNELS
#pragma GCC pop_options
#undef LEVEL
#undef FLOATS_IN_REGISTER
#endif

#define LEVEL v1
#define FLOATS_IN_REGISTER 4
#include KERNELS
#undef LEVEL
#undef FLOATS_IN_REGISTER

namespace slotkernels {

#ifdef LEVELS
#define HAS(feature) __builtin_cpu_supports(feature)
inline bool supports_v3() {  // by its parts: GCC 11 does not know the levels by name
  return HAS("avx2") && HAS("bmi") && HAS("bmi2") && HAS("f16c") && HAS("fma") && HAS("lzcnt") && HAS("movbe");
}

inline bool supports_v4() {
  return supports_v3() && HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl");
}
#undef HAS

inline int supported_level() {
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view capability = asked ? asked : "";
  if (capability == "default") return 1;
  if (capability != "avx2" && supports_v4()) return 4;
  return supports_v3() ? 3 : 1;
}

#define BEST_LEVEL(name)                            \
  (slotkernels::level == 4   ? &slotkernels::v4::name \
   : slotkernels::level == 3 ? &slotkernels::v3::name \
                             : &slotkernels::v1::name)
#else
inline int supported_level() { return 1; }

#define BEST_LEVEL(name) (&slotkernels::v1::name)
#endif

static const int level = supported_level();

}  // namespace slotkernels
