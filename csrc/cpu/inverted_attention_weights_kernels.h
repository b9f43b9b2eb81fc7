// Softmax over the slots and mean over the tokens of one sample on one thread, and their gradient, for one level of
// x86-64 (see levels.h).
//
// Logits are read once and weights are written once; what is in between, [slots, tokens] floats, stays in the second
// cache. Floor: an exponential for each slot and token forward, the memory's bandwidth backward.

#include "simd.h"

namespace slotkernels::LEVEL {

template <class T>
class CompetitionOfSample {
 public:
  explicit CompetitionOfSample(const Competition& call)
      : call(call),
        members(call.slots / call.groups),
        width(padded(call.tokens)),
        seen(scratch(call.mask_groups * width)),
        column(scratch(members * LANES)),
        sums(scratch(call.slots * LANES)) {
    if (!call.mask) {
      for (int64_t m = 0; m < call.tokens; ++m) seen[m] = 1.0f;
    }
  }

  void weigh(int64_t b, const Weighing& pass) {
    look(b);
    if (!pass.attention && !own) own = scratch(call.slots * call.tokens);
    float* attention = pass.attention ? pass.attention + b * call.slots * call.tokens : own.get();
    const T* logits = static_cast<const T*>(pass.logits) + b * call.slots * call.tokens;
    const float* bias = call.bias ? call.bias + b * call.slots : nullptr;
    for (int64_t first = 0; first < call.slots; first += members) {
      for_vectors(call.tokens, [&](int64_t m, int64_t count) {
        softmax(logits + first * call.tokens + m, bias ? bias + first : nullptr, count,
                attention + first * call.tokens + m);
      });
    }
    T* weights = static_cast<T*>(pass.weights) + b * call.slots * call.tokens;
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
    for (int64_t first = 0; first < call.slots; first += members) {
      std::vector<OfSlot> slots(members);
      for (int64_t i = 0; i < members; ++i) slots[i] = slot(pass, first_slot + first + i);
      const float* counts = seen_by(first);
      const int64_t begin = sample + first * call.tokens;
      for_vectors(call.tokens, [&](int64_t m, int64_t count) {
        const float* attention = pass.attention + begin + m;
        const T* grad = static_cast<const T*>(pass.grad_weights) + begin + m;
        Floats shared{};
        for (int64_t i = 0; i < members; ++i) {
          const int64_t at = i * call.tokens;
          const Floats of_mean = (load_part(grad + at, count) - slots[i].inner) * slots[i].factor + slots[i].more;
          Floats of_attention = of_mean * load(counts + m);
          if (pass.grad_attention) of_attention += load_part(pass.grad_attention + begin + m + at, count);
          shared += load_part(attention + at, count) * of_attention;
          store(column.get() + i * LANES, of_attention);
        }
        T* to = static_cast<T*>(pass.grad_logits) + begin + m;
        for (int64_t i = 0; i < members; ++i) {
          const int64_t at = i * call.tokens;
          const Floats of_logit = load_part(attention + at, count) * (load(column.get() + i * LANES) - shared);
          float* sum = sums.get() + (first + i) * LANES;
          store(sum, load(sum) + of_logit);
          store_part(to + at, of_logit * call.scale, count);
        }
      });
      if (!pass.weights) continue;
      T* weights = static_cast<T*>(pass.weights) + begin;
      for (int64_t i = 0; i < members; ++i) {
        write(pass.attention + begin + i * call.tokens, counts, slots[i].factor, weights + i * call.tokens);
      }
    }
    if (!pass.grad_bias) return;
    for (int64_t n = 0; n < call.slots; ++n) pass.grad_bias[first_slot + n] = lanes_sum(load(sums.get() + n * LANES));
  }

 private:
  // The mean of the gradient of a slot's weights, one over its total, and the gradient of that.
  struct OfSlot {
    float inner, factor, more;
  };

  const Competition& call;
  const int64_t members, width;
  Scratch seen, column, sums, own;

  static float divisor(float total) { return total == 0 ? 1.0f : total; }  // no token is seen: the update is 0

  static float lanes_sum(Floats lanes) {
    float sum = 0;
    for (int64_t l = 0; l < LANES; ++l) sum += lanes[l];
    return sum;
  }

  // One for the tokens that each group of the mask sees, zero for others and for what pads the row.
  void look(int64_t b) {
    if (!call.mask) return;
    for (int64_t g = 0; g < call.mask_groups; ++g) {
      const bool* mask = call.mask + (b * call.mask_groups + g) * call.tokens;
      for (int64_t m = 0; m < call.tokens; ++m) seen[g * width + m] = mask[m] ? 1.0f : 0.0f;
    }
  }

  const float* seen_by(int64_t n) const { return seen.get() + (call.mask_groups == 1 ? 0 : n / members * width); }

  // Softmax over the slots of a group, of as many tokens as a vector holds.
  ALWAYS_INLINE void softmax(const T* logits, const float* bias, int64_t count, float* to) {
    constexpr float LOG2_E = 1.44269504088896340736f;
    Floats greatest{};
    for (int64_t i = 0; i < members; ++i) {
      const Floats logit = load_part(logits + i * call.tokens, count) * call.scale + (bias ? bias[i] : 0.0f);
      store(column.get() + i * LANES, logit);
      greatest = i ? maximum(greatest, logit) : logit;
    }
    Floats sum{};
    for (int64_t i = 0; i < members; ++i) {
      const Floats power = exp2_nonpositive((load(column.get() + i * LANES) - greatest) * LOG2_E);
      store(column.get() + i * LANES, power);
      sum += power;
    }
    const Floats inverse = 1.0f / sum;
    for (int64_t i = 0; i < members; ++i) {
      store_part(to + i * call.tokens, load(column.get() + i * LANES) * inverse, count);
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
  static OfSlot slot(const WeighingBackward& pass, int64_t slot) {
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
