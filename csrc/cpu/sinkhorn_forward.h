// The Sinkhorn divergence of one problem on one thread, for one level of x86-64 (see levels.h).
//
// Reads the points twice (the second time from the cache); writes value, potentials and transport weights (`pull`). All
// else is scratch memory of one problem: the points, centred and padded, and one symmetric matrix of the costs between
// all of them. A softmin computes one or two vectors of points at a time, and loops over the points of the other set.
// Floor: (N + M)^2 D operations for upper tiles of the costs, then one exponential for each of their entries a step.

namespace slotkernels::LEVEL {

constexpr float NEAREST = 1e-8f;                  // squared distance below which the cost |x - y| is flat (p = 1),
constexpr float NEAREST_DISTANCE = 1.000001e-4f;  // and its root, rounded up
constexpr double SHORTEST_RATIO = 1e-3;           // of the diameter to the blur, as in reference.py
constexpr double LONGEST_RATIO = 1e8;
constexpr float NO_WEIGHT = -1e30f;  // replaces the logarithm of zero, as in reference.py
constexpr float LOG2E = 1.44269504088896340736f;

// A potential on all points: the inputs of the softmin, and the results of the last one.
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
        // An odd number of cache lines, so that the entries of a column fall into different sets of the cache.
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
    const int64_t kept = scan(from, problem, centre, call.per_problem ? &box : nullptr);
    diameter = call.diameter;
    if (call.per_problem) {
      diameter = box.diagonal(from.dim);
      if (diameter > LONGEST_RATIO * call.blur) diameter = LONGEST_RATIO * call.blur;
    }
    if (diameter < SHORTEST_RATIO * call.blur) diameter = SHORTEST_RATIO * call.blur;
    // Distances do not change when all points move, and |x|² - 2 x·y + |y|² rounds least around zero.
    for (int64_t d = 0; d < from.dim; ++d) centre[d] /= std::max<int64_t>(kept, 1);
    pack(from, from.x, problem * x.count, x.count, centre, points, point_stride);
    pack(from, from.y, problem * y.count, y.count, centre, points + y.first * point_stride, point_stride);
  }

  void compute_costs() {
    const int64_t dim = padded(call.points.dim);
    const auto product = [&](Set rows, Set columns, bool diagonal_only) {
      multiply(points, point_stride, dim, rows, columns, diagonal_only, costs, cost_stride);
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
    fill(x, call.points.a);
    fill(y, call.points.b);
  }

  // Highest and sum of V vectors of columns over some rows: the softmin is -(highest + eps log sum).
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
      const float kept = i < 0 ? 0.0f : 0.5f, added = (1 - kept) * call.penalty.damping(eps);
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

  // After the last step `value` is the softmin itself, without damping.
  void write(int64_t problem) {
    const auto copy = [&](Set set, float* to, const float* weights) {
      double total = 0;
      for (int64_t i = 0; i < set.count; ++i) {
        const float potential = call.penalty.difference(cross.value[set.first + i], own.value[set.first + i]);
        to[problem * set.count + i] = potential;
        total += weights ? static_cast<double>(potential) * weights[problem * set.count + i] : potential;
      }
      return weights ? total : total / set.count;
    };
    const double value = copy(x, call.f, call.points.a) + copy(y, call.g, call.points.b);
    call.value[problem] = call.debias && value < 0 ? 0.0f : value;
  }

  // Transport weights: the factors of all points in the gradient of each potential, as in _transport_weights of
  // reference.py.
  void write_pulls(Set set, float* pull) const {
    const float scale = LOG2E / std::pow(call.blur, call.p);
    for (int64_t i = 0; i < set.count; ++i, pull += x.count + y.count) {
      const float* row = costs + (set.first + i) * cost_stride;
      float* to = pull;
      const double cross_slope = call.penalty.slope(cross.value[set.first + i]);
      const double own_slope = call.debias ? call.penalty.slope(own.value[set.first + i]) : 0;
      double total = call.p == 2 ? cross_slope - own_slope : 0;  // the softmaxes' sums are 1 for p = 2
      for (const Set& other : {x, y}) {
        const bool is_own = other.first == set.first;
        const Potential& potential = is_own ? own : cross;
        if (is_own && !call.debias) {
          std::fill_n(to, other.count, 0.0f);
        } else {
          const float highest = potential.highest[set.first + i];
          const float factor = static_cast<float>(is_own ? own_slope : cross_slope) / potential.sum[set.first + i];
          for_vectors(other.count, [&](int64_t j, int64_t count) {
            const Floats cost = load(row + other.first + j);
            const Floats exponent = (load(potential.shifted + other.first + j) - cost - highest) * scale;
            Floats weight = exp2_nonpositive(exponent) * factor;
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

}  // namespace slotkernels::LEVEL
