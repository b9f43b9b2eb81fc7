// The backward pass of invariant attention for one sample on one thread, for one level of x86-64 (see levels.h).

namespace slotkernels::LEVEL {

template <int64_t RANK>
class InvariantBackward : InvariantSample {
 public:
  InvariantBackward(const InvariantAttention& call, const InvariantCotangents& from, const InvariantGradients& to)
      : InvariantSample(call),
        from(from),
        to(to),
        grad_updates(scratch(slots * dim)),
        coefficients(scratch(pairs)),
        scores(scratch(pairs)),
        along(scratch(RANK * pairs)),
        sums(scratch(slots * PairSums<RANK>::COUNT * dim)),
        partial(scratch((RANK + 1) * GRADIENT_SLOTS * TILE_TOKENS * LANES)),
        grad_tile(scratch(TILE_TOKENS * dim)),
        grad_axes(scratch(RANK * dim)),
        grad_grid(scratch(2 * width)) {}

  void solve(int64_t b) {
    begin(b);
    const int64_t first = b * call.slots;
    copy_rows(from.forward_attention + first * call.tokens, call.slots, call.tokens, attention.get(), width);
    copy_rows(from.forward_weights + first * call.tokens, call.slots, call.tokens, weights.get(), width);
    std::fill_n(grad_axes.get(), RANK * dim, 0.0f);
    std::fill_n(grad_grid.get(), 2 * width, 0.0f);
    for (float* frames : {to.positions, to.scales}) {
      if (frames) std::fill_n(frames + first * 2, call.slots * 2, 0.0f);
    }

    const bool along_axes = RANK == 3 || to.grid;  // whether sums along the axes are needed for each pair
    std::copy_n(weights.get(), pairs, coefficients.get());
    divide(coefficients.get(), VALUES);
    if (from.updates) {
      copy_rows(from.updates + first * call.dim, call.slots, call.dim, grad_updates.get(), dim);
      along_axes ? through_relu<true, true, false>(b, VALUES, grad_updates.get(), call.v, to.v)
                      : through_relu<true, false, false>(b, VALUES, grad_updates.get(), call.v, to.v);
      collect(b, VALUES, grad_updates.get(), to.value_deviation);
      divide(scores.get(), VALUES);
    } else {  // the last iteration: only its attention is used
      std::fill_n(scores.get(), pairs, 0.0f);
      if (to.v) std::fill_n(to.v + b * call.tokens * call.dim, call.tokens * call.dim, 0.0f);
      if (to.value_deviation) std::fill_n(to.value_deviation + first * call.tokens, call.slots * call.tokens, 0.0f);
    }
    for (int64_t n = 0; n < call.slots; ++n) through_weights(b, n);
    through_softmax(first);
    divide(coefficients.get(), KEYS);
    along_axes ? through_relu<RANK == 3, true, true>(b, KEYS, q.get(), call.k, to.k)
                    : through_relu<RANK == 3, false, true>(b, KEYS, q.get(), call.k, to.k);
    collect(b, KEYS, q.get(), to.key_deviation);
    write(b);
  }

 private:
  const InvariantCotangents& from;
  const InvariantGradients& to;
  Scratch grad_updates;          // [slots, dim]
  Scratch coefficients, scores;  // [slots, width]: of the pairs' ReLUs, and sums over columns
  Scratch along;                 // [RANK, slots, width]
  Scratch sums, partial;         // see PairSums
  Scratch grad_tile;             // [TILE_TOKENS, dim]
  Scratch grad_axes, grad_grid;  // [RANK, dim] and [2, width]

  // Gradient of the tokens, and all sums of pairs, for keys or for values.
  template <bool SCORES, bool ALONG, bool QUERIES>
  void through_relu(int64_t b, PairRole role, const float* vectors, const float* tokens, float* gradient) {
    const PairPlace<RANK> where = place<RANK>(role);
    PairSums<RANK> to_sums{sums.get(), scores.get(), {}, partial.get()};
    for (int64_t r = 0; r < RANK; ++r) to_sums.along[r] = along.get() + r * pairs;
    std::fill_n(sums.get(), slots * PairSums<RANK>::COUNT * dim, 0.0f);
    for_tiles(tokens, b, [&](const TokenTile& tile) {
      float* own = gradient ? gradient + (b * call.tokens + tile.first) * call.dim : nullptr;
      float* rows = own && call.dim == dim ? own : grad_tile.get();
      std::fill_n(rows, tile.count * dim, 0.0f);
      differentiate_tile<SCORES, ALONG, QUERIES>(tile, where, coefficients.get(), vectors, to_sums, rows);
      if (own && rows != own) copy_rows(rows, tile.count, dim, own, call.dim);
    });
  }

