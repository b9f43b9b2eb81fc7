// The slot update on one thread. levels.h includes this file once for each level of x86-64.
//
// Forward and backward each read a row from memory once and write its results once. Numbers of a row that are used
// again stay in the cache: new slots forward, the three gates and the new slots backward. Floor: the memory's
// bandwidth, 9 rows forward and 16 backward for gru_norm, 4 and 4 for add_norm (see bytes_moved in op.py). A gate takes
// an exponential, and all three gates take two divisions.

#include "simd.h"

#include "products.h"

#include "slot_update_rows.h"

namespace slotkernels::LEVEL {

struct Power {
  Floats scale, rest;
};

// e^x = scale (1 + rest) for -87 <= x <= 88, and scale = 1 where |x| < 0.34: e^x - 1 keeps its relative accuracy there.
ALWAYS_INLINE Power power_of_e(Floats x) {
  constexpr float PER_LOG2 = 1.44269504088896341f, LOG2 = 0x1.62e4p-1f, LOG2_REST = 0x1.7f7d1cp-20f;
  constexpr float ROUND = 0x1.8p23f + 127;  // as in exp2_nonpositive
  const Floats shifted = x * PER_LOG2 + ROUND, n = shifted - ROUND;
  const Floats f = (x - n * LOG2 - n * LOG2_REST) * PER_LOG2;  // n * LOG2 is exact
  return {(Floats)((Ints)shifted << 23), exp2_rest(f)};
}

ALWAYS_INLINE Floats within(Floats x, float limit) { return minimum(Floats{} + limit, maximum(Floats{} - limit, x)); }

// Relative error below 5e-7 for x > -43, and the value there below; NaN for NaN.
ALWAYS_INLINE Floats sigmoid(Floats x) {
  const Power power = power_of_e(within(-x, 43.0f));
  return 1.0f / (power.scale * power.rest + (power.scale + 1.0f));
}

struct UpdateAndCandidate {
  Floats update, candidate;
};

// Sigmoid of one and tanh of the other, of the same accuracy. They share a division, which takes as long as exp.
ALWAYS_INLINE UpdateAndCandidate sigmoid_and_tanh(Floats x, Floats y) {
  const Power first = power_of_e(within(-x, 43.0f)), second = power_of_e(within(y + y, 40.0f));
  const Floats below = first.scale * first.rest + (first.scale + 1.0f);
  const Floats less_one = second.scale * second.rest + (second.scale - 1.0f), more_one = less_one + 2.0f;
  const Floats inverse = 1.0f / (below * more_one);
  return {more_one * inverse, less_one * below * inverse};
}

// The gates of one row, in GRUCell's order.
struct GateRow {
  const float *input, *hidden;
  int64_t dim;

  ALWAYS_INLINE Floats from_hidden(int64_t i, int64_t count) const { return load_part(hidden + 2 * dim + i, count); }
  ALWAYS_INLINE Floats reset(int64_t i, int64_t count) const { return sigmoid(sum(i, count)); }
  ALWAYS_INLINE UpdateAndCandidate others(int64_t i, int64_t count, Floats reset) const {
    return sigmoid_and_tanh(sum(dim + i, count),
                            load_part(input + 2 * dim + i, count) + reset * from_hidden(i, count));
  }
  ALWAYS_INLINE void fetch_next(int64_t i) const {
    for (int64_t gate = 0; gate < 3; ++gate) {
      fetch(input + (3 + gate) * dim + i);
      fetch(hidden + (3 + gate) * dim + i);
    }
  }

 private:
  ALWAYS_INLINE Floats sum(int64_t i, int64_t count) const {
    return load_part(input + i, count) + load_part(hidden + i, count);
  }
};

inline void gru_norm_rows(const GruInputs& from, const Norm& norm, int64_t begin, int64_t end, const Normalised& to) {
  const int64_t dim = norm.dim;
  const RowReader input(from.gates_input, 3 * dim), hidden(from.gates_hidden, 3 * dim), slots(from.slots, dim);
  const RowWriter new_slots(to.slots, dim);
  const RowNorm row_norm(norm, to);
  for (int64_t row = begin; row < end; ++row) {
    const GateRow gates{input.read(row), hidden.read(row), dim};
    const float* previous = slots.read(row);
    float* value = new_slots.begin(row);
    for_vectors(dim, [&](int64_t i, int64_t count) INLINED {
      gates.fetch_next(i);
      fetch(previous + dim + i);
      const auto [update, candidate] = gates.others(i, count, gates.reset(i, count));
      store_part(value + i, candidate + update * (load_part(previous + i, count) - candidate), count);
    });
    new_slots.end(row);
    round_row(to.slots.format, value, dim);  // normalise the slots as they are returned, after rounding
    row_norm.apply(row, value);
  }
}

// Gradients of rows `begin` to `end`, and their sums for weight and bias [2, dim] unless `grads` is null.
class GruNormBackward {
 public:
  GruNormBackward(const GruInputs& from, const Input& grad_slots, const NormGradient& norm, const GruGradients& to)
      : dim(norm.dim),
        state(from.slots.format),
        through_norm(norm.grad.data),
        input(from.gates_input, 3 * dim),
        hidden(from.gates_hidden, 3 * dim),
        slots(from.slots, dim),
        grad_slots(grad_slots, dim),
        norm(norm),
        to_input(to.gates_input, 3 * dim),
        to_hidden(to.gates_hidden, 3 * dim),
        to_slots(to.slots, dim),
        kept(scratch(4 * padded(dim))) {}

