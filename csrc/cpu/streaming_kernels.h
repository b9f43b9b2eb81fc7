// All pairs of two large sets of points on one thread. levels.h includes this file once for each level of x86-64.
//
// A tile of 6 rows and V vectors of columns stays in registers: product over the dimensions, exponent, exponential, and
// the sums over its rows and columns. Points are read from the cache: a block of rows for each panel of columns.
// Nothing of the size of the pairs is stored. The floor: 2 D operations a pair, and one exponential.

#include "simd.h"

namespace slotkernels::LEVEL {

constexpr float NEAREST = 1e-8f;                  // squared distance below which the cost |x - y| is flat (p = 1),
constexpr float NEAREST_DISTANCE = 1.000001e-4f;  // and its root, rounded up
constexpr float UNDERFLOW = -126.5f;              // below it exp2_any is 0

constexpr int64_t HEIGHT = 6;
#if FLOATS_IN_REGISTER == 16
constexpr int64_t VECTORS = 4;  // 24 of 32 registers
#else
constexpr int64_t VECTORS = 2;  // 12 of 16
#endif
constexpr int64_t WIDTH = VECTORS * LANES;

typedef Floats Tile[HEIGHT][VECTORS];

ALWAYS_INLINE bool any(Ints mask) {
  uint64_t parts[LANES / 2], all = 0;
  std::memcpy(parts, &mask, sizeof(mask));
  for (uint64_t part : parts) all |= part;
  return all != 0;
}

ALWAYS_INLINE float total(Floats v) {
  float sum = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) sum += v[lane];
  return sum;
}

// Products x·y (P = 2) or squared distances (P = 1).
template <int P>
ALWAYS_INLINE void multiply(const float* x, int64_t stride, const float* panel, int64_t dim, Tile& tile) {
  for (int64_t i = 0; i < HEIGHT; ++i) {
    for (int64_t v = 0; v < VECTORS; ++v) tile[i][v] = Floats{};
  }
  for (int64_t d = 0; d < dim; ++d) {
    Floats y[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) y[v] = load(panel + d * PANEL + v * LANES);
    for (int64_t i = 0; i < HEIGHT; ++i) {
      const float left = x[i * stride + d];
      for (int64_t v = 0; v < VECTORS; ++v) {
        if constexpr (P == 2) {
          tile[i][v] += left * y[v];
        } else {
          const Floats difference = left - y[v];
          tile[i][v] += difference * difference;
        }
      }
    }
  }
}

// Exponents of a tile, and for P = 1 the costs; false if every exponential is 0.
template <int P>
ALWAYS_INLINE bool exponents(const float* r, const float* s, float scale, Tile& tile, Tile* costs) {
  Floats columns[VECTORS], highest = Floats{} - std::numeric_limits<float>::infinity();
  for (int64_t v = 0; v < VECTORS; ++v) columns[v] = load(s + v * LANES);
  for (int64_t i = 0; i < HEIGHT; ++i) {
    for (int64_t v = 0; v < VECTORS; ++v) {
      Floats& t = tile[i][v];
      if constexpr (P == 2) {
        t = t * scale + (r[i] + columns[v]);
      } else {
        Floats cost = maximum(t, Floats{} + NEAREST);
        for (int64_t lane = 0; lane < LANES; ++lane) cost[lane] = std::sqrt(cost[lane]);
        if (costs) (*costs)[i][v] = cost;
        t = (r[i] + columns[v]) - scale * cost;
      }
      highest = maximum(highest, t);
    }
  }
  return any(less(Floats{} + UNDERFLOW, highest));
}

// One problem of a batch.
struct Pointers {
  const float *x, *y, *panels, *r, *a, *s, *b;
  float scale;

  Pointers(const Pairs& call, int64_t problem) {
    const int64_t rows = blocks(call.n) * BLOCK, columns = blocks(call.m) * BLOCK;
    x = call.x + problem * rows * call.stride;
    y = call.y + problem * columns * call.stride;
    panels = call.panels + problem * columns * call.dim;
    r = call.r + problem * rows;
    a = call.a + problem * rows;
    s = call.s + problem * columns;
    b = call.b + problem * columns;
    scale = call.scale[problem];
  }
};

