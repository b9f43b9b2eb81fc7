// Sinkhorn divergences of a range of problems on one thread, for one level of x86-64 (see levels.h).
//
// Reads the points of a problem twice (the second time from the cache), writes values, potentials and the rows that pull
// on the points. Everything else lives in a scratch of one problem: the points, centred and padded, and one symmetric
// matrix with the costs between all of them. Both potentials of a set are updated at once, 16 or 32 points in the lanes,
// one after another the points that they read. The floor: (N + M)^2 D operations for the costs, of which the upper
// triangle is computed, and two passes over the costs a step, with an exponential an entry in the second.

#include "products.h"
#include "sinkhorn.h"

namespace slotkernels::LEVEL {

constexpr float NEAREST = 1e-8f;        // squared distance below which the cost |x - y| is flat (p = 1)
constexpr float NEAREST_DISTANCE = 1.000001e-4f;
constexpr double SHORTEST_RATIO = 1e-3;  // of the diameter to the blur, as in reference.py
constexpr double LONGEST_RATIO = 1e8;
constexpr float NO_WEIGHT = -100000;      // the logarithm of zero, as in GeomLoss
constexpr float LOG2E = 1.44269504088896340736f;

template <class Use>
ALWAYS_INLINE void with_format(Format format, const void* points, Use use) {
  switch (format) {
    case Format::FLOAT: return use(static_cast<const float*>(points));
    case Format::BFLOAT: return use(static_cast<const Bfloat*>(points));
    case Format::HALF: return use(static_cast<const Half*>(points));
  }
}

// Adds R rows to the sum, and to the box if there is one.
template <int64_t R, class T>
ALWAYS_INLINE void scan_rows(const T* rows, int64_t dim, float* sum, const Box* box) {
  for_vectors(dim, [&](int64_t d, int64_t count) {
    Floats row[R];
    for (int64_t r = 0; r < R; ++r) {
      row[r] = load_part(rows + r * dim + d, count);
      __builtin_prefetch(rows + r * dim + d + 4096, 0, 2);
    }
    Floats total = load(sum + d);
    for (int64_t r = 0; r < R; ++r) total += row[r];
    store(sum + d, total);
    if (!box) return;
    Floats low = load(box->low + d), high = load(box->high + d);
    for (int64_t r = 0; r < R; ++r) {
      low = where(less(row[r], low), row[r], low);
      high = maximum(row[r], high);
    }
    store(box->low + d, low);
    store(box->high + d, high);
  });
}

// Sum of all points of a problem, and their bounding box.
inline void scan(const Points& points, int64_t problem, float* sum, Box* box) {
  const int64_t dim = points.dim;
  std::fill_n(sum, padded(dim), 0.0f);
  const auto add = [&](const void* set, int64_t count) {
    with_format(points.format, set, [&](auto* from) {
      from += problem * count * dim;
      int64_t row = 0;
      for (; row + 4 <= count; row += 4) scan_rows<4>(from + row * dim, dim, sum, box);
      for (; row < count; ++row) scan_rows<1>(from + row * dim, dim, sum, box);
    });
  };
  add(points.x, points.n);
  add(points.y, points.m);
  // A comparison drops a NaN, a sum does not.
  for (int64_t d = 0; box && d < dim; ++d) box->finite &= std::isfinite(sum[d]);
}

inline void clear(Box& box, int64_t dim) {
  std::fill_n(box.low, padded(dim), std::numeric_limits<float>::infinity());
  std::fill_n(box.high, padded(dim), -std::numeric_limits<float>::infinity());
  box.finite = true;
}

// Grows the box by the problems [begin, end).
inline void bound(const Points& points, int64_t begin, int64_t end, Box& box) {
  const Scratch sum = scratch(padded(points.dim));
  clear(box, points.dim);
  for (int64_t problem = begin; problem < end; ++problem) scan(points, problem, sum.get(), &box);
}

// Copies a set's points to float32 rows, less `centre`.
inline void pack(const Points& points, const void* set, int64_t first_row, int64_t count, const float* centre,
                 float* rows, int64_t stride) {
  with_format(points.format, set, [&](auto* from) {
    from += first_row * points.dim;
    for (int64_t row = 0; row < count; ++row) {
      for_vectors(points.dim, [&](int64_t d, int64_t width) {
        __builtin_prefetch(from + row * points.dim + d + 4096, 0, 2);
        store(rows + row * stride + d, load_part(from + row * points.dim + d, width) - load(centre + d));
      });
    }
  });
}

// A set's place among the rows and columns of the costs.
struct Set {
  int64_t first, count;
};

// A potential on all points: what their softmin reads, and what the last one found.
struct Potential {
  float *value, *shifted;  // `shifted`: plus the temperature times the log-weight
  float *highest, *sum;    // of the logarithm's argument, in the unit of the costs
};

class Problem {
 public:
  explicit Problem(const Forward& call)
      : call(call),
        x{0, call.points.n},
        y{padded(call.points.n), call.points.m},
        width(padded(x.count) + padded(y.count)),
        // Odd numbers of cache lines: the rows of a column fall into different sets of the cache.
        cost_stride(width | LANES),
        point_stride(padded(call.points.dim) | LANES),
        memory(scratch(width * (cost_stride + point_stride + 10) + 3 * point_stride)) {
    float* next = memory.get();
    const auto take = [&](int64_t floats) { return std::exchange(next, next + floats); };
    costs = take(width * cost_stride);
    points = take(width * point_stride);
    centre = take(point_stride);
    box = {take(point_stride), take(point_stride), true};
    logs = take(width);
    halves = take(width);
    for (Potential* potential : {&cross, &own}) {
      *potential = {take(width), take(width), take(width), take(width)};
    }
  }

