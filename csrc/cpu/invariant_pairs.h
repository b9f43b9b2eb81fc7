// The part of invariant attention that is D numbers wide for each pair of slot and token, for one level of x86-64 (see
// levels.h): the pre-activation `token + sum over r of coordinate[r] * axis[r]`, its ReLU, and products with the ReLU.
//
// Only sums over D are stored for a pair. A pre-activation exists in registers only, and is computed once in the
// forward pass and once in the backward pass. A vector holds neighbouring columns of D.

namespace slotkernels::LEVEL {

constexpr int64_t TILE_TOKENS = 32;  // they and their gradient fit the L1 cache; a multiple of every level's LANES

// Numbers of slots and vectors whose sums fill the registers; the backward pass has up to five sums for each.
constexpr int64_t SCORE_SLOTS = LANES / TILE;  // times TILE tokens
#if FLOATS_IN_REGISTER == 16
constexpr int64_t UPDATE_SLOTS = 2, UPDATE_VECTORS = 4, GRADIENT_SLOTS = 2, GRADIENT_VECTORS = 2;
#else
constexpr int64_t UPDATE_SLOTS = 2, UPDATE_VECTORS = 2, GRADIENT_SLOTS = 1, GRADIENT_VECTORS = 1;
#endif
constexpr int64_t SLOT_GROUP = 4;  // slots are padded to a multiple of this, and so of each number of slots above

// Rows of a tile, padded to `dim` columns, and which tokens of the sample they are.
struct TokenTile {
  const float* rows;
  int64_t first, count;
};

// Coordinates [slots, width] of all pairs, and the axes [RANK, dim] they belong to.
template <int64_t RANK>
struct PairPlace {
  const float* coordinates[RANK];
  const float* axes;
  int64_t slots, width, dim;
};

template <int64_t WIDEST, class Use>
ALWAYS_INLINE void for_columns(int64_t dim, Use use) {
  int64_t d = 0;
  for (; d + WIDEST * LANES <= dim; d += WIDEST * LANES) use(std::integral_constant<int64_t, WIDEST>(), d);
  for (; d < dim; d += LANES) use(std::integral_constant<int64_t, 1>(), d);
}

template <int64_t RANK>
ALWAYS_INLINE Floats pre_activation(Floats token, const float (&coordinates)[RANK], const Floats (&axes)[RANK]) {
  for (int64_t r = 0; r < RANK; ++r) token += coordinates[r] * axes[r];
  return token;
}

template <int64_t RANK>
ALWAYS_INLINE void load_coordinates(const PairPlace<RANK>& place, int64_t pair, float (&coordinates)[RANK]) {
  for (int64_t r = 0; r < RANK; ++r) coordinates[r] = place.coordinates[r][pair];
}

ALWAYS_INLINE Floats relu(Floats a) { return maximum(Floats{}, a); }  // NaN stays NaN

// Products of slots' vectors [slots, dim] with the ReLUs of a tile's pairs, to `scores` [slots, width]. The tile has
// whole groups of TILE rows.
template <int64_t RANK>
void score_tile(TokenTile tile, PairPlace<RANK> place, const float* vectors, float* scores) {
  const int64_t dim = place.dim, width = place.width;
  for (int64_t t = 0; t < tile.count; t += TILE) {
    for (int64_t n = 0; n < place.slots; n += SCORE_SLOTS) {
      const int64_t pair = n * width + tile.first + t;
      Floats sum[LANES] = {};
      for (int64_t d = 0; d < dim; d += LANES) {
        Floats axes[RANK], tokens[TILE];
        for (int64_t r = 0; r < RANK; ++r) axes[r] = load(place.axes + r * dim + d);
        for (int64_t j = 0; j < TILE; ++j) tokens[j] = load(tile.rows + (t + j) * dim + d);
        for (int64_t i = 0; i < SCORE_SLOTS; ++i) {
          const Floats vector = load(vectors + (n + i) * dim + d);
          for (int64_t j = 0; j < TILE; ++j) {
            float coordinates[RANK];
            load_coordinates(place, pair + i * width + j, coordinates);
            sum[i * TILE + j] += relu(pre_activation(tokens[j], coordinates, axes)) * vector;
          }
        }
      }
      float products[LANES];
      store(products, sums(sum));
      for (int64_t i = 0; i < SCORE_SLOTS; ++i) {
        std::memcpy(scores + pair + i * width, products + i * TILE, TILE * sizeof(float));
      }
    }
  }
}

// V vectors of `add_tile` at slot n and column d. Arguments are copies, which no store can change.
template <int64_t V, int64_t RANK>
ALWAYS_INLINE void add_columns(TokenTile tile, PairPlace<RANK> place, const float* coefficients, float* updates,
                               int64_t n, int64_t d) {
  const int64_t dim = place.dim, first = n * place.width + tile.first;
  Floats axes[V][RANK], sum[UPDATE_SLOTS][V];
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t r = 0; r < RANK; ++r) axes[v][r] = load(place.axes + r * dim + d + v * LANES);
    for (int64_t i = 0; i < UPDATE_SLOTS; ++i) sum[i][v] = load(updates + (n + i) * dim + d + v * LANES);
  }
  for (int64_t t = 0; t < tile.count; ++t) {
    Floats tokens[V];
    for (int64_t v = 0; v < V; ++v) tokens[v] = load(tile.rows + t * dim + d + v * LANES);
    for (int64_t i = 0; i < UPDATE_SLOTS; ++i) {
      const int64_t pair = first + i * place.width + t;
      float coordinates[RANK];
      load_coordinates(place, pair, coordinates);
      for (int64_t v = 0; v < V; ++v) {
        sum[i][v] += coefficients[pair] * relu(pre_activation(tokens[v], coordinates, axes[v]));
      }
    }
  }
  for (int64_t i = 0; i < UPDATE_SLOTS; ++i) {
    for (int64_t v = 0; v < V; ++v) store(updates + (n + i) * dim + d + v * LANES, sum[i][v]);
  }
}

