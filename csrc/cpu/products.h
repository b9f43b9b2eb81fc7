// Products of small matrices, for one level of x86-64 (see levels.h): 4 x 4 tiles of dot products, and rows of
// coefficients times rows of points. Both keep their sums in registers for the whole length of the product.

namespace slotkernels::LEVEL {

constexpr int64_t TILE = 4;

// Sizes that fill the registers (32 of 16 floats with AVX-512, else 16): PART x TILE dot products (a tile is computed
// in parts), and ROWS x VECTORS sums in a product with points.
#if FLOATS_IN_REGISTER == 16
constexpr int64_t PART = 4, VECTORS = 4;
#else
constexpr int64_t PART = 2, VECTORS = 2;
#endif
constexpr int64_t ROWS = 4;

// Lanes in blocks of 2 H: the first H of a block are sums of two halves of a's block, the others of b's.
template <int64_t H, size_t... Lane>
ALWAYS_INLINE Floats fold(Floats a, Floats b, std::index_sequence<Lane...>) {
  constexpr auto from = [](size_t lane) { return lane / (2 * H) * (2 * H) + lane % H + (lane / H % 2) * LANES; };
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, from(Lane)...) + __builtin_shufflevector(a, b, (from(Lane) + H)...);
#else  // GCC 11
  return __builtin_shuffle(a, b, Ints{from(Lane)...}) + __builtin_shuffle(a, b, Ints{(from(Lane) + H)...});
#endif
}

// Lane i is the sum of all lanes of v[i], always added in the same order.
template <int64_t H = LANES / 2>
ALWAYS_INLINE Floats sums(const Floats* v) {
  Floats folded[H];
  for (int64_t i = 0; i < H; ++i) folded[i] = fold<H>(v[i], v[i + H], std::make_index_sequence<LANES>());
  if constexpr (H == 1) {
    return folded[0];
  } else {
    return sums<H / 2>(folded);
  }
}

// The 16 dot products of 4 rows of a and 4 rows of b, row by row; `length` is a multiple of LANES.
struct Tile {
  float products[TILE * TILE];
};

ALWAYS_INLINE Tile dots(const float* a, const float* b, int64_t stride, int64_t length) {
  Floats lanes[TILE * TILE];
  for (int64_t row = 0; row < TILE; row += PART) {
    Floats part[PART][TILE] = {};
    for (int64_t d = 0; d < length; d += LANES) {
      Floats right[TILE];
      for (int64_t j = 0; j < TILE; ++j) right[j] = load(b + j * stride + d);
      for (int64_t i = 0; i < PART; ++i) {
        const Floats left = load(a + (row + i) * stride + d);
        for (int64_t j = 0; j < TILE; ++j) part[i][j] += left * right[j];
      }
    }
    for (int64_t i = 0; i < PART; ++i) {
      for (int64_t j = 0; j < TILE; ++j) lanes[(row + i) * TILE + j] = part[i][j];
    }
  }
  Tile tile;
  for (int64_t i = 0; i < TILE * TILE; i += LANES) store(tile.products + i, sums(lanes + i));
  return tile;
}

ALWAYS_INLINE Tile transposed(const Tile& tile) {
  Tile result;
  for (int64_t i = 0; i < TILE * TILE; ++i) result.products[i] = tile.products[i % TILE * TILE + i / TILE];
  return result;
}

ALWAYS_INLINE void store_tile(float* to, int64_t stride, const Tile& tile) {
  for (int64_t i = 0; i < TILE; ++i) std::memcpy(to + i * stride, tile.products + i * TILE, TILE * sizeof(float));
}

// Consecutive rows of a matrix.
struct Set {
  int64_t first, count;
};

// Dot products of two sets among `points`, into both triangles of `gram`. Of a set with itself only the upper tiles are
// computed, or just those on the diagonal.
inline void multiply(const float* points, int64_t stride, int64_t length, Set rows, Set columns, bool diagonal_only,
                     float* gram, int64_t gram_stride) {
  for (int64_t i = rows.first; i < rows.first + rows.count; i += TILE) {
    const int64_t start = rows.first == columns.first ? i : columns.first;
    const int64_t end = diagonal_only ? i + 1 : columns.first + columns.count;
    for (int64_t j = start; j < end; j += TILE) {
      const Tile tile = dots(points + i * stride, points + j * stride, stride, length);
      store_tile(gram + i * gram_stride + j, gram_stride, tile);
      if (i != j) store_tile(gram + j * gram_stride + i, gram_stride, transposed(tile));
    }
  }
}

// One row of points, and its coefficients in R sums.
template <int64_t R>
struct Term {
  const float* point;
  float coefficients[R];
};

// V vectors of R sums at column d.
template <int64_t R, int64_t V>
ALWAYS_INLINE void combine(const Term<R>* terms, int64_t count, int64_t d, Floats (&sum)[R][V]) {
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t v = 0; v < V; ++v) sum[i][v] = Floats{};
  }
  for (const Term<R>* term = terms; term < terms + count; ++term) {
    Floats point[V];
    for (int64_t v = 0; v < V; ++v) point[v] = load(term->point + d + v * LANES);
    for (int64_t i = 0; i < R; ++i) {
      for (int64_t v = 0; v < V; ++v) sum[i][v] += term->coefficients[i] * point[v];
    }
  }
}

}  // namespace slotkernels::LEVEL
