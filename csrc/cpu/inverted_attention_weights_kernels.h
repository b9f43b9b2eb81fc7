// Softmax over the slots and mean over the tokens of one sample on one thread, and their gradient, for one level of
// x86-64 (see levels.h).
//
// oneDNN's products with the tokens on the left are faster than those with the slots on the left, so the products are
// [tokens, slots]. They are transposed in registers, as all else is [slots, tokens]. They are read once and weights are
// written once; the attention in between, [slots, tokens] floats, stays in the L2 cache. Floor: an exponential for each
// slot and token forward, the memory's bandwidth backward.

#include "simd.h"

namespace slotkernels::LEVEL {

// Of two rows whose blocks of H lanes are (a0 a1 ...) and (b0 b1 ...): (a0 b0 a2 b2 ...) and (a1 b1 a3 b3 ...).
template <int64_t H, size_t... Lane>
ALWAYS_INLINE void exchange(Floats& a, Floats& b, std::index_sequence<Lane...>) {
  constexpr auto even = [](size_t lane) { return lane / H % 2 ? lane - H + LANES : lane; };
#if __has_builtin(__builtin_shufflevector)
  const Floats first = __builtin_shufflevector(a, b, even(Lane)...);
  b = __builtin_shufflevector(a, b, (even(Lane) + H)...);
#else  // GCC 11
  const Floats first = __builtin_shuffle(a, b, Ints{even(Lane)...});
  b = __builtin_shuffle(a, b, Ints{(even(Lane) + H)...});
#endif
  a = first;
}

// Row i becomes column i.
template <int64_t H = LANES / 2>
ALWAYS_INLINE void turn(Floats (&rows)[LANES]) {
  for (int64_t i = 0; i < LANES; ++i) {
    if (i / H % 2 == 0) exchange<H>(rows[i], rows[i + H], std::make_index_sequence<LANES>());
  }
  if constexpr (H > 1) turn<H / 2>(rows);
}

template <class T>
class CompetitionOfSample {
 public:
  explicit CompetitionOfSample(const Competition& call)
      : call(call),
        members(call.slots / call.groups),
        width(padded(call.tokens)),
        seen(scratch(call.mask_groups * width)),
        columns(scratch(padded(call.slots) * LANES)),
        sums(scratch(call.slots * LANES)) {
    if (!call.mask) std::fill_n(seen.get(), call.tokens, 1.0f);
  }

  void weigh(int64_t b, const Weighing& pass) {
    look(b);
    const int64_t sample = b * call.slots * call.tokens;
    if (!pass.attention && !own) own = scratch(call.slots * call.tokens);
    float* attention = pass.attention ? pass.attention + sample : own.get();
    const float* bias = call.bias ? call.bias + b * call.slots : nullptr;
    for_vectors(call.tokens, [&](int64_t m, int64_t count) {
      read(static_cast<const T*>(pass.logits) + sample + m * call.slots, count);
      for (int64_t first = 0; first < call.slots; first += members) {
        softmax(first, bias, count, attention + first * call.tokens + m);
      }
    });
    T* weights = static_cast<T*>(pass.weights) + sample;
    for (int64_t n = 0; n < call.slots; ++n) {
      const float *row = attention + n * call.tokens, *counts = seen_by(n);
      Floats sum{};
      for_vectors(call.tokens, [&](int64_t m, int64_t count) { sum += weight(row, counts, m, count); });
      const float total = lanes_sum(sum) + call.total_eps;
      pass.total[b * call.slots + n] = total;
      write(row, counts, 1.0f / divisor(total), weights + n * call.tokens);
    }
  }

  void differentiate(int64_t b, const WeighingBackward& pass) {
    look(b);
    const int64_t first_slot = b * call.slots, sample = first_slot * call.tokens;
    std::fill_n(sums.get(), call.slots * LANES, 0.0f);
    std::vector<OfSlot> of_slots(call.slots);
    for (int64_t n = 0; n < call.slots; ++n) of_slots[n] = of_slot(pass, first_slot + n);
    for_vectors(call.tokens, [&](int64_t m, int64_t count) {
      read(static_cast<const T*>(pass.grad_weights) + sample + m * call.slots, count);
      for (int64_t first = 0; first < call.slots; first += members) {
        through_softmax(first, of_slots.data(), m, count, pass, sample);
      }
    });
    for (int64_t n = 0; n < call.slots; ++n) {
      if (pass.grad_bias) pass.grad_bias[first_slot + n] = lanes_sum(load(sums.get() + n * LANES));
      if (!pass.weights) continue;
      const int64_t row = sample + n * call.tokens;
      write(pass.attention + row, seen_by(n), of_slots[n].factor, static_cast<T*>(pass.weights) + row);
    }
  }

 private:
  // For each slot: the mean of the gradient of its weights, 1 / its total, and the gradient of the total.
  struct OfSlot {
    float inner, factor, more;
  };

  const Competition& call;
  const int64_t members, width;
  // 1 for the tokens that each group of the mask sees; for as many tokens as a vector holds, a vector for each slot; a
  // sum for each slot; and the attention if the caller does not need it.
  Scratch seen, columns, sums, own;

  static float divisor(float total) { return total == 0 ? 1.0f : total; }  // no token is seen: the update is 0