// Adds a tile's ReLUs, times the coefficients [slots, width] of their pairs, to `updates` [slots, dim].
template <int64_t RANK>
void add_tile(const TokenTile& tile, const PairPlace<RANK>& place, const float* coefficients, float* updates) {
  for (int64_t n = 0; n < place.slots; n += UPDATE_SLOTS) {
    for_columns<UPDATE_VECTORS>(place.dim, [&](auto vectors, int64_t d) {
      add_columns<decltype(vectors)::value>(tile, place, coefficients, updates, n, d);
    });
  }
}

// What the backward pass sums for keys or for values. With coefficient c and vector u of a pair, and [p > 0] for each
// column of its pre-activation p:
template <int64_t RANK>
struct PairSums {
  static constexpr int64_t COUNT = RANK + 2;
  float* over_tokens;   // [slots, COUNT, dim]: of c [p > 0], of that times each coordinate, and of c relu(p)
  float* scores;        // [slots, width]: over columns, of u relu(p)
  float* along[RANK];   // [slots, width]: over columns, of u [p > 0] times each axis
  float* partial;       // [RANK + 1, GRADIENT_SLOTS, TILE_TOKENS, LANES]: sums over columns before lanes are added up
};

template <int64_t RANK>
ALWAYS_INLINE float* partial_sum(const PairSums<RANK>& sums, int64_t part, int64_t slot, int64_t token) {
  return sums.partial + ((part * GRADIENT_SLOTS + slot) * TILE_TOKENS + token) * LANES;
}

