// Guided label maps, for one level of x86-64 (see levels.h). A frame is computed in three steps, each in bands of rows
// of blocks that do not depend on one another:
//   prepare_bands: scores of patches, interpolated along x; mean colours of blocks;
//   fit_bands:     box means of colours, masks and their products, by running sums along y and doubling along x; from
//                  them the coefficients, and their sums along x;
//   label_bands:   sums of coefficients along y; then for each row of pixels their interpolation, filtered masks and
//                  the argmax. Filtered masks exist only in registers.
//
// Floor: 20 vector instructions for each segment and vector of pixels, and one byte written a pixel.

#include "simd.h"

#include "labels.h"
#include "propagation_scores.h"

namespace slotkernels::LEVEL {

constexpr float MIDDLE = 0.5f;  // subtracted from colours: covariances of numbers around zero round less

// Row `y` of a frame of the guide, its bytes in order.
inline const uint8_t* guide_row(const Guiding& job, int64_t index, int64_t y, Scratch& scratch) {
  const int64_t* strides = job.guide.strides;
  const int64_t b = index / job.labelling.frames, t = index % job.labelling.frames;
  const uint8_t* from = job.guide.data + b * strides[0] + t * strides[1] + y * strides[2];
  if (strides[3] == COLOURS && strides[4] == 1) return from;
  uint8_t* to = scratch.bytes.data();
  for (int64_t x = 0; x < job.labelling.columns.pixels; ++x) {
    for (int64_t c = 0; c < COLOURS; ++c) to[x * COLOURS + c] = from[x * strides[3] + c * strides[4]];
  }
  return to;
}

// Mean colours of row `row` of blocks.
inline void average_blocks(const Guiding& job, int64_t index, int64_t row, Blocks& blocks, Scratch& scratch) {
  const int64_t width = job.labelling.columns.pixels, side = job.subsample;
  const int64_t begin = row * side, end = std::min(begin + side, job.labelling.rows.pixels);
  uint32_t* totals = scratch.totals.data();
  std::memset(totals, 0, COLOURS * width * sizeof(uint32_t));
  for (int64_t y = begin; y < end; ++y) {
    const uint8_t* bytes = guide_row(job, index, y, scratch);
    for (int64_t i = 0; i < COLOURS * width; ++i) totals[i] += bytes[i];
  }
  float* to = blocks.guide.data() + row * COLOURS * job.stride;
  for (int64_t j = 0; j < job.columns; ++j) {
    const int64_t first = j * side, last = std::min(first + side, width);
    const float scale = 1.0f / static_cast<float>(255 * (end - begin) * (last - first));
    uint64_t sums[COLOURS] = {};
    for (int64_t x = first; x < last; ++x) {
      for (int64_t c = 0; c < COLOURS; ++c) sums[c] += totals[x * COLOURS + c];
    }
    for (int64_t c = 0; c < COLOURS; ++c) to[c * job.stride + j] = static_cast<float>(sums[c]) * scale - MIDDLE;
  }
}

// Scores of row `i` of patches at the centres of blocks along x, and its first segment that is not finite.
inline void spread_scores(const Guiding& job, int64_t i, Blocks& blocks, Frame& frame) {
  const int64_t objects = job.labelling.objects, width = job.labelling.columns.patches, padded = frame.padded;
  const float* scores = scores_of(job.labelling, i, frame) + padded;  // [width + 1, padded]
  int64_t undefined = objects;
  for (int64_t k = 0; k < undefined; ++k) {
    for (int64_t j = 0; j < width; ++j) {
      if (!(std::fabs(scores[j * padded + k]) < INF)) undefined = k;
    }
  }
  blocks.undefined[i] = undefined;
  const int32_t* left = job.patch_columns.left.data();
  const float* share = job.patch_columns.share.data();
  for (int64_t k = 0; k < objects; ++k) {
    float* to = blocks.masks.data() + (i * objects + k) * job.stride;
    for (int64_t x = 0; x < job.columns; ++x) {
      const float* pair = scores + left[x] * padded + k;
      to[x] = pair[0] + share[x] * (pair[padded] - pair[0]);
    }
  }
}

inline void prepare_bands(const Guiding& job, int64_t index, int64_t begin, int64_t end, Blocks& blocks,
                          Scratch& scratch) {
  read_frame(job.labelling, index, scratch.frame);
  const int64_t patches = job.labelling.rows.patches;
  for (int64_t i = begin * patches / job.bands; i < end * patches / job.bands; ++i) {
    spread_scores(job, i, blocks, scratch.frame);
  }
  for (int64_t row = begin * BAND; row < std::min(end * BAND, job.rows); ++row) {
    average_blocks(job, index, row, blocks, scratch);
  }
}

// Moves a window to `row`: calls add(i, 1) for the row that enters it and add(i, -1) for the row that leaves it. For
// the first window, calls add(i, 1) for all of its rows.
template <class Add>
ALWAYS_INLINE void move_window(const Guiding& job, int64_t row, bool first, Add add) {
  const int64_t enters = row + job.drop, leaves = row - job.drop - 1;
  for (int64_t i = first ? std::max<int64_t>(leaves + 1, 0) : enters; i <= std::min(enters, job.rows - 1); ++i) {
    add(i, 1.0f);
  }
  if (!first && leaves >= 0) add(leaves, -1.0f);
}

// Sums of `2 * reach + 1` neighbours in a line, for each number of its row. Computes sums of 1, 2, 4, … neighbours and
// adds those in the binary expansion of the length. So rounding errors do not accumulate along the line.
inline void sum_windows(const Guiding& job, const float* line, float* doubled, float* sums) {
  const int64_t columns = job.columns, length = columns + 2 * job.reach;
  for (int64_t x = 0; x < columns; x += LANES) store(sums + x, load(line + x));
  int64_t power = 1, place = 1;
  for (int64_t digits = job.reach; digits; digits >>= 1) {
    const float* from = power == 1 ? line : doubled;
    for (int64_t x = 0; x < length; x += LANES) store(doubled + x, load(from + x) + load(from + x + power));
    power *= 2;
    if (digits & 1) {
      for (int64_t x = 0; x < columns; x += LANES) store(sums + x, load(sums + x) + load(doubled + x + place));
      place += power;
    }
  }
}

// Adds (or subtracts) row `row` of blocks to the sums along y: colours and their products; masks and their products.
inline void add_blocks(const Guiding& job, int64_t row, float sign, const Blocks& blocks, Scratch& scratch) {
  const int64_t objects = job.labelling.objects, stride = job.stride, line = job.line;
  const int64_t top = job.patch_rows.left[row], bottom = std::min(top + 1, job.labelling.rows.patches - 1);
  const float share = job.patch_rows.share[row];
  const float* colours = blocks.guide.data() + row * COLOURS * stride;
  float* sums = scratch.guide_sums.data() + job.reach;
  const auto add = [](float* to, Floats value) __attribute__((always_inline)) { store(to, load(to) + value); };
  const Floats signs = Floats{} + sign;
  for (int64_t x = 0; x < job.columns; x += LANES) {
    Floats colour[COLOURS];
    for (int64_t c = 0; c < COLOURS; ++c) colour[c] = load(colours + c * stride + x);
    for (int64_t c = 0, place = COLOURS; c < COLOURS; ++c) {
      const Floats signed_colour = signs * colour[c];
      add(sums + c * line + x, signed_colour);
      for (int64_t d = 0; d <= c; ++d) add(sums + place++ * line + x, signed_colour * colour[d]);
    }
  }
  for (int64_t k = 0; k < objects; ++k) {
    const float* above = blocks.masks.data() + (top * objects + k) * stride;
    const float* below = blocks.masks.data() + (bottom * objects + k) * stride;
    float* to = scratch.mask_sums.data() + k * FIT * line + job.reach;
    for (int64_t x = 0; x < job.columns; x += LANES) {
      const Floats mask = signs * (load(above + x) + share * (load(below + x) - load(above + x)));
      for (int64_t c = 0; c < COLOURS; ++c) add(to + c * line + x, mask * load(colours + c * stride + x));
      add(to + COLOURS * line + x, mask);
    }
  }
}

// Mean colours; 1 / D of each colour; L10, L20 and L21, of L D L' = covariance + epsilon.
inline void factorise(const Guiding& job, int64_t row, Scratch& scratch) {
  const int64_t stride = job.stride;
  float* to = scratch.solver.data();
  for (int64_t i = 0; i < GUIDE; ++i) {
    sum_windows(job, scratch.guide_sums.data() + i * job.line, scratch.doubled.data(), to + i * stride);
  }
  // Pivots are at least epsilon; where colours are flat, rounding could make them negative.
  const Floats epsilon = Floats{} + job.epsilon, one = Floats{} + 1.0f;
  for (int64_t x = 0; x < job.columns; x += LANES) {
    const Floats scale = load(job.column_share.data() + x) * job.row_share[row];
    Floats mean[COLOURS], sigma[6];
    for (int64_t c = 0, i = 0; c < COLOURS; ++c) {
      mean[c] = scale * load(to + c * stride + x);
      for (int64_t d = 0; d <= c; ++d, ++i) {
        sigma[i] = scale * load(to + (COLOURS + i) * stride + x) - mean[c] * mean[d];
        if (c == d) sigma[i] += epsilon;
      }
    }
    const Floats pivot0 = one / maximum(sigma[0], epsilon), l10 = sigma[1] * pivot0, l20 = sigma[3] * pivot0;
    const Floats pivot1 = one / maximum(sigma[2] - l10 * sigma[1], epsilon), rest = sigma[4] - l20 * sigma[1];
    const Floats l21 = rest * pivot1;
    const Floats pivot2 = one / maximum(sigma[5] - l20 * sigma[3] - l21 * rest, epsilon);
    const Floats numbers[GUIDE] = {mean[0], mean[1], mean[2], pivot0, pivot1, pivot2, l10, l20, l21};
    for (int64_t i = 0; i < GUIDE; ++i) store(to + i * stride + x, numbers[i]);
  }
}

// Coefficients of segment `k` in row `row` of blocks, into lines.
inline void solve(const Guiding& job, int64_t row, int64_t k, Scratch& scratch) {
  const int64_t stride = job.stride, line = job.line;
  float* means = scratch.means.data();
  for (int64_t i = 0; i < FIT; ++i) {
    sum_windows(job, scratch.mask_sums.data() + (k * FIT + i) * line, scratch.doubled.data(), means + i * stride);
  }
  const float* solver = scratch.solver.data();
  float* to = scratch.fit_lines.data() + job.reach;
  for (int64_t x = 0; x < job.columns; x += LANES) {
    const auto number = [&](int64_t i) __attribute__((always_inline)) { return load(solver + i * stride + x); };
    const Floats scale = load(job.column_share.data() + x) * job.row_share[row];
    const Floats mask = scale * load(means + COLOURS * stride + x);
    Floats a[COLOURS];
    for (int64_t c = 0; c < COLOURS; ++c) a[c] = scale * load(means + c * stride + x) - number(c) * mask;
    a[1] -= number(6) * a[0];
    a[2] = (a[2] - number(7) * a[0] - number(8) * a[1]) * number(5);
    a[1] = a[1] * number(4) - number(8) * a[2];
    a[0] = a[0] * number(3) - number(6) * a[1] - number(7) * a[2];
    Floats offset = mask;
    for (int64_t c = 0; c < COLOURS; ++c) {
      offset -= a[c] * number(c);
      store(to + c * line + x, a[c]);
    }
    store(to + COLOURS * line + x, offset);
  }
}

inline void fit_bands(const Guiding& job, int64_t, int64_t begin, int64_t end, Blocks& blocks, Scratch& scratch) {
  const int64_t objects = job.labelling.objects;
  for (int64_t row = begin * BAND; row < std::min(end * BAND, job.rows); ++row) {
    const bool first = row % BAND == 0;
    if (first) {
      std::memset(scratch.guide_sums.data(), 0, scratch.guide_sums.size() * sizeof(float));
      std::memset(scratch.mask_sums.data(), 0, scratch.mask_sums.size() * sizeof(float));
    }
    move_window(job, row, first, [&](int64_t i, float sign) { add_blocks(job, i, sign, blocks, scratch); });
    factorise(job, row, scratch);
    for (int64_t k = 0; k < objects; ++k) {
      solve(job, row, k, scratch);
      float* to = blocks.fits.data() + (row * objects + k) * FIT * job.stride;
      for (int64_t i = 0; i < FIT; ++i) {
        sum_windows(job, scratch.fit_lines.data() + i * job.line, scratch.doubled.data(), to + i * job.stride);
      }
    }
  }
}

// Box means of the coefficients of row `row` of blocks, updated from the row before it unless it is the `first`.
inline const float* average_fits(const Guiding& job, int64_t row, bool first, const Blocks& blocks, Scratch& scratch) {
  const int64_t objects = job.labelling.objects, stride = job.stride, lines = objects * FIT;
  float* sums = scratch.fit_sums.data();
  if (first) std::memset(sums, 0, scratch.fit_sums.size() * sizeof(float));
  move_window(job, row, first, [&](int64_t i, float sign) {
    const float* fits = blocks.fits.data() + i * lines * stride;
    for (int64_t x = 0; x < lines * stride; x += LANES) store(sums + x, load(sums + x) + sign * load(fits + x));
  });
  float* to = scratch.fit_rows[row % 2].data();
  for (int64_t i = 0; i < lines; ++i) {
    for (int64_t x = 0; x < job.columns; x += LANES) {
      const Floats scale = load(job.column_share.data() + x) * job.row_share[row];
      store(to + i * stride + x, scale * load(sums + i * stride + x));
    }
  }
  return to;
}

// Labels of row `y` of pixels, whose coefficients lie between those of two rows of blocks.
template <bool CONFIDENCE>
inline void label_row(const Guiding& job, int64_t index, int64_t y, const float* top, const float* bottom,
                      Scratch& scratch) {
  const int64_t objects = job.labelling.objects, width = job.labelling.columns.pixels, stride = job.stride;
  const int64_t padded = scratch.frame.stride;
  const float down = job.block_rows.share[y];
  float* fits = scratch.fits.data();
  for (int64_t x = 0; x < objects * FIT * stride; x += LANES) {
    store(fits + x, load(top + x) + down * (load(bottom + x) - load(top + x)));
  }
  const uint8_t* bytes = guide_row(job, index, y, scratch);
  float* colours = scratch.colours.data();
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t c = 0; c < COLOURS; ++c) {
      colours[c * padded + x] = static_cast<float>(bytes[x * COLOURS + c]) * (1.0f / 255.0f) - MIDDLE;
    }
  }
  uint8_t* labels = scratch.frame.labels.data();
  uint16_t* margins = scratch.frame.margins.data();
  for (int64_t x = 0; x < width; x += LANES) {
    const int32_t* left = job.block_columns.left.data() + x;
    Ints place;
    std::memcpy(&place, left, sizeof(place));
    place -= left[0];
    const Floats across = load(job.block_columns.share.data() + x);
    Floats colour[COLOURS];
    for (int64_t c = 0; c < COLOURS; ++c) colour[c] = load(colours + c * padded + x);
    Floats best = Floats{} - INF, second = Floats{} + (objects == 1 ? 0.0f : -INF);
    Ints label{};
    const float* fit = fits + left[0];
    for (int64_t k = 0; k < objects; ++k, fit += FIT * stride) {
      Floats one = pick(fit + COLOURS * stride, place), other = pick(fit + COLOURS * stride + 1, place);
      for (int64_t c = 0; c < COLOURS; ++c) {
        one += pick(fit + c * stride, place) * colour[c];
        other += pick(fit + c * stride + 1, place) * colour[c];
      }
      const Floats mask = one + across * (other - one);
      label = where(less(best, mask), Ints{} + static_cast<int32_t>(k), label);
      if (CONFIDENCE && objects > 1) second = maximum(second, minimum(best, mask));
      best = maximum(best, mask);
    }
    put(labels + x, to_bytes(label));
    if (CONFIDENCE) store(reinterpret_cast<Half*>(margins + x), best - second);
  }
}

