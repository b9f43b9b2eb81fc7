// Updates of a transport plan's potentials over a chunk of rows, for one level of x86-64 (see levels.h).
//
// In the absorbed form, an update of rows and the next one of columns read the matrix from memory once. A few rows at a
// time are multiplied with the factors of the columns; while they are in the L1 cache, they are multiplied with their
// own factors and added to the sums of the columns. Floor: one read of the matrix an iteration, from the cache that it
// fits.

#include "simd.h"

#include "products.h"
#include "transport_plan.h"

namespace slotkernels::LEVEL {

typedef double Doubles __attribute__((vector_size(4 * LANES)));

template <class T>
struct Lanes {
  typedef Floats Vector;
  static constexpr int64_t COUNT = LANES;
};
template <>
struct Lanes<double> {
  typedef Doubles Vector;
  static constexpr int64_t COUNT = LANES / 2;
};

ALWAYS_INLINE Doubles load(const double* from) {
  Doubles value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

ALWAYS_INLINE void store(double* to, Doubles value) { std::memcpy(to, &value, sizeof(value)); }

ALWAYS_INLINE Doubles maximum(Doubles a, Doubles b) { return b < a ? a : b; }

ALWAYS_INLINE Doubles exp2_any(Doubles t) {
  Doubles result = t;
  for (int64_t l = 0; l < Lanes<double>::COUNT; ++l) result[l] = std::exp2(t[l]);
  return result;
}

ALWAYS_INLINE Doubles exp2_nonpositive(Doubles t) { return exp2_any(t); }

template <class V>
ALWAYS_INLINE V equals_zero(V value, V yes, V no) {
  return value == V{} ? yes : no;
}

// The sum of all lanes.
template <class T>
ALWAYS_INLINE T total(const T* lanes) {
  T sum = 0;
  for (int64_t l = 0; l < Lanes<T>::COUNT; ++l) sum += lanes[l];
  return sum;
}

template <class T>
ALWAYS_INLINE T total(typename Lanes<T>::Vector value) {
  T lanes[Lanes<T>::COUNT];
  store(lanes, value);
  return total<T>(lanes);
}

template <class T>
ALWAYS_INLINE T largest(typename Lanes<T>::Vector value) {
  T lanes[Lanes<T>::COUNT], top = -INFINITY;
  store(lanes, value);
  for (T lane : lanes) top = lane > top ? lane : top;
  return top;
}

// Calls use(pointer to the costs, with their type).
template <class T, class Use>
ALWAYS_INLINE void with_costs(const Transport<T>& call, Use use) {
  if constexpr (std::is_same_v<T, double>) {
    use(static_cast<const double*>(call.cost.data));
  } else {
    with_format(call.cost.format, call.cost.data, use);
  }
}

// Calls use(column, costs) for each vector of a row of costs, padded with infinity. Costs are scaled where a potential
// is added, with one rounding, as in the backward pass, so that its matrix belongs to these potentials.
template <class T, class S, class Use>
ALWAYS_INLINE void for_costs(const Transport<T>& call, const S* costs, int64_t row, Use use) {
  constexpr int64_t COUNT = Lanes<T>::COUNT;
  const S* from = costs + row * call.m;
  int64_t j = 0;
  for (; j + COUNT <= call.m; j += COUNT) use(j, load(from + j));
  if (j < call.m) {
    S part[COUNT] = {};
    T padded[COUNT];
    std::memcpy(part, from + j, (call.m - j) * sizeof(S));
    store(padded, load(part));
    for (int64_t l = call.m - j; l < COUNT; ++l) padded[l] = INFINITY;
    use(j, load(padded));
  }
}

// Sums of the columns of 2^(row_logs - scale C) over the chunk's rows, relative to their largest terms. Returns whether
// all costs are numbers above -infinity.
template <class T>
inline bool add_log_columns(const Transport<T>& call, int64_t chunk) {
  typedef typename Lanes<T>::Vector V;
  T *sums = call.partial + chunk * call.stride, *tops = call.highest + chunk * call.stride;
  const int64_t first = chunk * CHUNK, end = std::min(call.n, first + CHUNK);
  std::fill_n(sums, call.stride, T{0});
  std::fill_n(tops, call.stride, -std::numeric_limits<T>::infinity());
  V valid = V{} + 1;
  with_costs<T>(call, [&](auto costs) {
    for (int64_t i = first; i < end; ++i) {
      const T log = call.row_logs[i];
      for_costs<T>(call, costs, i, [&](int64_t j, V cost) {
        valid = V{} - INFINITY < cost ? valid : V{};
        store(tops + j, maximum(log - cost * call.scale, load(tops + j)));
      });
    }
    for (int64_t i = first; i < end; ++i) {
      const T log = call.row_logs[i];
      for_costs<T>(call, costs, i, [&](int64_t j, V cost) {
        const V top = load(tops + j), base = V{} - INFINITY < top ? top : V{};
        store(sums + j, load(sums + j) + exp2_nonpositive((log - cost * call.scale) - base));
      });
    }
  });
  return total<T>(valid) == Lanes<T>::COUNT;
}

// Computes the potentials of the chunk's rows in the log domain, from `column_logs`; then the matrix at these
// potentials and at g0, the factors of the rows, and the next sums of the columns.
template <class T>
inline void absorb_rows(const Transport<T>& call, int64_t chunk) {
  typedef typename Lanes<T>::Vector V;
  T* sums = call.partial + chunk * call.stride;
  const int64_t first = chunk * CHUNK, end = std::min(call.n, first + CHUNK);
  std::fill_n(sums, call.stride, T{0});
  with_costs<T>(call, [&](auto costs) {
    for (int64_t i = first; i < end; ++i) {
      V highest = V{} - INFINITY, terms = V{};
      for_costs<T>(call, costs, i, [&](int64_t j, V cost) {
        highest = maximum(load(call.column_logs + j) - cost * call.scale, highest);
      });
      const T top = largest<T>(highest);
      const bool lone = top == -INFINITY;
      if (!lone) {
        for_costs<T>(call, costs, i, [&](int64_t j, V cost) {
          terms += exp2_nonpositive((load(call.column_logs + j) - cost * call.scale) - top);
        });
      }
      const double f = lone ? 0 : -(top + std::log2(static_cast<double>(total<T>(terms))));
      const T f0 = static_cast<T>(f), u = static_cast<T>(call.a[i] * std::exp2(f - static_cast<double>(f0)));
      call.f[i] = f;
      call.f0[i] = f0;
      call.lone_rows[i] = lone;
      call.row_sums[i] = static_cast<T>(std::exp2(f0 - f));
      call.u[i] = u;
      T* row = call.matrix + i * call.stride;
      for_costs<T>(call, costs, i, [&](int64_t j, V cost) {
        const V power = exp2_any((load(call.g0 + j) - cost * call.scale) + f0);
        store(row + j, power);
        store(sums + j, load(sums + j) + u * power);
      });
    }
  });
}

// The products of R rows with the factors of the columns, summed over the columns: a vector of R numbers.
template <class T, int64_t R>
ALWAYS_INLINE void multiply_rows(const Transport<T>& call, const T* const (&rows)[R], T* products) {
  typedef typename Lanes<T>::Vector V;
  V lanes[R] = {};
  for (int64_t j = 0; j < call.stride; j += Lanes<T>::COUNT) {
    const V factor = load(call.v + j);
    for (int64_t r = 0; r < R; ++r) lanes[r] += load(rows[r] + j) * factor;
  }
  if constexpr (std::is_same_v<T, float> && R % LANES == 0) {
    for (int64_t r = 0; r < R; r += LANES) store(products + r, sums(lanes + r));
  } else {
    for (int64_t r = 0; r < R; ++r) products[r] = total<T>(lanes[r]);
  }
}

// Computes the factors of the chunk's rows from those of the columns, and the next sums of the columns. Returns whether
// all sums of rows are in range.
template <class T>
inline bool scale_rows(const Transport<T>& call, int64_t chunk) {
  typedef typename Lanes<T>::Vector V;
  constexpr int64_t COUNT = Lanes<T>::COUNT, R = std::max<int64_t>(8, COUNT);
  T* sums = call.partial + chunk * call.stride;
  const int64_t first = chunk * CHUNK, end = std::min(call.n, first + CHUNK);
  std::fill_n(sums, call.stride, T{0});
  V near = V{} + 1;
  for (int64_t i = first; i < end; i += R) {
    const T* rows[R];
    for (int64_t r = 0; r < R; ++r) rows[r] = call.matrix + std::min(i + r, end - 1) * call.stride;
    multiply_rows<T, R>(call, rows, call.row_sums + i);
    for (int64_t r = 0; r < R; r += COUNT) {
      const V sum = load(call.row_sums + i + r) + load(call.lone_rows + i + r);
      near = sum >= V{} + static_cast<T>(SMALLEST_SUM) ? near : V{};
      near = sum <= V{} + static_cast<T>(LARGEST_SUM) ? near : V{};
      store(call.row_sums + i + r, sum);
      store(call.u + i + r, load(call.a + i + r) / sum);
    }
    T factors[R];
    std::memcpy(factors, call.u + i, sizeof(factors));
    for (int64_t j = 0; j < call.stride; j += COUNT) {
      V sum = load(sums + j);
      for (int64_t r = 0; r < R; ++r) sum += factors[r] * load(rows[r] + j);
      store(sums + j, sum);
    }
  }
  return total<T>(near) == COUNT;
}

// Sums of the columns over all chunks. Returns whether they are in range.
template <class T>
inline bool add_columns(const Transport<T>& call) {
  typedef typename Lanes<T>::Vector V;
  constexpr int64_t COUNT = Lanes<T>::COUNT;
  const int64_t chunks = (call.n + CHUNK - 1) / CHUNK;
  V near = V{} + 1;
  for (int64_t j = 0; j < call.stride; j += COUNT) {
    V sum = load(call.lone_columns + j);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(call.partial + chunk * call.stride + j);
    near = sum >= V{} + static_cast<T>(SMALLEST_SUM) ? near : V{};
    near = sum <= V{} + static_cast<T>(LARGEST_SUM) ? near : V{};
    store(call.next_sums + j, sum);
  }
  return total<T>(near) == COUNT;
}

// Factors of the columns from their sums.
template <class T>
inline void scale_columns(const Transport<T>& call) {
  for (int64_t j = 0; j < call.stride; j += Lanes<T>::COUNT) store(call.v + j, load(call.b + j) / load(call.sums + j));
}

// potentials = start - log2(sums), of positive normal numbers; a float's exponent is subtracted in float64.
template <class T>
inline void potentials_of(const T* sums, const T* start, int64_t count, double* potentials) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < count; ++i) potentials[i] = start[i] - std::log2(sums[i]);
  } else {
    for_vectors(count, [&](int64_t i, int64_t present) {
      const Floats sum = load(sums + i);
      const Ints exponent = ((Ints)sum - 0x3f3504f3) >> 23;  // of sum = m 2^e with m in [sqrt(1/2), sqrt(2))
      const Floats mantissa = (Floats)((Ints)sum - (exponent << 23));
      const Floats fraction = log_positive(mantissa) * 1.44269504088896340736f;
      for (int64_t l = 0; l < present; ++l) {
        potentials[i + l] = static_cast<double>(start[i + l]) - exponent[l] - static_cast<double>(fraction[l]);
      }
    });
  }
}

// The plan's rows of a chunk [N, M], normalised by their own sums.
template <class T>
inline void write_plan(const Transport<T>& call, int64_t chunk, T* plan) {
  typedef typename Lanes<T>::Vector V;
  constexpr int64_t COUNT = Lanes<T>::COUNT;
  const int64_t first = chunk * CHUNK, end = std::min(call.n, first + CHUNK);
  for (int64_t i = first; i < end; ++i) {
    const T* row = call.matrix + i * call.stride;
    const auto term = [&](int64_t j) {  // an infinite entry of a column without weight becomes 0
      const V factor = load(call.v + j);
      return equals_zero(factor, V{}, factor * load(row + j));
    };
    V lanes = V{};
    for (int64_t j = 0; j < call.stride; j += COUNT) lanes += term(j);
    const T sum = total<T>(lanes), factor = sum == 0 ? 0 : call.a[i] / sum;
    T* to = plan + i * call.m;
    int64_t j = 0;
    for (; j + COUNT <= call.m; j += COUNT) store(to + j, factor * term(j));
    if (j < call.m) {
      T part[COUNT];
      store(part, factor * term(j));
      std::memcpy(to + j, part, (call.m - j) * sizeof(T));
    }
  }
}

}  // namespace slotkernels::LEVEL
