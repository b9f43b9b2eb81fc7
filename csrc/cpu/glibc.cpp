// The one symbol of glibc 2.32 that libstdc++ refers to: whether the process has a single thread. See glibc.h.

#include "glibc.h"

#ifdef SLOTKERNELS_GLIBC
// Hidden, so that only this library uses it. 0: reference counts are always atomic.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif
