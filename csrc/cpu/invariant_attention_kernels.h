// Invariant attention of samples on one thread, for one level of x86-64: levels.h includes this once for each.
//
// Reads the tokens once and writes their gradients once. For each pair of slot and token it keeps single numbers only,
// in arrays [slots, tokens]. Floor: 14 operations for each pair and column forward, 28 backward (see op.py).

#include "simd.h"

#include "products.h"

#include "invariant_pairs.h"
#include "invariant_sample.h"

#include "invariant_backward.h"
#include "invariant_forward.h"

namespace slotkernels::LEVEL {

template <int64_t RANK>
void attend_ranked(const InvariantAttention& call, int64_t begin, int64_t end, const InvariantResults& to) {
  InvariantForward<RANK> forward(call);
  for (int64_t b = begin; b < end; ++b) forward.solve(b, to);
}

template <int64_t RANK>
void differentiate_ranked(const InvariantAttention& call, int64_t begin, int64_t end, const InvariantCotangents& from,
                          const InvariantGradients& to) {
  InvariantBackward<RANK> backward(call, from, to);
  for (int64_t b = begin; b < end; ++b) backward.solve(b);
}

inline void attend_invariantly(const InvariantAttention& call, int64_t begin, int64_t end, const InvariantResults& to) {
  const auto attend = call.shift ? attend_ranked<3> : attend_ranked<2>;
  attend(call, begin, end, to);
}

inline void differentiate_invariantly(const InvariantAttention& call, int64_t begin, int64_t end,
                                      const InvariantCotangents& from, const InvariantGradients& to) {
  const auto differentiate = call.shift ? differentiate_ranked<3> : differentiate_ranked<2>;
  differentiate(call, begin, end, from, to);
}

}  // namespace slotkernels::LEVEL
