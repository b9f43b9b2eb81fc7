// Entropic transport plans on CPUs, in float32 or float64, as in kernels/slotkernels/transport_plan/reference.py. Each
// thread solves some of the problems; the rows of a large problem are shared by all threads. Results are the same.
//
// A problem needs a matrix of its size while it is solved. Without a tolerance, a thread reuses the memory for its next
// problem. With a tolerance all problems stop together, so each keeps its matrix between checks: as much as the plan.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <iterator>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "scratch.h"
#include "tensors.h"
#include "transport_plan.h"

#define KERNELS "transport_plan_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

constexpr double LOG2E = 1.4426950408889634;
constexpr int64_t CHECK_EVERY = 10;     // iterations between checks of the tolerance
constexpr int64_t SHARED = 1 << 17;     // threads share the rows of a problem with at least so many entries
constexpr double SMALL_PROBLEMS = 2e5;  // least entries times iterations for a thread: about 20 µs of work

template <class T>
struct Call {
  Input cost;            // [B, N, M]
  const T *a, *b;        // [B, N], [B, M], or null: uniform
  int64_t batch, n, m;
  T scale;               // log2(e) / eps
  int64_t iterations;
  double* history;       // [iterations, B, N + M], or null
  T* plan;               // [B, N, M]
};

int64_t pad(int64_t count) { return (count + PAD - 1) / PAD * PAD; }

int64_t itemsize(Format format) { return format == Format::FLOAT ? 4 : 2; }

// Solves one problem after the other, in its own memory.
template <class T>
class Solver {
 public:
  Solver(const Call<T>& call, bool shared) : call_(call), shared_(shared), chunks_((call.n + CHUNK - 1) / CHUNK) {
    const int64_t n = pad(call.n), m = pad(call.m), each = sizeof(T) / sizeof(float);
    const int64_t numbers = n * m + std::size(OF_ROWS) * n + std::size(OF_COLUMNS) * m + 2 * chunks_ * m;
    memory_ = scratch(numbers * each + 2 * (n + 2 * m));  // and potentials in float64
    T* next = reinterpret_cast<T*>(memory_.get());
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    p_.n = call.n, p_.m = call.m, p_.stride = m, p_.scale = call.scale;
    p_.matrix = take(n * m);
    for (const auto vector : OF_ROWS) p_.*vector = take(n);
    for (const auto vector : OF_COLUMNS) p_.*vector = take(m);
    p_.partial = take(chunks_ * m), p_.highest = take(chunks_ * m);
    double* doubles = reinterpret_cast<double*>(next);
    p_.f = doubles, p_.g = p_.f + n, p_.next_g = p_.g + m;
  }

  // Go to a problem, at potentials of zero.
  void start(int64_t problem) {
    problem_ = problem;
    const int64_t entry = std::is_same_v<T, double> ? 8 : itemsize(call_.cost.format);
    const char* costs = static_cast<const char*>(call_.cost.data) + problem * call_.n * call_.m * entry;
    p_.cost = {costs, call_.cost.format};
    valid_ = take_weights(call_.a, call_.n, p_.a) && take_weights(call_.b, call_.m, p_.b);
    absorbed_ = pending_ = false;
    std::fill_n(p_.f, call_.n, 0.0);
    std::fill_n(p_.g, call_.m, 0.0);
    std::fill(p_.lone_rows + call_.n, p_.lone_rows + pad(call_.n), T{1});
    std::fill(p_.lone_columns + call_.m, p_.lone_columns + p_.stride, T{1});
  }