  void solve(int64_t begin, int64_t end, float* sums) {
    for (int64_t row = begin; row < end; ++row) {
      const GateRow gates{input.read(row), hidden.read(row), dim};
      const float *previous = slots.read(row), *cotangent = grad_slots.read(row);
      keep(gates, previous);
      if (through_norm) {
        norm.begin(row, value(), sums);
        differentiate<true>(row, gates, previous, cotangent);
      } else {
        differentiate<false>(row, gates, previous, cotangent);
      }
    }
  }

 private:
  const int64_t dim;
  const Format state;
  const bool through_norm;
  const RowReader input, hidden, slots, grad_slots;
  RowNormGradient norm;
  const RowWriter to_input, to_hidden, to_slots;
  const Scratch kept;  // reset, update, candidate, and the new slots

  float* reset() const { return kept.get(); }
  float* update() const { return kept.get() + padded(dim); }
  float* candidate() const { return kept.get() + 2 * padded(dim); }
  float* value() const { return kept.get() + 3 * padded(dim); }

  void keep(const GateRow& gates, const float* previous) const {
    for_vectors(dim, [&](int64_t i, int64_t count) INLINED {
      gates.fetch_next(i);
      fetch(previous + dim + i);
      const Floats r = gates.reset(i, count);
      const auto [z, n] = gates.others(i, count, r);
      store(reset() + i, r);
      store(update() + i, z);
      store(candidate() + i, n);
      store(value() + i, n + z * (load_part(previous + i, count) - n));
    });
    round_row(state, value(), dim);
  }

  template <bool NORM>
  void differentiate(int64_t row, const GateRow& gates, const float* previous, const float* cotangent) const {
    float *grad_input = to_input.begin(row), *grad_hidden = to_hidden.begin(row), *grad_slots = to_slots.begin(row);
    for_vectors(dim, [&](int64_t i, int64_t count) INLINED {
      const Floats r = load(reset() + i), z = load(update() + i), n = load(candidate() + i);
      Floats grad = load_part(cotangent + i, count);
      if (NORM) grad += norm.at(i, count, load(value() + i));
      const Floats to_state = grad * z, grad_update = (load_part(previous + i, count) - n) * to_state * (1.0f - z);
      const Floats grad_candidate = (grad - to_state) * (1.0f - n * n);
      const Floats grad_reset = grad_candidate * gates.from_hidden(i, count) * r * (1.0f - r);
      store_part(grad_slots + i, to_state, count);
      store_part(grad_input + i, grad_reset, count);
      store_part(grad_hidden + i, grad_reset, count);
      store_part(grad_input + dim + i, grad_update, count);
      store_part(grad_hidden + dim + i, grad_update, count);
      store_part(grad_input + 2 * dim + i, grad_candidate, count);
      store_part(grad_hidden + 2 * dim + i, grad_candidate * r, count);
    });
    to_input.end(row);
    to_hidden.end(row);
    to_slots.end(row);
  }
};

// Blocks of `block` rows, with sums [2, dim] for each.
inline void gru_norm_backward_blocks(const GruInputs& from, const Input& grad_slots, const NormGradient& norm,
                                     int64_t rows, int64_t block, int64_t begin, int64_t end, const GruGradients& to,
                                     float* sums) {
  GruNormBackward backward(from, grad_slots, norm, to);
  for (int64_t b = begin; b < end; ++b) {
    backward.solve(b * block, std::min(rows, (b + 1) * block), sums + b * 2 * norm.dim);
  }
}

inline void add_norm_rows(const Input& slots, const Input& update, const Norm& norm, int64_t begin, int64_t end,
                          const Normalised& to) {
  const int64_t dim = norm.dim;
  const RowReader left(slots, dim), right(update, dim);
  const RowWriter total(to.slots, dim);
  const RowNorm row_norm(norm, to);
  for (int64_t row = begin; row < end; ++row) {
    const float *a = left.read(row), *b = right.read(row);
    float* sum = total.begin(row);
    for_vectors(dim, [&](int64_t i, int64_t count) INLINED {
      fetch(a + dim + i);
      fetch(b + dim + i);
      store_part(sum + i, load_part(a + i, count) + load_part(b + i, count), count);
    });
    total.end(row);
    round_row(to.slots.format, sum, dim);
    row_norm.apply(row, sum);
  }
}

// As gru_norm_backward_blocks. `to_update` is null if one gradient serves both operands.
inline void add_norm_backward_blocks(const Input& total, const Input& grad_total, const NormGradient& norm,
                                     int64_t rows, int64_t block, int64_t begin, int64_t end, const Output& to_slots,
                                     const Output& to_update, float* sums) {
  const int64_t dim = norm.dim;
  const RowReader values(total, dim), cotangents(grad_total, dim);
  const RowWriter grad_slots(to_slots, dim), grad_update(to_update, dim);
  RowNormGradient row_norm(norm);
  for (int64_t row = begin * block; row < std::min(rows, end * block); ++row) {
    const float *value = values.read(row), *cotangent = cotangents.read(row);
    row_norm.begin(row, value, sums + row / block * 2 * dim);
    float *grad = grad_slots.begin(row), *other = grad_update.begin(row);
    for_vectors(dim, [&](int64_t i, int64_t count) INLINED {
      const Floats both = row_norm.at(i, count, load_part(value + i, count)) + load_part(cotangent + i, count);
      store_part(grad + i, both, count);
      if (to_update.data) store_part(other + i, both, count);
    });
    grad_slots.end(row);
    grad_update.end(row);
  }
}

}  // namespace slotkernels::LEVEL
