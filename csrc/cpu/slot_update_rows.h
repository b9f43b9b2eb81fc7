// Rows of the slot update as floats, and their layer norm: for one level of x86-64 (see levels.h).

// INLINED is for lambdas that are called for whole vectors and for parts: without it, GCC would share one body.
#undef INLINED
#define INLINED __attribute__((always_inline))

namespace slotkernels::LEVEL {

// The rows of a tensor as floats: read in place if they are floats, else converted one at a time into a buffer.
class RowReader {
 public:
  RowReader(const Input& from, int64_t width)
      : from(from), width(width), in_place(from.data && from.format == Format::FLOAT) {
    if (!in_place) own = scratch(padded(width));
  }

  const float* read(int64_t row) const {
    if (in_place) return static_cast<const float*>(from.data) + row * width;
    if (!from.data) return own.get();
    with_format(from.format, from.data, [&](auto* rows) {
      for_vectors(width, [&](int64_t i, int64_t count) INLINED {
        store(own.get() + i, load_part(rows + row * width + i, count));
      });
    });
    return own.get();
  }

 private:
  const Input from;
  const int64_t width;
  const bool in_place;
  Scratch own;
};

// The same for rows that are written: `begin` returns where to write, and `end` converts the row into the tensor.
class RowWriter {
 public:
  RowWriter(const Output& to, int64_t width)
      : to(to), width(width), in_place(to.data && to.format == Format::FLOAT) {
    if (!in_place) own = scratch(padded(width));
  }

  float* begin(int64_t row) const { return in_place ? static_cast<float*>(to.data) + row * width : own.get(); }

  void end(int64_t row) const {
    if (in_place || !to.data) return;
    with_format(to.format, to.data, [&](auto* rows) {
      for_vectors(width, [&](int64_t i, int64_t count) INLINED {
        store_part(rows + row * width + i, load(own.get() + i), count);
      });
    });
  }

 private:
  const Output to;
  const int64_t width;
  const bool in_place;
  Scratch own;
};

// Rounds a row to `format`.
inline void round_row(Format format, float* row, int64_t width) {
  if (format == Format::FLOAT) return;
  const void* typed = row;  // used for its type only
  with_format(format, typed, [&](auto* type) {
    for_vectors(width, [&](int64_t i, int64_t count) INLINED {
      std::remove_const_t<std::remove_pointer_t<decltype(type)>> rounded[LANES];
      store(rounded, load_part(row + i, count));
      store_part(row + i, load(rounded), count);
    });
  });
}

template <int64_t H = LANES / 2>
ALWAYS_INLINE float lanes_sum(Floats lanes) {
  const Floats folded = fold<H>(lanes, lanes, std::make_index_sequence<LANES>());
  if constexpr (H == 1) {
    return folded[0];
  } else {
    return lanes_sum<H / 2>(folded);
  }
}

// Prefetches a later load into the L2 cache. The processor cannot guess where the next row begins.
ALWAYS_INLINE void fetch(const float* ahead) { __builtin_prefetch(ahead, 0, 2); }

// The first `count` lanes, followed by zeros.
ALWAYS_INLINE Floats first_lanes(Floats value, int64_t count) {
  if (count == LANES) return value;
  float part[LANES] = {};
  store_part(part, value, count);
  return load(part);
}

// Sum of `term(offset)` over a row, as four independent sums.
template <class Term>
ALWAYS_INLINE float sum_row(int64_t width, Term term) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    for (int64_t s = 0; s < 4; ++s) sums[s] += term(i + s * LANES, LANES);
  }
  for (; i + LANES <= width; i += LANES) sums[0] += term(i, LANES);
  if (i < width) sums[1] += first_lanes(term(i, width - i), width - i);
  return lanes_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The layer norm of rows, with their statistics. The variance takes a second pass over the row, which is in the cache.
class RowNorm {
 public:
  RowNorm(const Norm& norm, const Normalised& to) : norm(norm), to(to), writer(to.normalised, norm.dim) {}

  void apply(int64_t row, const float* value) const {
    const int64_t dim = norm.dim;
    const float mean = sum_row(dim, [&](int64_t i, int64_t count) INLINED { return load_part(value + i, count); }) / dim;
    const float variance = sum_row(dim, [&](int64_t i, int64_t count) INLINED {
      const Floats centred = load_part(value + i, count) - mean;
      return centred * centred;
    });
    const float rstd = 1.0f / std::sqrt(variance / dim + norm.eps);
    float* normalised = writer.begin(row);
    for_vectors(dim, [&](int64_t i, int64_t count) INLINED {
      const Floats normal = (load_part(value + i, count) - mean) * rstd;
      store_part(normalised + i, normal * load_part(norm.weight + i, count) + load_part(norm.bias + i, count), count);
    });
    writer.end(row);
    to.mean[row] = mean;
    to.rstd[row] = rstd;
  }

 private:
  const Norm& norm;
  const Normalised& to;
  const RowWriter writer;
};

// The gradient of rows through their layer norm, and its sums for weight and bias [2, dim].
class RowNormGradient {
 public:
  explicit RowNormGradient(const NormGradient& norm) : norm(norm), reader(norm.grad, norm.dim) {}

  // Reads a row of the gradient and adds it to the sums; `value` is the row that was normalised.
  void begin(int64_t row, const float* value, float* sums) {
    const int64_t dim = norm.dim;
    grad = reader.read(row);
    mean = norm.mean[row];
    rstd = norm.rstd[row];
    Floats scaled{}, along{};
    for_vectors(dim, [&](int64_t i, int64_t count) INLINED {
      fetch(grad + dim + i);
      const Floats cotangent = load_part(grad + i, count);  // zeros in lanes that do not count
      const Floats normal = (load_part(value + i, count) - mean) * rstd, term = cotangent * normal;
      const Floats factor = load_part(norm.weight + i, count);
      scaled += cotangent * factor;
      along += term * factor;
      store_part(sums + i, load_part(sums + i, count) + term, count);
      store_part(sums + dim + i, load_part(sums + dim + i, count) + cotangent, count);
    });
    shared = lanes_sum(scaled) / dim;
    slope = lanes_sum(along) / dim;
  }

  // The gradient of the same row, at an offset.
  ALWAYS_INLINE Floats at(int64_t i, int64_t count, Floats value) const {
    const Floats scaled = load_part(grad + i, count) * load_part(norm.weight + i, count);
    return (scaled - (shared + (value - mean) * rstd * slope)) * rstd;
  }

 private:
  const NormGradient& norm;
  const RowReader reader;
  const float* grad = nullptr;
  float mean = 0, rstd = 0, shared = 0, slope = 0;
};

}  // namespace slotkernels::LEVEL