  void iterate(int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end && valid_; ++k) {
      update_columns();
      update_rows();
      if (call_.history && valid_) keep(k);
    }
    if (call_.history && !valid_) {
      for (int64_t k = begin; k < end; ++k) std::fill_n(history(k), call_.n + call_.m, NAN);
    }
  }

  // sum_j |sum_i P_ij - b_j|. Column j sums to b_j times 2^(its potential - the next one).
  double column_error() {
    if (!valid_) return NAN;
    take_column_potentials(p_.sums, p_.g);
    next_columns();
    if (next_absorbed_) take_column_potentials(p_.next_sums, p_.next_g);
    pending_ = true;
    double error = 0;
    for (int64_t j = 0; j < call_.m; ++j) error += p_.b[j] * std::abs(std::exp2(p_.g[j] - p_.next_g[j]) - 1);
    return error;
  }

  void write() {
    T* plan = call_.plan + problem_ * call_.n * call_.m;
    if (!valid_) {
      std::fill_n(plan, call_.n * call_.m, std::numeric_limits<T>::quiet_NaN());
      return;
    }
    const auto kernel = BEST_LEVEL(write_plan<T>);
    for_chunks([&](int64_t chunk) {
      kernel(p_, chunk, plan);
      return true;
    });
  }

 private:
  typedef Transport<T> P;
  static constexpr T* P::* OF_ROWS[] = {&P::a, &P::u, &P::row_sums, &P::lone_rows, &P::row_logs, &P::f0};
  static constexpr T* P::* OF_COLUMNS[] = {&P::b,           &P::v,          &P::sums, &P::next_sums,
                                           &P::lone_columns, &P::column_logs, &P::g0};

  // Whether do_one is true for all chunks.
  template <class Do>
  bool for_chunks(Do do_one) {
    if (!shared_) {
      bool all = true;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) all &= do_one(chunk);
      return all;
    }
    std::vector<char> done(chunks_);
    torch::stable::parallel_for(0, chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) done[chunk] = do_one(chunk);
    });
    return std::find(done.begin(), done.end(), 0) == done.end();
  }

  // Copy weights; whether they are numbers >= 0.
  bool take_weights(const T* weights, int64_t count, T* to) {
    bool valid = true;
    for (int64_t i = 0; i < count; ++i) {
      to[i] = weights ? weights[problem_ * count + i] : static_cast<T>(1.0 / count);
      valid &= to[i] >= 0 && to[i] < std::numeric_limits<T>::infinity();
    }
    return valid;
  }

  void take_column_potentials(const T* sums, double* to) { potentials(sums, p_.g0, call_.m, to); }

  void potentials(const T* sums, const T* start, int64_t count, double* to) {
    BEST_LEVEL(potentials_of<T>)(sums, start, count, to);
  }

  // The potentials of the columns from those of the rows: `next_sums` relative to g0, or `next_g`.
  void next_columns() {
    next_absorbed_ = absorbed_ && BEST_LEVEL(add_columns<T>)(p_);
    if (next_absorbed_) return;
    if (absorbed_) potentials(p_.row_sums, p_.f0, call_.n, p_.f);
    for (int64_t i = 0; i < call_.n; ++i) p_.row_logs[i] = std::log2(static_cast<double>(p_.a[i])) + p_.f[i];
    const auto kernel = BEST_LEVEL(add_log_columns<T>);
    valid_ = for_chunks([&](int64_t chunk) { return kernel(p_, chunk); });
    for (int64_t j = 0; j < call_.m; ++j) {
      double top = -INFINITY, sum = 0;
      for (int64_t i = j; i < chunks_ * p_.stride; i += p_.stride) top = std::max<double>(top, p_.highest[i]);
      p_.lone_columns[j] = top == -INFINITY;
      for (int64_t i = j; i < chunks_ * p_.stride && top > -INFINITY; i += p_.stride) {
        sum += p_.partial[i] * std::exp2(p_.highest[i] - top);
      }
      p_.next_g[j] = top == -INFINITY ? 0 : -(top + std::log2(sum));
    }
  }

  void update_columns() {
    if (!pending_) next_columns();
    pending_ = false;
    if (next_absorbed_) {
      std::swap(p_.sums, p_.next_sums);
      BEST_LEVEL(scale_columns<T>)(p_);
    } else {
      std::swap(p_.g, p_.next_g);
      absorbed_ = false;
    }
  }

  void update_rows() {
    if (absorbed_) {
      const auto kernel = BEST_LEVEL(scale_rows<T>);
      if (for_chunks([&](int64_t chunk) { return kernel(p_, chunk); })) return;
      take_column_potentials(p_.sums, p_.g);
    }
    for (int64_t j = 0; j < call_.m; ++j) {
      p_.column_logs[j] = std::log2(static_cast<double>(p_.b[j])) + p_.g[j];
      p_.g0[j] = p_.g[j];
      p_.sums[j] = std::exp2(p_.g0[j] - p_.g[j]);
      p_.v[j] = p_.b[j] / p_.sums[j];
    }
    const auto kernel = BEST_LEVEL(absorb_rows<T>);
    for_chunks([&](int64_t chunk) {
      kernel(p_, chunk);
      return true;
    });
    absorbed_ = true;
  }

  double* history(int64_t k) { return call_.history + (k * call_.batch + problem_) * (call_.n + call_.m); }

  void keep(int64_t k) {
    potentials(p_.row_sums, p_.f0, call_.n, history(k));
    potentials(p_.sums, p_.g0, call_.m, history(k) + call_.n);
  }

  const Call<T>& call_;
  const bool shared_;
  const int64_t chunks_;
  Scratch memory_;
  Transport<T> p_;
  int64_t problem_ = 0;
  bool valid_ = true;          // no NaN, no cost of -infinity, no weight below 0
  bool absorbed_ = false;      // the matrix, sums and factors belong to the present potentials
  bool pending_ = false;       // the next update of the columns is there already
  bool next_absorbed_ = false; // as sums relative to g0
};

