// Inverted attention of one sample on one thread, for one level of x86-64 (see levels.h).
//
// Reads the tokens once, in tiles. A tile, its attention, the slots and their sums stay in the L1 cache. The backward
// pass reads the attention that the forward pass wrote, and writes the tokens' gradient once. Floor: 2 N M D
// multiply-adds forward, 4 N M D backward (2 N M D without a gradient of the tokens).

#include "simd.h"

#include "products.h"

namespace slotkernels::LEVEL {

// Rows of coefficients times rows of points: row i of the product is the sum over t of
// coefficients[i * row + t * term] * points[t].
struct Terms {
  const float* coefficients;
  int64_t row, term;
  const float* points;
  int64_t count;
};

template <int64_t V>
ALWAYS_INLINE void add_terms(const Terms& terms, int64_t dim, int64_t d, Floats (&sum)[ROWS][V]) {
  const float* coefficients = terms.coefficients;
  const float* point = terms.points + d;
  for (int64_t t = 0; t < terms.count; ++t, coefficients += terms.term, point += dim) {
    Floats part[V];
    for (int64_t v = 0; v < V; ++v) part[v] = load(point + v * LANES);
    for (int64_t i = 0; i < ROWS; ++i) {
      for (int64_t v = 0; v < V; ++v) sum[i][v] += coefficients[i * terms.row] * part[v];
    }
  }
}

// Sums of one or two products, written to `rows` rows (a multiple of ROWS) or added to them.
template <bool ADD, int64_t COUNT>
ALWAYS_INLINE void multiply_terms(const Terms (&products)[COUNT], int64_t rows, int64_t dim, float* to) {
  const auto columns = [&](auto width, int64_t first, int64_t d) {
    constexpr int64_t V = decltype(width)::value;
    Floats sum[ROWS][V];
    for (int64_t i = 0; i < ROWS; ++i) {
      for (int64_t v = 0; v < V; ++v) {
        sum[i][v] = ADD ? load(to + (first + i) * dim + d + v * LANES) : Floats{};
      }
    }
    for (Terms terms : products) {
      terms.coefficients += first * terms.row;
      add_terms(terms, dim, d, sum);
    }
    for (int64_t i = 0; i < ROWS; ++i) {
      for (int64_t v = 0; v < V; ++v) store(to + (first + i) * dim + d + v * LANES, sum[i][v]);
    }
  };
  for (int64_t first = 0; first < rows; first += ROWS) {
    int64_t d = 0;
    for (; d + VECTORS * LANES <= dim; d += VECTORS * LANES) {
      columns(std::integral_constant<int64_t, VECTORS>(), first, d);
    }
    for (; d < dim; d += LANES) columns(std::integral_constant<int64_t, 1>(), first, d);
  }
}

// A sample's slots and a tile of its tokens, padded with zeros: slots to whole tiles of products, tokens and widths to
// whole vectors. Tokens are copied only if they have to be padded.
class Sample {
 public:
  Sample(const Attention& call, bool backward)
      : call(call),
        slots((call.slots + TILE - 1) / TILE * TILE),
        dim(padded(call.dim)),
        value_dim(padded(call.value_dim)),
        shared(call.v == call.k),
        q(rows(slots, dim)),
        attention(rows(slots, TOKENS)),
        sums(rows(slots, value_dim)),
        k_tile(rows(TOKENS, dim)),
        v_tile(shared ? nullptr : rows(TOKENS, value_dim)) {
    if (!backward) return;
    grad_updates = rows(slots, value_dim);
    grad = rows(slots, TOKENS);
    grad_q = rows(slots, dim);
    grad_tile = rows(TOKENS, std::max(dim, value_dim));
  }

  void forward(int64_t b, const Attended& to) {
    begin(b);
    float* total = to.total + b * call.slots;
    std::fill_n(total, call.slots, 0.0f);
    std::fill_n(sums.get(), slots * value_dim, 0.0f);
    for (int64_t m = 0; m < call.tokens; m += TOKENS) {
      enter(b, m);
      attend();
      for (int64_t n = 0; n < call.slots; ++n) {
        float* row = attention.get() + n * TOKENS;
        if (to.attention) std::copy_n(row, count, to.attention + (b * call.slots + n) * call.tokens + m);
        weigh(b, n, m, 1.0f);
        Floats sum{};
        for (int64_t t = 0; t < width; t += LANES) sum += load(row + t);
        total[n] += lanes_sum(sum);
      }
      multiply_terms<true>({Terms{attention.get(), TOKENS, 1, v, count}}, slots, value_dim, sums.get());
    }
    for (int64_t n = 0; n < call.slots; ++n) {
      total[n] += call.total_eps;
      const float* sum = sums.get() + n * value_dim;
      float* update = to.updates + (b * call.slots + n) * call.value_dim;
      for (int64_t d = 0; d < call.value_dim; ++d) update[d] = sum[d] / divisor(total[n]);
    }
  }

