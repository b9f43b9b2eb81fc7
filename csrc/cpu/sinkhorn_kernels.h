// All that the Sinkhorn op runs on one thread, for one level of x86-64: levels.h includes this once for each.

#include "simd.h"

#include "points.h"
#include "products.h"

#include "sinkhorn_backward.h"
#include "sinkhorn_forward.h"