// do_range(begin, end) of the problems, on one thread each or, if the rows are shared, on one.
template <class Do>
void for_problems(int64_t batch, bool shared, int64_t grain, Do do_range) {
  if (shared) return do_range(0, batch);
  torch::stable::parallel_for(0, batch, grain, do_range);
}

template <class T>
std::pair<int64_t, double> solve(const Call<T>& call, std::optional<double> tolerance) {
  const int64_t entries = call.n * call.m;
  const bool shared = entries >= SHARED && call.batch < torch::stable::get_num_threads();
  const int64_t grain = 1 + static_cast<int64_t>(SMALL_PROBLEMS / static_cast<double>(entries * call.iterations));
  if (!tolerance) {
    for_problems(call.batch, shared, grain, [&](int64_t begin, int64_t end) {
      Solver<T> solver(call, shared);
      for (int64_t problem = begin; problem < end; ++problem) {
        solver.start(problem);
        solver.iterate(0, call.iterations);
        solver.write();
      }
    });
    return {call.iterations, 0.0};
  }
  std::vector<std::unique_ptr<Solver<T>>> solvers(call.batch);
  std::vector<double> errors(call.batch);
  int64_t made = 0;
  double error = INFINITY;
  while (made < call.iterations && !(error <= *tolerance)) {
    const int64_t until = std::min(call.iterations, made + CHECK_EVERY);
    for_problems(call.batch, shared, grain, [&](int64_t begin, int64_t end) {
      for (int64_t problem = begin; problem < end; ++problem) {
        if (made == 0) {
          solvers[problem] = std::make_unique<Solver<T>>(call, shared);
          solvers[problem]->start(problem);
        }
        solvers[problem]->iterate(made, until);
        errors[problem] = solvers[problem]->column_error();
      }
    });
    made = until;
    error = 0;
    for (double one : errors) error = one <= error ? error : one;  // NaN is the largest
    for (double one : errors) error = std::isnan(one) ? one : error;
  }
  for_problems(call.batch, shared, grain, [&](int64_t begin, int64_t end) {
    for (int64_t problem = begin; problem < end; ++problem) solvers[problem]->write();
  });
  return {made, error};
}

Maybe contiguous(const Maybe& tensor, ScalarType dtype) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(torch::stable::to(*tensor, dtype));
}

// The plan, the potentials after each iteration made, how many were made, and with a tolerance the error of the
// columns.
std::tuple<Tensor, Tensor, Tensor, Tensor> transport_plan(const Tensor& cost_, const Maybe& a_, const Maybe& b_,
                                                          double eps, int64_t iterations,
                                                          std::optional<double> tolerance, bool keep) {
  const Tensor cost = torch::stable::contiguous(cost_);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const bool is_double = cost.scalar_type() == ScalarType::Double;
  const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
  const Maybe a = contiguous(a_, dtype), b = contiguous(b_, dtype);
  Tensor plan = empty({batch, n, m}, dtype), history = empty({keep ? iterations : 0, batch, n + m}, ScalarType::Double);
  double* kept = keep ? history.mutable_data_ptr<double>() : nullptr;
  const auto solve_with = [&](auto zero) {
    typedef decltype(zero) T;
    const Input costs = is_double ? Input{cost.const_data_ptr(), Format::FLOAT} : input(cost);
    const auto weights = [](const Maybe& tensor) { return tensor ? tensor->const_data_ptr<T>() : nullptr; };
    const Call<T> call{costs,      weights(a),   weights(b), batch, n, m, static_cast<T>(LOG2E / eps),
                       iterations, kept, plan.mutable_data_ptr<T>()};
    return solve(call, tolerance);
  };
  const auto [made, error] = is_double ? solve_with(0.0) : solve_with(0.0f);
  if (keep) std::fill(kept + made * batch * (n + m), kept + iterations * batch * (n + m), 0.0);
  Tensor made_of = empty({1}, ScalarType::Long), error_of = empty({1}, ScalarType::Double);
  *made_of.mutable_data_ptr<int64_t>() = made;
  *error_of.mutable_data_ptr<double>() = error;
  return {plan, history, made_of, error_of};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("transport_plan", TORCH_BOX(&slotkernels::transport_plan));
}
