// One sample of invariant attention, for one level of x86-64 (see levels.h). Slots are padded to whole groups, tokens
// and columns to whole vectors, with zeros (deviations: with ones).

namespace slotkernels::LEVEL {

enum PairRole { KEYS, VALUES };

class InvariantSample {
 public:
  explicit InvariantSample(const InvariantAttention& call)
      : call(call),
        slots((call.slots + SLOT_GROUP - 1) / SLOT_GROUP * SLOT_GROUP),
        width(padded(call.tokens)),
        dim(padded(call.dim)),
        pairs(slots * width),
        q(scratch(slots * dim)),
        axes(scratch(call.rank() * dim)),
        grid(scratch(2 * width)),
        keep(scratch(width)),
        coordinates(scratch(2 * call.rank() * pairs)),
        attention(scratch(pairs)),
        weights(scratch(pairs)),
        tile(scratch(TILE_TOKENS * dim)) {
    copy_rows(call.frame, 2, call.dim, axes.get(), dim);
    if (!call.shift) return;
    copy_rows(call.shift, 1, call.dim, axes.get() + 2 * dim, dim);
    std::fill_n(deviation(KEYS), 2 * pairs, 1.0f);
  }

 protected:
  const InvariantAttention& call;
  const int64_t slots, width, dim, pairs;  // padded; pairs is slots * width
  Scratch q;                               // [slots, dim]
  Scratch axes;                            // [rank, dim]
  Scratch grid;                            // [2, width]
  Scratch keep;                            // [width]: 1 for tokens that count, else 0
  Scratch coordinates;                     // [2 and both deviations, slots, width]
  Scratch attention, weights;              // [slots, width]
  Scratch tile;                            // [TILE_TOKENS, dim]

  // The first columns of rows that are `stride` and `to_stride` long.
  static void copy_rows(const float* from, int64_t count, int64_t stride, float* to, int64_t to_stride) {
    for (int64_t i = 0; i < count; ++i) std::copy_n(from + i * stride, std::min(stride, to_stride), to + i * to_stride);
  }

  static float lanes_sum(Floats lanes) {
    float sum = 0;
    for (int64_t l = 0; l < LANES; ++l) sum += lanes[l];
    return sum;
  }

  float* deviation(PairRole role) const { return coordinates.get() + (2 + role) * pairs; }

  float inverse_scale(int64_t b, int64_t n, int64_t axis) const {
    return 1.0f / (call.scales[(b * call.slots + n) * 2 + axis] * call.scale_factor);
  }

  template <int64_t RANK>
  PairPlace<RANK> place(PairRole role) const {
    PairPlace<RANK> result{{}, axes.get(), slots, width, dim};
    for (int64_t r = 0; r < RANK; ++r) result.coordinates[r] = r < 2 ? coordinates.get() + r * pairs : deviation(role);
    return result;
  }

  // Rows of pairs over their deviation, if there are any.
  void divide(float* rows, PairRole role) const {
    if (!call.shift) return;
    const float* by = deviation(role);
    for (int64_t i = 0; i < pairs; i += LANES) store(rows + i, load(rows + i) / load(by + i));
  }

  // Writes zeros to the padding of rows of pairs, which may hold numbers of another sample.
  void clear_pads(float* rows) const {
    for (int64_t n = 0; n < slots; ++n) std::fill_n(rows + n * width + call.tokens, width - call.tokens, 0.0f);
  }

  void begin(int64_t b) {
    const int64_t first = b * call.slots;
    copy_rows(call.q + first * call.dim, call.slots, call.dim, q.get(), dim);
    for (int64_t m = 0; m < call.tokens; ++m) {
      keep[m] = !call.mask || call.mask[b * call.tokens + m];
      for (int64_t axis = 0; axis < 2; ++axis) grid[axis * width + m] = call.grid[(b * call.tokens + m) * 2 + axis];
    }
    for (int64_t axis = 0; axis < 2; ++axis) {
      for (int64_t n = 0; n < call.slots; ++n) {
        const float position = call.positions[(first + n) * 2 + axis], inverse = inverse_scale(b, n, axis);
        const float* from = grid.get() + axis * width;
        float* to = coordinates.get() + axis * pairs + n * width;
        for (int64_t t = 0; t < width; t += LANES) store(to + t, (load(from + t) - position) * inverse);
      }
    }
    if (!call.shift) return;
    const float* const deviations[] = {call.key_deviation, call.value_deviation};
    for (PairRole role : {KEYS, VALUES}) {
      copy_rows(deviations[role] + first * call.tokens, call.slots, call.tokens, deviation(role), width);
    }
  }

  // Calls `use` with each tile of the sample's tokens. Tokens are copied only if they have to be padded.
  template <class Use>
  void for_tiles(const float* tokens, int64_t b, Use use) {
    for (int64_t m = 0; m < call.tokens; m += TILE_TOKENS) {
      const int64_t count = std::min(TILE_TOKENS, call.tokens - m), whole = (count + TILE - 1) / TILE * TILE;
      const float* rows = tokens + (b * call.tokens + m) * call.dim;
      if (count != whole || call.dim != dim) {
        copy_rows(rows, count, call.dim, tile.get(), dim);
        std::fill_n(tile.get() + count * dim, (whole - count) * dim, 0.0f);
        rows = tile.get();
      }
      use(TokenTile{rows, m, count});
    }
  }

  // The divisor of a slot's weights: the sum of its attention over the tokens.
  float total(int64_t n) const {
    const float* row = attention.get() + n * width;
    Floats sum{};
    for (int64_t t = 0; t < width; t += LANES) sum += (load(row + t) + call.weight_eps) * load(keep.get() + t);
    const float total = lanes_sum(sum) + call.total_eps;
    return total == 0 ? 1.0f : total;  // every token masked: the slot gets a zero update
  }
};

}  // namespace slotkernels::LEVEL
