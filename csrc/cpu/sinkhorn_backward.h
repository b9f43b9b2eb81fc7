// Gradients of the points of one problem on one thread, for one level of x86-64 (see levels.h).
//
// Reads the points, copied to padded rows, and the transport weights (`pull`); writes the gradients. Tiles of the
// result stay in registers. Floor: 2 N (N + M) D operations for N rows, and fewer where the plan is sparse.

namespace slotkernels::LEVEL {

// Gradients of one set's points: transport weights, times the gradients of the potentials, times all points.
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
    if (call.pull_x) gradient(problem, points.n, call.pull_x, call.grad_f, call.points.a, call.grad_x);
    if (call.pull_y) gradient(problem, points.m, call.pull_y, call.grad_g, call.points.b, call.grad_y);
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
      with_format(call.points.format, grad, [&](auto* to) {
        to += first * dim;
        int64_t d = 0;
        for (; d + VECTORS * LANES <= dim; d += VECTORS * LANES) {
          Floats sum[ROWS][VECTORS];
          for (int64_t i = 0; i < used_rows; ++i) {  // prefetches the lines of later stores
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

  // The points with a weight in any of these rows, with their coefficients. Most plans are sparse, as exponentials
  // underflow.
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