  void solve(int64_t problem) {
    load_points(problem);
    compute_costs();
    load_weights(problem);
    anneal();
    write(problem);
    if (call.pull_x) write_pulls(x, call.pull_x + problem * x.count * (x.count + y.count));
    if (call.pull_y) write_pulls(y, call.pull_y + problem * y.count * (x.count + y.count));
  }

 private:
  const Forward& call;
  Set x, y;
  int64_t width, cost_stride, point_stride;
  Scratch memory;
  float *costs, *points, *centre, *logs, *halves;
  Box box;
  double diameter;
  Potential cross, own;  // of the problems x→y and y→x; of x→x and y→y

  void load_points(int64_t problem) {
    const Points& from = call.points;
    clear(box, from.dim);
    scan(from, problem, centre, call.per_problem ? &box : nullptr);
    diameter = call.diameter;
    if (call.per_problem) {
      diameter = box.diagonal(from.dim);
      if (diameter > LONGEST_RATIO * call.blur && std::isfinite(diameter)) diameter = LONGEST_RATIO * call.blur;
    }
    if (diameter < SHORTEST_RATIO * call.blur) diameter = SHORTEST_RATIO * call.blur;
    // Distances do not change when all points move. Around zero, |x|² - 2 x·y + |y|² cancels least.
    for (int64_t d = 0; d < from.dim; ++d) centre[d] /= x.count + y.count;
    pack(from, from.x, problem * x.count, x.count, centre, points, point_stride);
    pack(from, from.y, problem * y.count, y.count, centre, points + y.first * point_stride, point_stride);
  }

  void compute_costs() {
    const int64_t dim = padded(call.points.dim);
    const auto product = [&](Set rows, Set columns, bool diagonal_only) {
      gram_block(points, point_stride, dim, rows.first, rows.count, columns.first, columns.count, diagonal_only, costs,
                 cost_stride);
    };
    product(x, x, !call.debias);
    product(x, y, false);
    product(y, y, !call.debias);
    for (int64_t i = 0; i < width; ++i) halves[i] = 0.5f * costs[i * cost_stride + i];
    for (const Set& rows : {x, y}) {
      if (call.debias || rows.first == y.first) to_costs(rows, x);
      if (call.debias || rows.first == x.first) to_costs(rows, y);
    }
  }

  // Equal points have equal products, so that their cost is exactly zero.
  void to_costs(Set rows, Set columns) {
    for (int64_t i = rows.first; i < rows.first + rows.count; ++i) {
      float* row = costs + i * cost_stride;
      for (int64_t j = columns.first; j < columns.first + columns.count; j += LANES) {
        Floats cost = halves[i] + load(halves + j) - load(row + j);
        if (call.p == 1) {
          cost = 2.0f * cost;
          cost = where(less(cost, Floats{} + NEAREST), Floats{} + NEAREST, cost);
          for (int64_t lane = 0; lane < LANES; ++lane) cost[lane] = std::sqrt(cost[lane]);
        } else {
          cost = where(less(cost, Floats{}), Floats{}, cost);
        }
        store(row + j, cost);
      }
    }
  }

  void load_weights(int64_t problem) {
    const auto fill = [&](Set set, const float* weights) {
      float* log = logs + set.first;
      if (!weights) std::fill_n(log, set.count, -std::log(static_cast<float>(set.count)));
      for (int64_t i = 0; weights && i < set.count; ++i) {
        const float weight = weights[problem * set.count + i];
        log[i] = weight > 0 ? std::log(weight) : NO_WEIGHT;
      }
    };
    fill(x, call.a);
    fill(y, call.b);
  }