// Adds a block of rows and a panel to the sums `rows` (a vector for each row) and, unless it is null, `columns`.
template <int P>
inline void add_sums(const Pairs& call, const Pointers& at, int64_t row, int64_t end, int64_t column, float* rows,
                     float* columns) {
  for (int64_t part = 0; part < PANEL; part += WIDTH) {
    const float* panel = at.panels + column * call.dim + part;
    const float *s = at.s + column + part, *b = at.b + column + part;
    Floats weights[VECTORS], sums[VECTORS] = {};
    for (int64_t v = 0; v < VECTORS; ++v) weights[v] = load(b + v * LANES);
    for (int64_t i = row; i < end; i += HEIGHT) {
      Tile tile;
      multiply<P>(at.x + i * call.stride, call.stride, panel, call.dim, tile);
      if (!exponents<P>(at.r + i, s, at.scale, tile, nullptr)) continue;
      for (int64_t k = 0; k < HEIGHT; ++k) {
        float* to = rows + (i - row + k) * LANES;
        Floats sum = load(to);
        for (int64_t v = 0; v < VECTORS; ++v) {
          const Floats kernel = exp2_any(tile[k][v]);
          sum += kernel * weights[v];
          sums[v] += kernel * at.a[i + k];
        }
        store(to, sum);
      }
    }
    if (!columns) continue;
    for (int64_t v = 0; v < VECTORS; ++v) {
      float* to = columns + column + part + v * LANES;
      store(to, load(to) + sums[v]);
    }
  }
}

// sum_j b_j K_ij over all columns, for the rows of a band, and sum_i a_i K_ij over those rows: float64 [n] of which the
// band's rows are set, and float32 [columns padded]. For a set with itself, the first sum leaves out the pairs below
// the diagonal blocks, and the second has only those.
template <int P>
inline void sum_band(const Pairs& call, int64_t problem, int64_t first, int64_t last, double* rows, float* columns) {
  const Pointers at(call, problem);
  const Scratch memory = scratch(BLOCK * LANES);
  for (int64_t row = first; row < std::min(last, call.n); row += BLOCK) {
    const int64_t end = std::min(row + BLOCK, call.n);
    const auto flush = [&] {
      for (int64_t i = row; i < end; ++i) rows[i] += total(load(memory.get() + (i - row) * LANES));
      std::fill_n(memory.get(), BLOCK * LANES, 0.0f);
    };
    std::fill(rows + row, rows + end, 0.0);
    int64_t panels = 0;
    for (int64_t column = call.same ? row : 0; column < call.m; column += PANEL) {
      const bool diagonal = call.same && column < row + BLOCK;
      add_sums<P>(call, at, row, end, column, memory.get(), diagonal ? nullptr : columns);
      if (++panels % FLUSH == 0) flush();
    }
    flush();
  }
}

inline void sums(const Pairs& call, int64_t problem, int64_t first, int64_t last, double* rows, float* columns) {
  (call.p == 2 ? sum_band<2> : sum_band<1>)(call, problem, first, last, rows, columns);
}

// V vectors of the sums of 6 rows of weights [PANEL] times points y_j (P = 2), or times x_i - y_j (P = 1).
template <int P, int64_t V>
ALWAYS_INLINE void pull(const float* weights, const float* x, const float* y, int64_t stride, float* to) {
  Floats sum[HEIGHT][V];
  for (int64_t i = 0; i < HEIGHT; ++i) {
    for (int64_t v = 0; v < V; ++v) sum[i][v] = load(to + i * stride + v * LANES);
  }
  for (int64_t j = 0; j < PANEL; ++j) {
    Floats point[V];
    for (int64_t v = 0; v < V; ++v) point[v] = load(y + j * stride + v * LANES);
    for (int64_t i = 0; i < HEIGHT; ++i) {
      for (int64_t v = 0; v < V; ++v) {
        const Floats factor = P == 2 ? point[v] : load(x + i * stride + v * LANES) - point[v];
        sum[i][v] += weights[i * PANEL + j] * factor;
      }
    }
  }
  for (int64_t i = 0; i < HEIGHT; ++i) {
    for (int64_t v = 0; v < V; ++v) store(to + i * stride + v * LANES, sum[i][v]);
  }
}

