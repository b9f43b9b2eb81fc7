// Arguments of the Sinkhorn kernels: all problems of a batch, as plain pointers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "format.h"
#include "scratch.h"

namespace slotkernels {

struct Points {
  const void *x, *y;  // [B, n, dim] and [B, m, dim]
  Format format;
  int64_t n, m, dim;
  const float *a, *b;  // weights [B, n] and [B, m], or null: uniform
};

// Temperatures d^p, d^p, (d s)^p, …, blur^p of a diameter d and a scaling s: epsilon_schedule in reference.py.
struct Schedule {
  double start, step, last;
  int64_t length = 2;

  Schedule(double diameter, int p, double blur, double scaling)
      : start(p * std::log(diameter)), step(p * std::log(scaling)), last(std::pow(blur, p)) {
    if (std::isfinite(diameter)) {
      length += std::max(0.0, std::ceil((p * std::log(blur) - start) / step));
    } else {
      start = std::numeric_limits<double>::quiet_NaN();  // all later steps stay NaN
    }
  }

  double at(int64_t i) const {
    return i == 0 ? std::exp(start) : i + 1 < length ? std::exp(start + (i - 1) * step) : last;
  }
};

// Unbalanced transport: the cost of a plan has an additional term, rho times the divergence of its marginals from the
// weights. Balanced transport has an infinite rho. unbalanced.py has the formulas. Here they use the last softmin of a
// point before damping: softmin / (rho + eps) equals potential / rho, and is accurate for the smallest rho too.
struct Penalty {
  static constexpr double LARGEST_EXPONENT = 60;  // as in unbalanced.py

  double rho, eps;  // eps: of the last step
  bool terms;       // the results are the terms of the value instead of potentials

  Penalty(double rho, double eps, bool terms) : rho(rho), eps(eps), terms(terms && std::isfinite(rho)) {}

  double damping(double eps) const { return 1 / (1 + eps / rho); }

  // A point's potential or term, from its softmins over the other set and over its own (0 without debiasing).
  double difference(double other, double own) const {
    if (!terms) return damping(eps) * (other - own);
    // The larger exponential is factored out: for a large rho, rho times their difference would lose all digits.
    const double a = exponent(other), b = exponent(own);
    return (rho + eps / 2) * std::exp(std::max(a, b)) * std::copysign(std::expm1(-std::abs(a - b)), b - a);
  }

  // The derivative of `difference` with respect to the softmin over the other set; minus that over its own set.
  double slope(double softmin) const {
    return terms ? (rho + eps / 2) / (rho + eps) * std::exp(exponent(softmin)) : damping(eps);
  }

 private:
  double exponent(double softmin) const {  // NaN for NaN
    const double exact = -softmin / (rho + eps);
    return exact > LARGEST_EXPONENT ? LARGEST_EXPONENT : exact;
  }
};

struct Forward {
  Points points;
  int p;
  double blur, scaling, diameter;  // the diameter is computed from each problem's points if `per_problem`
  Penalty penalty;
  bool per_problem, debias;
  float *value, *f, *g;
  float *pull_x, *pull_y;  // transport weights; null where the gradient is not needed
};

struct Backward {
  Points points;
  const float *grad_value, *grad_f, *grad_g;  // each may be null
  const float *pull_x, *pull_y;
  void *grad_x, *grad_y;  // in the points' format; null where pull_x or pull_y is
};

// Bounding box of points: dim floats each. `finite` is false once any of them is not.
struct Box {
  float *low, *high;
  bool finite;

  double diagonal(int64_t dim) const {
    double squared = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double side = static_cast<double>(high[d]) - low[d];
      squared += side * side;
    }
    return finite ? std::sqrt(squared) : std::numeric_limits<double>::quiet_NaN();
  }
};

}  // namespace slotkernels
