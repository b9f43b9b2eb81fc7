// The code of the Sinkhorn op on one thread. levels.h includes this file once for each level of x86-64.

#include "simd.h"

#include "points.h"
#include "products.h"

#include "sinkhorn_backward.h"
#include "sinkhorn_forward.h"
