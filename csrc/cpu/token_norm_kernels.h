// The layer norm of tokens on one thread, without scale and shift, for one level of x86-64 (see levels.h).
//
// Rows are read from memory once and written once, in the format of the products that follow. So no float32 copy is
// written and read between norm and cast. Floor: the memory's bandwidth.

#include "simd.h"

#include "products.h"

#include "slot_update_rows.h"

namespace slotkernels::LEVEL {

inline void token_norm_rows(const Input& tokens, int64_t dim, float eps, int64_t begin, int64_t end, const Output& to,
                            float* means, float* rstds) {
  const RowReader reader(tokens, dim);
  const RowWriter writer(to, dim);
  for (int64_t row = begin; row < end; ++row) {
    const float* value = reader.read(row);
    const float mean = sum_row(dim, [&](int64_t i, int64_t count) { return load_part(value + i, count); }) / dim;
    const float variance = sum_row(dim, [&](int64_t i, int64_t count) {
      const Floats centred = load_part(value + i, count) - mean;
      return centred * centred;
    });
    const float rstd = 1.0f / std::sqrt(variance / dim + eps);
    float* normal = writer.begin(row);
    for_vectors(dim, [&](int64_t i, int64_t count) {
      store_part(normal + i, (load_part(value + i, count) - mean) * rstd, count);
    });
    writer.end(row);
    means[row] = mean;
    rstds[row] = rstd;
  }
}

inline void token_norm_backward_rows(const Input& tokens, const Input& grads, int64_t dim, const float* means,
                                     const float* rstds, int64_t begin, int64_t end, const Output& to) {
  const RowReader values(tokens, dim), cotangents(grads, dim);
  const RowWriter writer(to, dim);
  for (int64_t row = begin; row < end; ++row) {
    const float *value = values.read(row), *grad = cotangents.read(row), mean = means[row], rstd = rstds[row];
    const auto normal = [&](int64_t i, int64_t count) { return (load_part(value + i, count) - mean) * rstd; };
    const float shared = sum_row(dim, [&](int64_t i, int64_t count) { return load_part(grad + i, count); }) / dim;
    const float slope = sum_row(dim, [&](int64_t i, int64_t count) {
      return load_part(grad + i, count) * normal(i, count);
    }) / dim;
    float* result = writer.begin(row);
    for_vectors(dim, [&](int64_t i, int64_t count) {
      store_part(result + i, (load_part(grad + i, count) - shared - normal(i, count) * slope) * rstd, count);
    });
    writer.end(row);
  }
}

}  // namespace slotkernels::LEVEL
