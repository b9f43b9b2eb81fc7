// Reading the points of problems, in float32, bfloat16 or float16: for one level of x86-64 (see levels.h).

namespace slotkernels::LEVEL {

// Elements from a load to its prefetch: rows are too short for the processor to prefetch by itself.
constexpr int64_t AHEAD = 4096;

// Adds R rows to the sum, and to the box if there is one.
template <int64_t R, class T>
ALWAYS_INLINE void scan_rows(const T* rows, int64_t dim, float* sum, const Box* box) {
  for_vectors(dim, [&](int64_t d, int64_t count) {
    Floats row[R];
    for (int64_t r = 0; r < R; ++r) {
      row[r] = load_part(rows + r * dim + d, count);
      __builtin_prefetch(rows + r * dim + d + AHEAD, 0, 2);
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

// Sum and number of the points of a problem that have weight, and their bounding box.
inline int64_t scan(const Points& points, int64_t problem, float* sum, Box* box) {
  const int64_t dim = points.dim;
  int64_t kept = 0;
  std::fill_n(sum, padded(dim), 0.0f);
  const auto add = [&](const void* set, int64_t count, const float* weights) {
    with_format(points.format, set, [&](auto* from) {
      from += problem * count * dim;
      const auto keeps = [&](int64_t row) { return !weights || weights[problem * count + row] > 0; };
      for (int64_t row = 0; row < count;) {
        if (row + 4 <= count && keeps(row) && keeps(row + 1) && keeps(row + 2) && keeps(row + 3)) {
          scan_rows<4>(from + row * dim, dim, sum, box);
          row += 4, kept += 4;
          continue;
        }
        if (keeps(row)) scan_rows<1>(from + row * dim, dim, sum, box), ++kept;
        ++row;
      }
    });
  };
  add(points.x, points.n, points.a);
  add(points.y, points.m, points.b);
  // A comparison drops a NaN, a sum does not.
  for (int64_t d = 0; box && d < dim; ++d) box->finite &= std::isfinite(sum[d]);
  return kept;
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
        __builtin_prefetch(from + row * points.dim + d + AHEAD, 0, 2);
        store(rows + row * stride + d, load_part(from + row * points.dim + d, width) - load(centre + d));
      });
    }
  });
}

}  // namespace slotkernels::LEVEL