  static float lanes_sum(Floats lanes) {
    float sum = 0;
    for (int64_t l = 0; l < LANES; ++l) sum += lanes[l];
    return sum;
  }

  // Rows of `count` tokens become columns, a vector for each slot.
  ALWAYS_INLINE void read(const T* rows, int64_t count) {
    for_vectors(call.slots, [&](int64_t n, int64_t slots) {
      Floats turned[LANES];
      for (int64_t l = 0; l < LANES; ++l) {
        turned[l] = l < count ? load_part(rows + l * call.slots + n, slots) : Floats{};
      }
      turn(turned);
      for (int64_t l = 0; l < LANES; ++l) store(column(n + l), turned[l]);
    });
  }

  float* column(int64_t n) const { return columns.get() + n * LANES; }

  // 1 for the tokens that each group of the mask sees, 0 for the others and for padding.
  void look(int64_t b) {
    if (!call.mask) return;
    for (int64_t g = 0; g < call.mask_groups; ++g) {
      const bool* mask = call.mask + (b * call.mask_groups + g) * call.tokens;
      for (int64_t m = 0; m < call.tokens; ++m) seen[g * width + m] = mask[m] ? 1.0f : 0.0f;
    }
  }

  const float* seen_by(int64_t n) const { return seen.get() + (call.mask_groups == 1 ? 0 : n / members * width); }

  // Softmax over the slots of a group, of as many tokens as a vector holds.
  ALWAYS_INLINE void softmax(int64_t first, const float* bias, int64_t count, float* to) {
    constexpr float LOG2_E = 1.44269504088896340736f;
    Floats greatest{};
    for (int64_t n = first; n < first + members; ++n) {
      const Floats logit = load(column(n)) * call.scale + (bias ? bias[n] : 0.0f);
      store(column(n), logit);
      greatest = n == first ? logit : maximum(greatest, logit);
    }
    Floats sum{};
    for (int64_t n = first; n < first + members; ++n) {
      const Floats power = exp2_nonpositive((load(column(n)) - greatest) * LOG2_E);
      store(column(n), power);
      sum += power;
    }
    const Floats inverse = 1.0f / sum;
    for (int64_t i = 0; i < members; ++i) store_part(to + i * call.tokens, load(column(first + i)) * inverse, count);
  }

  // The gradient of the logits of a group, for the tokens whose gradients of weights are in the columns.
  ALWAYS_INLINE void through_softmax(int64_t first, const OfSlot* of_slots, int64_t m, int64_t count,
                                     const WeighingBackward& pass, int64_t sample) {
    const Floats counts = load(seen_by(first) + m);
    Floats shared{};
    for (int64_t n = first; n < first + members; ++n) {
      const int64_t at = sample + n * call.tokens + m;
      const OfSlot& of = of_slots[n];
      Floats grad = ((load(column(n)) - of.inner) * of.factor + of.more) * counts;
      if (pass.grad_attention) grad += load_part(pass.grad_attention + at, count);
      shared += load_part(pass.attention + at, count) * grad;
      store(column(n), grad);
    }
    for (int64_t n = first; n < first + members; ++n) {
      const int64_t at = sample + n * call.tokens + m;
      const Floats of_logit = load_part(pass.attention + at, count) * (load(column(n)) - shared);
      store(sums.get() + n * LANES, load(sums.get() + n * LANES) + of_logit);
      store_part(static_cast<T*>(pass.grad_logits) + at, of_logit * call.scale, count);
    }
  }

  ALWAYS_INLINE Floats weight(const float* attention, const float* counts, int64_t m, int64_t count) const {
    return (load_part(attention + m, count) + call.weight_eps) * load(counts + m);
  }

  // A slot's weights from its attention.
  void write(const float* attention, const float* counts, float factor, T* to) const {
    for_vectors(call.tokens, [&](int64_t m, int64_t count) {
      store_part(to + m, weight(attention, counts, m, count) * factor, count);
    });
  }

  // The gradient of the weights has their mean subtracted: its product with the update.
  static OfSlot of_slot(const WeighingBackward& pass, int64_t slot) {
    const T* update = static_cast<const T*>(pass.updates) + slot * pass.value_dim;
    const T* grad = static_cast<const T*>(pass.grad_updates) + slot * pass.value_dim;
    Floats inner{};
    for_vectors(pass.value_dim, [&](int64_t d, int64_t count) {
      inner += load_part(grad + d, count) * load_part(update + d, count);
    });
    return {lanes_sum(inner), 1.0f / divisor(pass.total[slot]), pass.grad_total ? pass.grad_total[slot] : 0.0f};
  }
};

template <class Use>
inline void with_competition(const Competition& call, Use use) {
  if (call.format == Format::BFLOAT) return use(CompetitionOfSample<Bfloat>(call));
  use(CompetitionOfSample<Half>(call));
}

inline void weigh_samples(const Competition& call, int64_t begin, int64_t end, const Weighing& pass) {
  with_competition(call, [&](auto sample) {
    for (int64_t b = begin; b < end; ++b) sample.weigh(b, pass);
  });
}

inline void weigh_samples_backward(const Competition& call, int64_t begin, int64_t end, const WeighingBackward& pass) {
  with_competition(call, [&](auto sample) {
    for (int64_t b = begin; b < end; ++b) sample.differentiate(b, pass);
  });
}

}  // namespace slotkernels::LEVEL