  void backward(int64_t b, const Cotangents& from, const Gradients& to) {
    begin(b);
    const int64_t first = b * call.slots;
    std::fill_n(grad_q.get(), slots * dim, 0.0f);
    if (from.updates) {
      copy(from.updates + first * call.value_dim, call.slots, call.value_dim, grad_updates.get(), value_dim);
    }
    if (to.bias) std::fill_n(to.bias + first, call.slots, 0.0f);
    for (int64_t m = 0; m < call.tokens; m += TOKENS) {
      enter(b, m);
      if (from.forward_attention) {
        recall(from.forward_attention + first * call.tokens + m);
      } else {
        attend();
      }
      products(grad_updates.get(), v, value_dim, grad.get());
      for (int64_t n = 0; n < call.slots; ++n) grad_of_attention(b, n, m, from);
      through_softmax();
      for (int64_t n = 0; n < call.slots; ++n) {
        float* row = grad.get() + n * TOKENS;
        Floats sum{};
        for (int64_t t = 0; t < width; t += LANES) {
          sum += load(row + t);
          store(row + t, load(row + t) * call.scale);
        }
        if (to.bias) to.bias[first + n] += lanes_sum(sum);
        weigh(b, n, m, 1.0f / divisor(from.forward_total[first + n]));
      }
      if (to.q) multiply_terms<true>({Terms{grad.get(), TOKENS, 1, k, count}}, slots, dim, grad_q.get());
      const Terms of_keys{grad.get(), 1, TOKENS, q.get(), call.slots};
      const Terms of_values{attention.get(), 1, TOKENS, grad_updates.get(), call.slots};
      if (to.k) {
        write(to.k + (b * call.tokens + m) * call.dim, call.dim, dim, [&](float* rows) {
          if (shared) {
            multiply_terms<false>({of_keys, of_values}, width, dim, rows);
          } else {
            multiply_terms<false>({of_keys}, width, dim, rows);
          }
        });
      }
      if (to.v) {
        write(to.v + (b * call.tokens + m) * call.value_dim, call.value_dim, value_dim,
              [&](float* rows) { multiply_terms<false>({of_values}, width, value_dim, rows); });
      }
    }
    if (to.q) copy(grad_q.get(), call.slots, dim, to.q + first * call.dim, call.dim);
  }

 private:
  typedef std::unique_ptr<float[]> Rows;

  const Attention& call;
  const int64_t slots, dim, value_dim;  // padded
  const bool shared;                    // keys and values are the same
  Rows q, attention, sums, k_tile, v_tile, grad_updates, grad, grad_q, grad_tile;
  const float *k = nullptr, *v = nullptr, *bias = nullptr;  // of the tile, and of the sample
  int64_t count = 0, width = 0;                             // tokens of the tile, without and with padding

  static Rows rows(int64_t count, int64_t dim) { return Rows(new float[count * dim]()); }

  static void copy(const float* from, int64_t count, int64_t stride, float* to, int64_t to_stride) {
    for (int64_t i = 0; i < count; ++i) std::copy_n(from + i * stride, std::min(stride, to_stride), to + i * to_stride);
  }

  static float divisor(float total) { return total == 0 ? 1.0f : total; }  // no token is seen: the update is 0

  static float lanes_sum(Floats lanes) {
    float sum = 0;
    for (int64_t l = 0; l < LANES; ++l) sum += lanes[l];
    return sum;
  }

  void begin(int64_t b) {
    copy(call.q + b * call.slots * call.dim, call.slots, call.dim, q.get(), dim);
    bias = call.bias ? call.bias + b * call.slots : nullptr;
  }

  // The tile that begins at token m.
  void enter(int64_t b, int64_t m) {
    count = std::min(TOKENS, call.tokens - m);
    width = padded(count);
    const auto tile = [&](const float* tokens, int64_t sample, int64_t stride, int64_t dim, float* copied) -> const float* {
      const float* from = tokens + b * sample + m * stride;
      if (count == width && stride == dim) return from;
      copy(from, count, stride, copied, dim);
      std::fill_n(copied + count * dim, (width - count) * dim, 0.0f);
      return copied;
    };
    k = tile(call.k, call.k_sample, call.dim, dim, k_tile.get());
    v = shared ? k : tile(call.v, call.v_sample, call.value_dim, value_dim, v_tile.get());
  }

  // Dot products of all slots' rows with the tile's tokens: `to` is [slots, TOKENS].
  void products(const float* rows, const float* tokens, int64_t dim, float* to) {
    for (int64_t t = 0; t < width; t += TILE) {
      for (int64_t n = 0; n < slots; n += TILE) {
        store_tile(to + n * TOKENS + t, TOKENS, dots(rows + n * dim, tokens + t * dim, dim, dim));
      }
    }
  }