  // Highest and sum of V * 16 columns over some rows: the softmin is -(highest + eps log sum).
  template <int64_t V>
  ALWAYS_INLINE void reduce(Set rows, int64_t column, const float* shifted, float scale, Floats (&highest)[V],
                            Floats (&sum)[V]) const {
    const float* row = costs + rows.first * cost_stride + column;
    const float* end = row + rows.count * cost_stride;
    const float* partner = shifted + rows.first;
    for (int64_t v = 0; v < V; ++v) {
      highest[v] = *partner - load(row + v * LANES);
      sum[v] = Floats{};
    }
    for (const float* at = row; at < end; at += cost_stride, ++partner) {
      for (int64_t v = 0; v < V; ++v) highest[v] = maximum(*partner - load(at + v * LANES), highest[v]);
    }
    partner = shifted + rows.first;
    for (const float* at = row; at < end; at += cost_stride, ++partner) {
      for (int64_t v = 0; v < V; ++v) {
        sum[v] += exp2_nonpositive((*partner - load(at + v * LANES) - highest[v]) * scale);
      }
    }
  }

  // use(column, highest, sum) for all columns of a set.
  template <class Use>
  ALWAYS_INLINE void reduce_columns(Set rows, Set columns, const float* shifted, float scale, Use use) const {
    int64_t column = columns.first;
    const int64_t end = columns.first + columns.count;
    for (; column + LANES < end; column += 2 * LANES) {
      Floats highest[2], sum[2];
      reduce(rows, column, shifted, scale, highest, sum);
      use(column, highest[0], sum[0]);
      use(column + LANES, highest[1], sum[1]);
    }
    if (column < end) {
      Floats highest[1], sum[1];
      reduce(rows, column, shifted, scale, highest, sum);
      use(column, highest[0], sum[0]);
    }
  }

  // All softmins at one temperature; use(potential, column, highest, sum).
  template <class Use>
  ALWAYS_INLINE void softmins(double eps, Use use) {
    const float scale = LOG2E / eps;
    for (Potential* potential : {&cross, &own}) {
      const bool is_own = potential == &own;
      if (is_own && !call.debias) break;
      for (int64_t i = 0; i < width; i += LANES) {
        store(potential->shifted + i, load(potential->value + i) + static_cast<float>(eps) * load(logs + i));
      }
      for (const Set& columns : {x, y}) {
        const Set rows = (columns.first == x.first) == is_own ? x : y;
        reduce_columns(rows, columns, potential->shifted, scale,
                       [&](int64_t column, Floats highest, Floats sum) { use(*potential, column, highest, sum); });
      }
    }
  }

  void anneal() {
    const Schedule schedule(diameter, call.p, call.blur, call.scaling);
    std::fill_n(cross.value, width, 0.0f);
    std::fill_n(own.value, width, 0.0f);
    for (int64_t i = -1; i < schedule.length; ++i) {
      const double eps = schedule.at(std::max<int64_t>(i, 0));
      const float kept = i < 0 ? 0.0f : 0.5f, added = i < 0 ? 1.0f : 0.5f;
      softmins(eps, [&](Potential& potential, int64_t column, Floats highest, Floats sum) {
        const Floats update = -(highest + static_cast<float>(eps) * log_positive(sum));
        store(potential.value + column, kept * load(potential.value + column) + added * update);
      });
    }
    softmins(schedule.last, [&](Potential& potential, int64_t column, Floats highest, Floats sum) {
      store(potential.value + column, -(highest + static_cast<float>(schedule.last) * log_positive(sum)));
      store(potential.highest + column, highest);
      store(potential.sum + column, sum);
    });
  }

  void write(int64_t problem) {
    const auto copy = [&](Set set, float* to, const float* weights) {
      double total = 0;
      for (int64_t i = 0; i < set.count; ++i) {
        const float potential = cross.value[set.first + i] - (call.debias ? own.value[set.first + i] : 0.0f);
        to[problem * set.count + i] = potential;
        total += weights ? static_cast<double>(potential) * weights[problem * set.count + i] : potential;
      }
      return weights ? total : total / set.count;
    };
    const double value = copy(x, call.f, call.a) + copy(y, call.g, call.b);
    call.value[problem] = call.debias && value < 0 ? 0.0f : value;
  }

