// Label maps from two attention maps, for one level of x86-64 (see levels.h). Of a frame only the scores of two rows of
// patches exist at a time.
//
// A cell is the rectangle of pixels between four patch centres; cells at the border lie between a centre and its copy.
// Within a cell an object's score is u + ty v, with u and v linear in x, so no scores are gathered from memory. An
// interpolated score lies between the least and the greatest of the four scores. So an object can win a pixel only if
// its greatest score is at least the least score of every other object. In most cells only one or two objects can win,
// and almost all the work is writing labels.
//
// Floor: 4 vector instructions for each candidate and vector of pixels, and one byte written a pixel.

#include "simd.h"

#include "labels.h"
#include "propagation_scores.h"

namespace slotkernels::LEVEL {

// Scores of a cell's four patches, [padded] each.
struct Corners {
  const float *top_left, *top_right, *bottom_left, *bottom_right;
};

// The largest of all lanes, or the second largest. No lane of `second` is above that of `first`.
template <bool SECOND>
ALWAYS_INLINE float reduce(Floats first, Floats second) {
  float a[LANES], b[LANES];
  store(a, first);
  store(b, second);
  float top = -INF, next = -INF;
  for (int64_t l = 0; l < LANES; ++l) {
    if (SECOND) next = std::max(next, std::max(b[l], std::min(top, a[l])));
    top = std::max(top, a[l]);
  }
  return SECOND ? next : top;
}

// Flags [padded] of the objects that may have the highest score somewhere in the cell or, with CONFIDENCE, one of the
// two highest: 1, or 3 if one of the four scores is NaN.
template <bool CONFIDENCE>
ALWAYS_INLINE void find_candidates(const Corners& corners, int64_t objects, uint8_t* flags) {
  Ints lane;
  for (int64_t l = 0; l < LANES; ++l) lane[l] = static_cast<int32_t>(l);
  const Floats lowest = Floats{} - INF;
  Floats first = lowest, second = lowest, greatest[MAX_OBJECTS / LANES];
  for (int64_t k = 0; k < objects; k += LANES) {
    const Floats a = load(corners.top_left + k), b = load(corners.top_right + k);
    const Floats c = load(corners.bottom_left + k), d = load(corners.bottom_right + k), sum = (a + b) + (c + d);
    greatest[k / LANES] = where(sum == sum, maximum(maximum(a, b), maximum(c, d)), -lowest);
    const Ints real = less(lane, Ints{} + static_cast<int32_t>(objects - k));
    const Floats least = where(real, minimum(minimum(a, b), minimum(c, d)), lowest);
    second = maximum(second, minimum(first, least));
    first = maximum(first, least);
  }
  const float bound = reduce<CONFIDENCE>(first, second);
  for (int64_t k = 0; k < objects; k += LANES) {
    const Floats most = greatest[k / LANES];
    const Ints real = less(lane, Ints{} + static_cast<int32_t>(objects - k));
    put(flags + k, to_bytes((((most >= Floats{} + bound) & 1) | ((most == -lowest) & 2)) & real));
  }
}

struct Candidates {
  int64_t count;
  int64_t undefined;  // the first whose score is NaN, or -1
  int32_t object[MAX_OBJECTS];
};

// `flags` are zero from `objects` on, to a multiple of 8.
ALWAYS_INLINE void list_candidates(const uint8_t* flags, int64_t objects, Candidates& found) {
  found.count = 0;
  found.undefined = -1;
  for (int64_t k = 0; k < objects; k += 8) {
    uint64_t word;
    std::memcpy(&word, flags + k, sizeof(word));
    const uint64_t undefined = word & 0x0202020202020202u;
    if (undefined && found.undefined < 0) found.undefined = k + __builtin_ctzll(undefined) / 8;
    for (word &= 0x0101010101010101u; word; word &= word - 1) {
      found.object[found.count++] = static_cast<int32_t>(k + __builtin_ctzll(word) / 8);
    }
  }
}

// Pixels begin..end of `rows` rows; `across` and `down` are the shares of the later patch in them. Whole vectors are
// written. The pixels past the cell are overwritten by the next cell, or lie past the row.
struct Place {
  int64_t begin, end, rows, stride;
  const float *across, *down;
  uint8_t* labels;
  uint16_t* margins;
};

template <bool CONFIDENCE>
ALWAYS_INLINE void fill_cell(uint8_t object, const Place& place) {
  Shorts nan = Shorts{} + static_cast<uint16_t>(0x7e00);
  for (int64_t x = place.begin; x < place.end; x += LANES) {
    for (int64_t r = 0; r < place.rows; ++r) {
      put(place.labels + r * place.stride + x, Bytes{} + object);
      if (CONFIDENCE) put(place.margins + r * place.stride + x, nan);
    }
  }
}

template <bool CONFIDENCE>
ALWAYS_INLINE void label_cell(const Corners& corners, const Candidates& found, int64_t objects, const Place& place) {
  if (found.undefined >= 0) return fill_cell<CONFIDENCE>(static_cast<uint8_t>(found.undefined), place);
  if (!CONFIDENCE && found.count == 1) return fill_cell<CONFIDENCE>(static_cast<uint8_t>(found.object[0]), place);
  Floats u[MAX_OBJECTS], v[MAX_OBJECTS];
  for (int64_t x = place.begin; x < place.end; x += LANES) {
    const Floats across = load(place.across + x);
    for (int64_t c = 0; c < found.count; ++c) {
      const int64_t k = found.object[c];
      u[c] = corners.top_left[k] + across * (corners.top_right[k] - corners.top_left[k]);
      v[c] = corners.bottom_left[k] + across * (corners.bottom_right[k] - corners.bottom_left[k]) - u[c];
    }
    for (int64_t r = 0; r < place.rows; ++r) {
      const float down = place.down[r];
      Floats best = u[0] + down * v[0], second = Floats{} + (objects == 1 ? 0.0f : -INF);
      Ints label = Ints{} + found.object[0];
      for (int64_t c = 1; c < found.count; ++c) {
        const Floats score = u[c] + down * v[c];
        label = where(less(best, score), Ints{} + found.object[c], label);
        if (CONFIDENCE) second = maximum(second, minimum(best, score));
        best = maximum(best, score);
      }
      put(place.labels + r * place.stride + x, to_bytes(label));
      if (CONFIDENCE) store(reinterpret_cast<Half*>(place.margins + r * place.stride + x), best - second);
    }
  }
}

// Copies the labels of `rows` rows of pixels, from row `y` on, from the band to the result.
inline void write_band(const Labelling& job, const Frame& frame, int64_t index, int64_t y, int64_t rows) {
  const int64_t pixels = job.columns.pixels;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = (index * job.rows.pixels + y + r) * pixels, counts = index * job.objects;
    const uint8_t* labels = frame.labels.data() + r * frame.stride;
    std::memcpy(job.labels + place, labels, pixels);
    if (job.confidence) std::memcpy(job.confidence + place, frame.margins.data() + r * frame.stride, 2 * pixels);
    if (job.areas) count_row(labels, pixels, y + r, job.areas + counts, job.boxes + 4 * counts);
  }
}