  // Computes the gradients of axes, positions, scales, grid and deviations from the sums of pairs.
  void collect(int64_t b, PairRole role, const float* vectors, float* grad_deviation) {
    for (int64_t n = 0; n < call.slots; ++n) {
      const float *sum = sums.get() + n * PairSums<RANK>::COUNT * dim, *vector = vectors + n * dim;
      Floats open[2] = {}, placed[2] = {};  // products with the frame's two axes
      for (int64_t d = 0; d < dim; d += LANES) {
        for (int64_t r = 0; r < RANK; ++r) {
          const Floats part = load(sum + (r + 1) * dim + d) * load(vector + d), axis = load(axes.get() + r * dim + d);
          store(grad_axes.get() + r * dim + d, load(grad_axes.get() + r * dim + d) + part);
          if (r == 2) continue;
          open[r] += load(sum + d) * load(vector + d) * axis;
          placed[r] += part * axis;
        }
      }
      for (int64_t c = 0; c < 2; ++c) {
        const int64_t at = (b * call.slots + n) * 2 + c;
        const float inverse = inverse_scale(b, n, c);
        if (to.positions) to.positions[at] -= lanes_sum(open[c]) * inverse;
        if (to.scales) to.scales[at] -= lanes_sum(placed[c]) / call.scales[at];
        if (to.grid) add_to_grid(n, c, inverse);
      }
      if (!grad_deviation) continue;
      const int64_t pair = n * width;
      float* row = grad_deviation + (b * call.slots + n) * call.tokens;
      for (int64_t t = 0; t < call.tokens; ++t) {
        const float shifted = along[2 * pairs + pair + t], score = scores[pair + t];
        row[t] = coefficients[pair + t] * (shifted - score / deviation(role)[pair + t]);
      }
    }
  }

  // A token's place changes its coordinates for all slots.
  void add_to_grid(int64_t n, int64_t axis, float inverse) {
    const float *c = coefficients.get() + n * width, *product = along.get() + axis * pairs + n * width;
    float* row = grad_grid.get() + axis * width;
    for (int64_t t = 0; t < width; t += LANES) {
      store(row + t, load(row + t) + load(c + t) * load(product + t) * inverse);
    }
  }

  // Turns the scores of a slot's values into the gradient of its attention.
  void through_weights(int64_t b, int64_t n) {
    const int64_t slot = b * call.slots + n;
    float* row = scores.get() + n * width;
    const float* weight = weights.get() + n * width;
    if (from.weights) {
      for (int64_t t = 0; t < call.tokens; ++t) row[t] += from.weights[slot * call.tokens + t];
    }
    float mean[2], grad_mean[2], grad_variance[2];
    for (int64_t c = 0; c < 2; ++c) {
      const float scale = from.forward_scales[slot * 2 + c];
      mean[c] = from.forward_positions[slot * 2 + c];
      grad_variance[c] = from.scales && scale > SMALLEST_SCALE ? from.scales[slot * 2 + c] / (2 * scale) : 0.0f;
    }
    const auto offset = [&](int64_t c, int64_t t) { return load(grid.get() + c * width + t) - mean[c]; };
    const auto spread = [&](int64_t t) {
      return (load(weight + t) + call.scale_eps) * load(keep.get() + t);
    };
    Floats average{}, offsets[2] = {};
    for (int64_t t = 0; t < width; t += LANES) {
      Floats grad = load(row + t);
      for (int64_t c = 0; c < 2; ++c) {
        const Floats away = offset(c, t);
        grad += grad_variance[c] * away * away;
        offsets[c] += spread(t) * away;
      }
      store(row + t, grad);
      average += load(weight + t) * grad;
    }
    float shared = lanes_sum(average);
    for (int64_t c = 0; c < 2; ++c) {
      grad_mean[c] = from.positions ? from.positions[slot * 2 + c] : 0.0f;
      grad_mean[c] -= 2 * grad_variance[c] * lanes_sum(offsets[c]);
      shared += grad_mean[c] * mean[c];  // the weighted mean of the grid
    }
    const float inverse = 1.0f / total(n);
    for (int64_t t = 0; t < width; t += LANES) {
      Floats grad = load(row + t) - shared;
      for (int64_t c = 0; c < 2; ++c) {
        float* places = grad_grid.get() + c * width + t;
        grad += grad_mean[c] * load(grid.get() + c * width + t);
        store(places, load(places) + 2 * grad_variance[c] * spread(t) * offset(c, t) + grad_mean[c] * load(weight + t));
      }
      store(row + t, grad * load(keep.get() + t) * inverse);
    }
    if (!from.attention) return;
    for (int64_t t = 0; t < call.tokens; ++t) row[t] += from.attention[slot * call.tokens + t];
  }

  // Turns the gradient of the attention into that of the logits and, times their scale, that of the keys' scores.
  void through_softmax(int64_t first) {
    for (int64_t t = 0; t < width; t += LANES) {
      const float *column = attention.get() + t, *grad = scores.get() + t;
      Floats shared{};
      for (int64_t n = 0; n < call.slots; ++n) shared += load(column + n * width) * load(grad + n * width);
      for (int64_t n = 0; n < call.slots; ++n) {
        store(coefficients.get() + n * width + t, load(column + n * width) * (load(grad + n * width) - shared));
      }
    }
    for (int64_t n = 0; n < call.slots; ++n) {
      float* row = coefficients.get() + n * width;
      Floats sum{};
      for (int64_t t = 0; t < width; t += LANES) {
        sum += load(row + t);
        store(row + t, load(row + t) * call.scale);
      }
      if (to.bias) to.bias[first + n] = lanes_sum(sum);
    }
  }

  void write(int64_t b) const {
    constexpr int64_t COUNT = PairSums<RANK>::COUNT;
    const float* grad_q = sums.get() + (COUNT - 1) * dim;
    if (to.q) copy_rows(grad_q, call.slots, COUNT * dim, to.q + b * call.slots * call.dim, call.dim);
    if (to.axes) copy_rows(grad_axes.get(), RANK, dim, to.axes + b * RANK * call.dim, call.dim);
    if (!to.grid) return;
    for (int64_t m = 0; m < call.tokens; ++m) {
      for (int64_t c = 0; c < 2; ++c) to.grid[(b * call.tokens + m) * 2 + c] = grad_grid[c * width + m];
    }
  }
};

}  // namespace slotkernels::LEVEL