// V vectors of `differentiate_tile` at slot n and column d. Arguments are copies, which no store can change.
template <int64_t V, bool SCORES, bool ALONG, bool QUERIES, int64_t RANK>
ALWAYS_INLINE void differentiate_columns(TokenTile tile, PairPlace<RANK> place, const float* coefficients,
                                         const float* vectors, PairSums<RANK> sums_of, float* gradient, int64_t n,
                                         int64_t d) {
  constexpr int64_t COUNT = PairSums<RANK>::COUNT, USED = COUNT - !QUERIES, SLOTS = GRADIENT_SLOTS;
  constexpr int64_t PARTS = SCORES + ALONG * RANK;
  const int64_t dim = place.dim, first = n * place.width + tile.first;
  float* const totals = sums_of.over_tokens + n * COUNT * dim + d;
  Floats axes[V][RANK], vector[SLOTS][V], sum[SLOTS][USED][V];
  for (int64_t v = 0; v < V; ++v) {
    for (int64_t r = 0; r < RANK; ++r) axes[v][r] = load(place.axes + r * dim + d + v * LANES);
    for (int64_t i = 0; i < SLOTS; ++i) vector[i][v] = load(vectors + (n + i) * dim + d + v * LANES);
  }
  for (int64_t i = 0; i < SLOTS; ++i) {
    for (int64_t s = 0; s < USED; ++s) {
      for (int64_t v = 0; v < V; ++v) sum[i][s][v] = load(totals + (i * COUNT + s) * dim + v * LANES);
    }
  }
  for (int64_t t = 0; t < tile.count; ++t) {
    Floats tokens[V], grad[V];
    for (int64_t v = 0; v < V; ++v) {
      tokens[v] = load(tile.rows + t * dim + d + v * LANES);
      grad[v] = load(gradient + t * dim + d + v * LANES);
    }
    for (int64_t i = 0; i < SLOTS; ++i) {
      const int64_t pair = first + i * place.width + t;
      const float c = coefficients[pair];
      float coordinates[RANK];
      load_coordinates(place, pair, coordinates);
      Floats parts[PARTS + 1] = {};
      for (int64_t v = 0; v < V; ++v) {
        const Floats pre = pre_activation(tokens[v], coordinates, axes[v]);
        const Ints open = less(Floats{}, pre);
        const Floats passed = where(open, c - Floats{}, Floats{});
        sum[i][0][v] += passed;
        for (int64_t r = 0; r < RANK; ++r) sum[i][r + 1][v] += passed * coordinates[r];
        if constexpr (QUERIES) sum[i][RANK + 1][v] += passed * pre;
        if constexpr (SCORES) parts[0] += relu(pre) * vector[i][v];
        if constexpr (ALONG) {
          const Floats product = where(open, vector[i][v], Floats{});
          grad[v] += c * product;
          for (int64_t r = 0; r < RANK; ++r) parts[SCORES + r] += product * axes[v][r];
        } else {
          grad[v] += passed * vector[i][v];
        }
      }
      for (int64_t p = 0; p < PARTS; ++p) {
        float* to = partial_sum(sums_of, p, i, t);
        store(to, d == 0 ? parts[p] : load(to) + parts[p]);
      }
    }
    for (int64_t v = 0; v < V; ++v) store(gradient + t * dim + d + v * LANES, grad[v]);
  }
  for (int64_t i = 0; i < SLOTS; ++i) {
    for (int64_t s = 0; s < USED; ++s) {
      for (int64_t v = 0; v < V; ++v) store(totals + (i * COUNT + s) * dim + v * LANES, sum[i][s][v]);
    }
  }
}

// Adds a tile's part to the sums, and the gradient of its tokens, c u [p > 0], to `gradient` [count, dim]. Sums over
// columns are computed where SCORES and ALONG say so; the last sum over tokens with QUERIES, whose gradient it is.
template <bool SCORES, bool ALONG, bool QUERIES, int64_t RANK>
void differentiate_tile(const TokenTile& tile, const PairPlace<RANK>& place, const float* coefficients,
                        const float* vectors, const PairSums<RANK>& sums_of, float* gradient) {
  for (int64_t n = 0; n < place.slots; n += GRADIENT_SLOTS) {
    for_columns<GRADIENT_VECTORS>(place.dim, [&](auto width, int64_t d) {
      differentiate_columns<decltype(width)::value, SCORES, ALONG, QUERIES>(tile, place, coefficients, vectors, sums_of,
                                                                            gradient, n, d);
    });
    for (int64_t p = 0; p < SCORES + ALONG * RANK; ++p) {
      for (int64_t i = 0; i < GRADIENT_SLOTS; ++i) {
        float* rows = SCORES && p == 0 ? sums_of.scores : sums_of.along[p - SCORES];
        float* to = rows + (n + i) * place.width + tile.first;
        for (int64_t t = 0; t < tile.count; t += LANES) {
          Floats lanes[LANES];
          for (int64_t l = 0; l < LANES; ++l) lanes[l] = load(partial_sum(sums_of, p, i, t + l));
          store(to + t, sums(lanes));
        }
      }
    }
  }
}

}  // namespace slotkernels::LEVEL