template <bool CONFIDENCE>
inline void label_frame(const Labelling& job, int64_t index, Frame& frame) {
  const int64_t objects = job.objects, padded = frame.padded;
  const int64_t* start = job.columns.start.data();
  Candidates found;
  read_frame(job, index, frame);
  for (int64_t row = 0; row <= job.rows.patches; ++row) {
    const int64_t first = job.rows.start[row], last = job.rows.start[row + 1];
    if (first == last) continue;
    const float* top = scores_of(job, std::max<int64_t>(row - 1, 0), frame);
    const float* bottom = scores_of(job, std::min(row, job.rows.patches - 1), frame);
    const auto corners = [&](int64_t column) __attribute__((always_inline)) {
      const int64_t left = column * padded, right = left + padded;
      return Corners{top + left, top + right, bottom + left, bottom + right};
    };
    // A separate loop: the branches of the loop below then need not wait for these sums and comparisons.
    for (int64_t column = 0; column <= job.columns.patches; ++column) {
      find_candidates<CONFIDENCE>(corners(column), objects, frame.flags.data() + column * padded);
    }
    for (int64_t y = first; y < last; y += ROWS) {
      const int64_t rows = std::min(ROWS, last - y);
      Place place{0, 0, rows, frame.stride, job.columns.share.data(), job.rows.share.data() + y, frame.labels.data(),
                  frame.margins.data()};
      for (int64_t column = 0; column <= job.columns.patches; ++column) {
        place.begin = start[column], place.end = start[column + 1];
        if (place.begin == place.end) continue;
        list_candidates(frame.flags.data() + column * padded, objects, found);
        label_cell<CONFIDENCE>(corners(column), found, objects, place);
      }
      write_band(job, frame, index, y, rows);
    }
  }
}

inline void label_frames(const Labelling& job, int64_t begin, int64_t end, Frame& frame) {
  for (int64_t index = begin; index < end; ++index) {
    job.confidence ? label_frame<true>(job, index, frame) : label_frame<false>(job, index, frame);
  }
}

}  // namespace slotkernels::LEVEL