// A row of a frame with a segment whose scores are not finite: that segment wins all pixels.
inline void fill_row(const Guiding& job, int64_t label, Scratch& scratch) {
  const int64_t width = job.labelling.columns.pixels;
  std::memset(scratch.frame.labels.data(), static_cast<int>(label), width);
  if (!job.labelling.confidence) return;
  for (int64_t x = 0; x < width; ++x) scratch.frame.margins.data()[x] = 0x7e00;  // NaN
}

inline void label_bands(const Guiding& job, int64_t index, int64_t begin, int64_t end, Blocks& blocks,
                        Scratch& scratch) {
  const Labelling& maps = job.labelling;
  const int64_t height = maps.rows.pixels, width = maps.columns.pixels;
  int64_t undefined = maps.objects;
  for (int64_t i = 0; i < maps.rows.patches; ++i) undefined = std::min(undefined, blocks.undefined.data()[i]);
  if (undefined < maps.objects) fill_row(job, undefined, scratch);
  for (int64_t band = begin; band < end; ++band) {
    const int64_t first = band * BAND * job.subsample, last = std::min(first + BAND * job.subsample, height);
    const float *top = nullptr, *bottom = nullptr;
    for (int64_t y = first, held = -1; y < last; ++y) {
      if (undefined == maps.objects) {
        const int64_t row = job.block_rows.left[y];
        if (row != held) {
          top = held < 0 ? average_fits(job, row, true, blocks, scratch) : bottom;
          bottom = row + 1 < job.rows ? average_fits(job, row + 1, false, blocks, scratch) : top;
          held = row;
        }
        maps.confidence ? label_row<true>(job, index, y, top, bottom, scratch)
                        : label_row<false>(job, index, y, top, bottom, scratch);
      }
      const int64_t place = (index * height + y) * width;
      std::memcpy(maps.labels + place, scratch.frame.labels.data(), width);
      if (maps.confidence) std::memcpy(maps.confidence + place, scratch.frame.margins.data(), 2 * width);
    }
  }
}

// Areas and boxes of a frame, from its labels.
inline void count_frame(const Guiding& job, int64_t index, Scratch& scratch) {
  const Labelling& maps = job.labelling;
  const int64_t height = maps.rows.pixels, width = maps.columns.pixels, place = index * maps.objects;
  uint8_t* row = scratch.frame.labels.data();
  for (int64_t y = 0; y < height; ++y) {
    std::memcpy(row, maps.labels + (index * height + y) * width, width);
    count_row(row, width, y, maps.areas + place, maps.boxes + 4 * place);
  }
}

}  // namespace slotkernels::LEVEL