// Adds a block of rows and a panel to the totals of w_ij (a vector for each row) and to the sums of `pull`.
template <int P>
inline void add_pulls(const Pairs& call, const Pointers& at, int64_t row, int64_t end, int64_t column, float* totals,
                      float* pulls) {
  for (int64_t i = row; i < end; i += HEIGHT) {
    alignas(64) float weights[HEIGHT * PANEL];
    bool some = false;
    for (int64_t part = 0; part < PANEL; part += WIDTH) {
      Tile tile, costs;
      multiply<P>(at.x + i * call.stride, call.stride, at.panels + column * call.dim + part, call.dim, tile);
      const bool alive = exponents<P>(at.r + i, at.s + column + part, at.scale, tile, &costs);
      some |= alive;
      for (int64_t k = 0; k < HEIGHT; ++k) {
        float* to = totals + (i - row + k) * LANES;
        Floats sum = load(to);
        for (int64_t v = 0; v < VECTORS; ++v) {
          Floats weight{};
          if (alive) {
            weight = exp2_any(tile[k][v]) * load(at.b + column + part + v * LANES);
            if constexpr (P == 1) {
              weight = where(less(costs[k][v], Floats{} + NEAREST_DISTANCE), Floats{}, weight / costs[k][v]);
            }
            sum += weight;
          }
          store(weights + k * PANEL + part + v * LANES, weight);
        }
        store(to, sum);
      }
    }
    if (!some) continue;
    int64_t d = 0;
    const float *x = at.x + i * call.stride, *y = at.y + column * call.stride;
    float* to = pulls + (i - row) * call.stride;
    for (; d + WIDTH <= call.stride; d += WIDTH) pull<P, VECTORS>(weights, x + d, y + d, call.stride, to + d);
    for (; d < call.stride; d += LANES) pull<P, 1>(weights, x + d, y + d, call.stride, to + d);
  }
}

// For a block of rows, with w_ij = b_j K_ij: sum_j w_ij [n] and sum_j w_ij y_j [n, dim] for p = 2; for p = 1 that
// divided by |x_i - y_j|, and sum_j w_ij (x_i - y_j), of which nothing cancels where points are near.
template <int P>
inline void pull_block(const Pairs& call, int64_t problem, int64_t row, double* totals, double* pulls) {
  const Pointers at(call, problem);
  const int64_t end = std::min(row + BLOCK, call.n), numbers = BLOCK * (LANES + call.stride);
  const Scratch memory = scratch(numbers);
  float* partial = memory.get() + BLOCK * LANES;
  const auto flush = [&] {
    for (int64_t i = row; i < end; ++i) {
      totals[i] += total(load(memory.get() + (i - row) * LANES));
      for (int64_t d = 0; d < call.dim; ++d) pulls[i * call.dim + d] += partial[(i - row) * call.stride + d];
    }
    std::fill_n(memory.get(), numbers, 0.0f);
  };
  std::fill(totals + row, totals + end, 0.0);
  std::fill(pulls + row * call.dim, pulls + end * call.dim, 0.0);
  int64_t panels = 0;
  for (int64_t column = 0; column < call.m; column += PANEL) {
    add_pulls<P>(call, at, row, end, column, memory.get(), partial);
    if (++panels % FLUSH == 0) flush();
  }
  flush();
}

inline void slopes(const Pairs& call, int64_t problem, int64_t row, double* totals, double* pulls) {
  (call.p == 2 ? pull_block<2> : pull_block<1>)(call, problem, row, totals, pulls);
}

}  // namespace slotkernels::LEVEL
