// Lets a wheel that a new Linux built run on every system with glibc 2.28 (2018), like PyTorch's own wheels.
//
// glibc 2.29 has newer versions of these functions, which the linker prefers: the library would then need glibc 2.29. The
// older functions return the same numbers, and also set errno. glibc.cpp does the same for a symbol of glibc 2.32.
#pragma once

#include <cmath>  // defines __GLIBC__ on systems that have it

#if defined(__GLIBC__) && defined(__x86_64__)
#define SLOTKERNELS_GLIBC "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define SLOTKERNELS_GLIBC "GLIBC_2.17"
#endif

#ifdef SLOTKERNELS_GLIBC
__asm__(".symver exp, exp@" SLOTKERNELS_GLIBC);
__asm__(".symver exp2, exp2@" SLOTKERNELS_GLIBC);
__asm__(".symver log, log@" SLOTKERNELS_GLIBC);
__asm__(".symver log2, log2@" SLOTKERNELS_GLIBC);
__asm__(".symver pow, pow@" SLOTKERNELS_GLIBC);
#endif