  // For each point of a set: the factors of all points in the gradient of its potential; see _pull in reference.py.
  void write_pulls(Set set, float* pull) const {
    const float scale = LOG2E / std::pow(call.blur, call.p);
    for (int64_t i = 0; i < set.count; ++i, pull += x.count + y.count) {
      const float* row = costs + (set.first + i) * cost_stride;
      float* to = pull;
      double total = call.p == 2 && !call.debias ? 1 : 0;  // the softmaxes' sums are 1 for p = 2
      for (const Set& other : {x, y}) {
        const bool is_own = other.first == set.first;
        const Potential& potential = is_own ? own : cross;
        if (is_own && !call.debias) {
          std::fill_n(to, other.count, 0.0f);
        } else {
          const float highest = potential.highest[set.first + i], inverse = 1 / potential.sum[set.first + i];
          for_vectors(other.count, [&](int64_t j, int64_t count) {
            const Floats cost = load(row + other.first + j);
            const Floats exponent = (load(potential.shifted + other.first + j) - cost - highest) * scale;
            Floats weight = exp2_nonpositive(exponent) * inverse;
            if (call.p == 1) {
              weight = where(less(cost, Floats{} + NEAREST_DISTANCE), Floats{}, weight / cost);
              for (int64_t lane = 0; lane < count; ++lane) total += is_own ? -weight[lane] : weight[lane];
            }
            store_part(to + j, is_own ? weight : -weight, count);
          });
        }
        to += other.count;
      }
      pull[(set.first == x.first ? 0 : x.count) + i] += total;
    }
  }
};

inline void solve(const Forward& call, int64_t begin, int64_t end) {
  Problem problem(call);
  for (int64_t i = begin; i < end; ++i) problem.solve(i);
}

// Gradients of one set's points: rows of pull, times their potentials' gradients, times all points.
class PullBack {
 public:
  explicit PullBack(const Backward& call)
      : call(call),
        count(call.points.n + call.points.m),
        stride(padded(call.points.dim) | LANES),
        memory(scratch((count + 1) * stride)),
        terms(new Term<ROWS>[count]) {}

  void solve(int64_t problem) {
    const Points& points = call.points;
    const float* zero = memory.get() + count * stride;
    pack(points, points.x, problem * points.n, points.n, zero, memory.get(), stride);
    pack(points, points.y, problem * points.m, points.m, zero, memory.get() + points.n * stride, stride);
    if (call.pull_x) gradient(problem, points.n, call.pull_x, call.grad_f, call.a, call.grad_x);
    if (call.pull_y) gradient(problem, points.m, call.pull_y, call.grad_g, call.b, call.grad_y);
  }

 private:
  const Backward& call;
  int64_t count, stride;
  Scratch memory;
  std::unique_ptr<Term<ROWS>[]> terms;

  void gradient(int64_t problem, int64_t rows, const float* pull, const float* grad_potential, const float* weights,
                void* grad) {
    const int64_t dim = call.points.dim;
    for (int64_t first = problem * rows; first < (problem + 1) * rows; first += ROWS) {
      const int64_t used_rows = std::min<int64_t>(ROWS, (problem + 1) * rows - first);
      const int64_t used = collect(problem, first, used_rows, rows, pull, grad_potential, weights);
      with_format(call.points.format, grad, [&](auto* from) {
        auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(from)>>*>(from) + first * dim;
        int64_t d = 0;
        for (; d + VECTORS * LANES <= dim; d += VECTORS * LANES) {
          Floats sum[ROWS][VECTORS];
          for (int64_t i = 0; i < used_rows; ++i) {  // the stores find their lines in the cache
            for (int64_t v = 0; v < VECTORS; ++v) __builtin_prefetch(to + i * dim + d + v * LANES, 1);
          }
          combine(terms.get(), used, d, sum);
          for (int64_t i = 0; i < used_rows; ++i) {
            for (int64_t v = 0; v < VECTORS; ++v) store(to + i * dim + d + v * LANES, sum[i][v]);
          }
        }
        for_vectors(dim - d, [&](int64_t rest, int64_t width) {
          Floats sum[ROWS][1];
          combine(terms.get(), used, d + rest, sum);
          for (int64_t i = 0; i < used_rows; ++i) store_part(to + i * dim + d + rest, sum[i][0], width);
        });
      });
    }
  }

  // The points that pull on any of these rows, with their coefficients. Most plans are sparse: exponentials underflow.
  int64_t collect(int64_t problem, int64_t first, int64_t used_rows, int64_t rows, const float* pull,
                  const float* grad_potential, const float* weights) {
    float scale[ROWS] = {};
    for (int64_t i = 0; i < used_rows; ++i) {
      const float weight = weights ? weights[first + i] : 1.0f / rows;
      scale[i] = (call.grad_value ? call.grad_value[problem] * weight : 0.0f) +
                 (grad_potential ? grad_potential[first + i] : 0.0f);
    }
    int64_t used = 0;
    for (int64_t j = 0; j < count; ++j) {
      Term<ROWS>& term = terms[used];
      bool pulls = false;
      for (int64_t i = 0; i < ROWS; ++i) {
        term.coefficients[i] = i < used_rows ? scale[i] * pull[(first + i) * count + j] : 0.0f;
        pulls |= term.coefficients[i] != 0;
      }
      term.point = memory.get() + j * stride;
      used += pulls;
    }
    return used;
  }
};

inline void pull_back(const Backward& call, int64_t begin, int64_t end) {
  PullBack problem(call);
  for (int64_t i = begin; i < end; ++i) problem.solve(i);
}

}  // namespace slotkernels::LEVEL
