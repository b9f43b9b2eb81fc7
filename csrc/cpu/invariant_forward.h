// The forward pass of invariant attention for one sample on one thread, for one level of x86-64 (see levels.h).

namespace slotkernels::LEVEL {

template <int64_t RANK>
class InvariantForward : InvariantSample {
 public:
  explicit InvariantForward(const InvariantAttention& call) : InvariantSample(call), updates(scratch(slots * dim)) {}

  void solve(int64_t b, const InvariantResults& to) {
    begin(b);
    const int64_t first = b * call.slots;
    const PairPlace<RANK> keys = place<RANK>(KEYS), values = place<RANK>(VALUES);
    for_tiles(call.k, b, [&](const TokenTile& tile) { score_tile(tile, keys, q.get(), attention.get()); });
    clear_pads(attention.get());
    divide(attention.get(), KEYS);
    softmax(call.bias + first);
    for (int64_t n = 0; n < call.slots; ++n) {
      const float inverse = 1.0f / total(n);
      const float* row = attention.get() + n * width;
      float* weight = weights.get() + n * width;
      for (int64_t t = 0; t < width; t += LANES) {
        store(weight + t, (load(row + t) + call.weight_eps) * load(keep.get() + t) * inverse);
      }
      for (int64_t axis = 0; axis < 2; ++axis) {
        const int64_t at = (first + n) * 2 + axis;
        estimate(weight, grid.get() + axis * width, to.positions[at], to.scales[at]);
      }
    }
    copy_rows(attention.get(), call.slots, width, to.attention + first * call.tokens, call.tokens);
    copy_rows(weights.get(), call.slots, width, to.weights + first * call.tokens, call.tokens);
    divide(weights.get(), VALUES);
    std::fill_n(updates.get(), slots * dim, 0.0f);
    for_tiles(call.v, b, [&](const TokenTile& tile) { add_tile(tile, values, weights.get(), updates.get()); });
    copy_rows(updates.get(), call.slots, dim, to.updates + first * call.dim, call.dim);
  }

 private:
  Scratch updates;  // [slots, dim]

  // Turns scores into the attention: softmax over the slots of each token.
  void softmax(const float* bias) {
    constexpr float LOG2_E = 1.44269504088896340736f;
    for (int64_t t = 0; t < width; t += LANES) {
      float* column = attention.get() + t;
      Floats greatest{};
      for (int64_t n = 0; n < call.slots; ++n) {
        const Floats logit = load(column + n * width) * call.scale + bias[n];
        store(column + n * width, logit);
        greatest = n ? maximum(greatest, logit) : logit;
      }
      Floats sum{};
      for (int64_t n = 0; n < call.slots; ++n) {
        const Floats power = exp2_nonpositive((load(column + n * width) - greatest) * LOG2_E);
        store(column + n * width, power);
        sum += power;
      }
      const Floats inverse = 1.0f / sum;
      for (int64_t n = 0; n < call.slots; ++n) store(column + n * width, load(column + n * width) * inverse);
    }
  }

  // Weighted mean and standard deviation of the tokens' places along one axis.
  void estimate(const float* weight, const float* places, float& position, float& scale) const {
    Floats mean{}, variance{};
    for (int64_t t = 0; t < width; t += LANES) mean += load(weight + t) * load(places + t);
    position = lanes_sum(mean);
    for (int64_t t = 0; t < width; t += LANES) {
      const Floats offset = load(places + t) - position;
      variance += (load(weight + t) + call.scale_eps) * load(keep.get() + t) * offset * offset;
    }
    const float sum = lanes_sum(variance);
    scale = std::sqrt(sum < SMALLEST_VARIANCE ? SMALLEST_VARIANCE : sum);
  }
};

}  // namespace slotkernels::LEVEL