  // The attention of the tile: softmax over the slots of each group.
  void attend() {
    constexpr float LOG2_E = 1.44269504088896340736f;
    products(q.get(), k, dim, attention.get());
    const int64_t size = call.slots / call.groups;
    for (int64_t first = 0; first < call.slots; first += size) {
      for (int64_t t = 0; t < width; t += LANES) {
        float* column = attention.get() + first * TOKENS + t;
        Floats greatest{};
        for (int64_t n = 0; n < size; ++n) {
          const Floats logit = load(column + n * TOKENS) * call.scale + (bias ? bias[first + n] : 0.0f);
          store(column + n * TOKENS, logit);
          greatest = n ? maximum(greatest, logit) : logit;
        }
        Floats sum{};
        for (int64_t n = 0; n < size; ++n) {
          const Floats power = exp2_nonpositive((load(column + n * TOKENS) - greatest) * LOG2_E);
          store(column + n * TOKENS, power);
          sum += power;
        }
        const Floats inverse = 1.0f / sum;
        for (int64_t n = 0; n < size; ++n) store(column + n * TOKENS, load(column + n * TOKENS) * inverse);
      }
    }
  }

  // The attention of the tile as the forward pass wrote it.
  void recall(const float* from) {
    for (int64_t n = 0; n < call.slots; ++n) {
      float* row = attention.get() + n * TOKENS;
      std::copy_n(from + n * call.tokens, count, row);
      std::fill_n(row + count, width - count, 0.0f);
    }
  }

  const bool* mask_of(int64_t b, int64_t n, int64_t m) const {
    if (!call.mask) return nullptr;
    const int64_t group = call.mask_groups == 1 ? 0 : n / (call.slots / call.groups);
    return call.mask + (b * call.mask_groups + group) * call.tokens + m;
  }

  // Writes zeros for the tokens of a row that the mask hides, and for padding.
  void hide(int64_t b, int64_t n, int64_t m, float* row) const {
    if (const bool* mask = mask_of(b, n, m)) {
      for (int64_t t = 0; t < count; ++t) row[t] = mask[t] ? row[t] : 0.0f;
    }
    std::fill_n(row + count, width - count, 0.0f);
  }

  // Turns the attention of a slot into its weights, times a factor.
  void weigh(int64_t b, int64_t n, int64_t m, float factor) {
    float* row = attention.get() + n * TOKENS;
    for (int64_t t = 0; t < width; t += LANES) store(row + t, (load(row + t) + call.weight_eps) * factor);
    hide(b, n, m, row);
  }

  // Turns the products of the updates' gradient with the values into the gradient of a slot's attention. Their weighted
  // mean is the product of that gradient with the update, so it needs no pass over the tokens.
  void grad_of_attention(int64_t b, int64_t n, int64_t m, const Cotangents& from) {
    const int64_t slot = b * call.slots + n;
    float* row = grad.get() + n * TOKENS;
    const float* update = from.forward_updates + slot * call.value_dim;
    const float* grad_update = grad_updates.get() + n * value_dim;
    float inner = 0;
    for (int64_t d = 0; d < call.value_dim; ++d) inner += grad_update[d] * update[d];
    const float factor = 1.0f / divisor(from.forward_total[slot]), more = from.total ? from.total[slot] : 0.0f;
    for (int64_t t = 0; t < width; t += LANES) store(row + t, (load(row + t) - inner) * factor + more);
    hide(b, n, m, row);
    if (!from.attention) return;
    const float* grad_attention = from.attention + slot * call.tokens + m;
    for (int64_t t = 0; t < count; ++t) row[t] += grad_attention[t];
  }

  // Turns the gradient of the attention into that of the logits.
  void through_softmax() {
    const int64_t size = call.slots / call.groups;
    for (int64_t first = 0; first < call.slots; first += size) {
      for (int64_t t = 0; t < width; t += LANES) {
        const float* column = attention.get() + first * TOKENS + t;
        float* to = grad.get() + first * TOKENS + t;
        Floats shared_part{};
        for (int64_t n = 0; n < size; ++n) shared_part += load(column + n * TOKENS) * load(to + n * TOKENS);
        for (int64_t n = 0; n < size; ++n) {
          store(to + n * TOKENS, load(column + n * TOKENS) * (load(to + n * TOKENS) - shared_part));
        }
      }
    }
  }

  // Rows of a tile are written to the result directly, unless they are padded.
  template <class Make>
  void write(float* to, int64_t stride, int64_t dim, Make make) {
    if (count == width && stride == dim) return make(to);
    make(grad_tile.get());
    copy(grad_tile.get(), count, dim, to, stride);
  }
};

inline void attend_samples(const Attention& call, int64_t begin, int64_t end, const Attended& to) {
  Sample sample(call, false);
  for (int64_t b = begin; b < end; ++b) sample.forward(b, to);
}

inline void differentiate_samples(const Attention& call, int64_t begin, int64_t end, const Cotangents& from,
                                  const Gradients& to) {
  Sample sample(call, true);
  for (int64_t b = begin; b < end; ++b) sample.backward(b, from, to);
}

}  // namespace slotkernels::LEVEL
