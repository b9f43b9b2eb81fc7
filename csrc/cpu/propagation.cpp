// Label maps from two attention maps. Of a frame only the scores of two rows of patches exist at a time.
//
// A cell is the rectangle of pixels between four patch centres; cells at the border lie between a centre and its copy.
// Within a cell an object's score is u + ty v with u and v linear in x, so nothing is gathered. Interpolation stays
// between the least and the greatest of the four scores: an object wins a pixel only if its greatest reaches every
// other's least. In most cells of a segmentation one or two objects do, and what is left of the work is to write
// labels.
//
// Floor: 4 vector instructions for each candidate and 8 pixels, and one byte written a pixel.

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "scores.h"

namespace slotkernels {
namespace {

constexpr int64_t ROWS = 16;  // of pixels that are labelled together
constexpr float INF = std::numeric_limits<float>::infinity();

struct Job {
  Attention attention;
  Axis rows, columns;
  uint8_t* labels;       // [B, T, H, W]
  uint16_t* confidence;  // [B, T, H, W] or nullptr
  int32_t* areas;        // [B, T, K] or nullptr
  int32_t* boxes;        // [B, T, K, 4]
};

// ------------------------------------------------------------------------------------------------- labels of a cell

// Scores of a cell's four patches, [padded] each.
struct Corners {
  const float *top_left, *top_right, *bottom_left, *bottom_right;
};

// The largest of all lanes, or the second largest. No lane of `second` is above that of `first`.
template <bool SECOND>
ALWAYS_INLINE float reduce(Float8 first, Float8 second) {
  float a[WIDTH], b[WIDTH];
  put(a, first);
  put(b, second);
  float top = -INF, next = -INF;
  for (int64_t l = 0; l < WIDTH; ++l) {
    if (SECOND) next = std::max(next, std::max(b[l], std::min(top, a[l])));
    top = std::max(top, a[l]);
  }
  return SECOND ? next : top;
}

// Flags [padded] of the objects that may have the highest score somewhere in the cell or, with CONFIDENCE, one of the
// two highest: 1, or 3 if one of the four scores is NaN.
template <bool CONFIDENCE>
ALWAYS_INLINE void find_candidates(const Corners& corners, int64_t objects, uint8_t* flags) {
  const Mask8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const Float8 lowest = Float8{} - INF;
  Float8 first = lowest, second = lowest, greatest[MAX_OBJECTS / WIDTH];
  for (int64_t k = 0; k < objects; k += WIDTH) {
    const Float8 a = load8(corners.top_left + k), b = load8(corners.top_right + k);
    const Float8 c = load8(corners.bottom_left + k), d = load8(corners.bottom_right + k);
    const Float8 sum = (a + b) + (c + d);
    greatest[k / WIDTH] = sum == sum ? larger(larger(a, b), larger(c, d)) : -lowest;
    const Float8 least = lane < (int32_t)(objects - k) ? smaller(smaller(a, b), smaller(c, d)) : lowest;
    second = larger(second, smaller(first, least));
    first = larger(first, least);
  }
  const float bound = reduce<CONFIDENCE>(first, second);
  for (int64_t k = 0; k < objects; k += WIDTH) {
    const Float8 most = greatest[k / WIDTH];
    const Mask8 chosen = ((most >= Float8{} + bound) & 1) | ((most == -lowest) & 2);
    const Mask8 real = lane < (int32_t)(objects - k);
    put(flags + k, to_bytes(chosen & real));
  }
}

struct Candidates {
  int64_t count;
  int64_t undefined;  // the first whose score is NaN, or -1
  int32_t object[MAX_OBJECTS];
};

ALWAYS_INLINE void list_candidates(const uint8_t* flags, int64_t objects, Candidates& found) {
  found.count = 0;
  found.undefined = -1;
  for (int64_t k = 0; k < objects; k += 8) {
    uint64_t word;
    std::memcpy(&word, flags + k, sizeof(word));
    const uint64_t undefined = word & 0x0202020202020202u;
    if (undefined && found.undefined < 0) found.undefined = k + __builtin_ctzll(undefined) / 8;
    for (word &= 0x0101010101010101u; word; word &= word - 1) {
      found.object[found.count++] = (int32_t)(k + __builtin_ctzll(word) / 8);
    }
  }
}

// A few rows of a label map: whole vectors are stored, past the end of a cell and of a row.
struct Band {
  int64_t stride;
  std::vector<uint8_t> labels;       // [ROWS, stride]
  std::vector<uint16_t> confidence;  // [ROWS, stride]

  explicit Band(int64_t pixels)
      : stride(round_up(pixels, WIDTH) + WIDTH), labels(ROWS * stride), confidence(ROWS * stride) {}
};

// Labels of pixels begin..end of `rows` rows; `across` and `down` are the shares of the later patch.
template <bool CONFIDENCE>
ALWAYS_INLINE void label_cell(
    const Corners& corners, const Candidates& found, int64_t objects, int64_t begin, int64_t end, const float* across,
    const float* down, int64_t rows, int64_t stride, uint8_t* labels, uint16_t* confidence) {
  if (found.undefined >= 0 || (!CONFIDENCE && found.count == 1)) {
    const uint8_t object = (uint8_t)(found.undefined >= 0 ? found.undefined : found.object[0]);
    const Byte8 label = Byte8{} + object;
    const Half8 nan = Half8{} + (uint16_t)0x7e00;
    for (int64_t x = begin; x < end; x += WIDTH) {
      for (int64_t r = 0; r < rows; ++r) {
        put(labels + r * stride + x, label);
        if (CONFIDENCE) put(confidence + r * stride + x, nan);
      }
    }
    return;
  }
  Float8 u[MAX_OBJECTS], v[MAX_OBJECTS];
  for (int64_t x = begin; x < end; x += WIDTH) {
    const Float8 t = load8(across + x);
    for (int64_t c = 0; c < found.count; ++c) {
      const int64_t k = found.object[c];
      u[c] = corners.top_left[k] + t * (corners.top_right[k] - corners.top_left[k]);
      v[c] = corners.bottom_left[k] + t * (corners.bottom_right[k] - corners.bottom_left[k]) - u[c];
    }
    for (int64_t r = 0; r < rows; ++r) {
      Float8 best = u[0] + down[r] * v[0], second = Float8{} + (objects == 1 ? 0.0f : -INF);
      Mask8 label = Mask8{} + found.object[0];
      for (int64_t c = 1; c < found.count; ++c) {
        const Float8 score = u[c] + down[r] * v[c];
        label = score > best ? Mask8{} + found.object[c] : label;
        if (CONFIDENCE) second = larger(second, smaller(best, score));
        best = larger(best, score);
      }
      put(labels + r * stride + x, to_bytes(label));
      if (CONFIDENCE) put(confidence + r * stride + x, to_float16(best - second));
    }
  }
}

// ------------------------------------------------------------------------------------------------- areas and boxes

// Adds row `y` of labels to areas and boxes (x0, y0, x1, y1; ends excluded), run by run. Reads 8 bytes past the row.
ALWAYS_INLINE void count_row(const uint8_t* labels, int64_t pixels, int64_t y, int32_t* areas, int32_t* boxes) {
  for (int64_t begin = 0, end = 0; begin < pixels; begin = end) {
    const int64_t label = labels[begin];
    for (uint64_t word, other = 0; !other && end < pixels; end += other ? __builtin_ctzll(other) / 8 : 8) {
      std::memcpy(&word, labels + end, sizeof(word));
      other = word ^ label * 0x0101010101010101u;
    }
    end = std::min(end, pixels);
    int32_t* box = boxes + 4 * label;
    if (areas[label] == 0) box[0] = (int32_t)begin, box[1] = (int32_t)y;
    areas[label] += (int32_t)(end - begin);
    box[0] = std::min(box[0], (int32_t)begin);
    box[2] = std::max(box[2], (int32_t)end);
    box[3] = (int32_t)y + 1;
  }
}

template <bool CONFIDENCE>
ALWAYS_INLINE void label_frames(const Job& job, int64_t begin, int64_t end) {
  const Attention& attention = job.attention;
  Frame frame(attention);
  const int64_t pixels = job.columns.start.back(), height = job.rows.start.back();
  Band band(pixels);
  const int64_t *start = job.columns.start.data(), objects = attention.objects, padded = frame.padded;
  std::vector<uint8_t> flags((attention.width + 1) * padded);
  Candidates found;
  for (int64_t index = begin; index < end; ++index) {
    start_frame(attention, index, frame);
    for (int64_t row = 0; row <= attention.height; ++row) {
      if (job.rows.start[row] == job.rows.start[row + 1]) continue;
      const float* top = scores_of(attention, std::max<int64_t>(row - 1, 0), frame);
      const float* bottom = scores_of(attention, std::min(row, attention.height - 1), frame);
      const auto corners = [&](int64_t column) __attribute__((always_inline)) {
        const int64_t left = column * padded, right = left + padded;
        return Corners{top + left, top + right, bottom + left, bottom + right};
      };
      // Apart from the loop below, whose branches then need not wait for sums and comparisons.
      for (int64_t column = 0; column <= attention.width; ++column) {
        find_candidates<CONFIDENCE>(corners(column), objects, flags.data() + column * padded);
      }
      for (int64_t y = job.rows.start[row]; y < job.rows.start[row + 1]; y += ROWS) {
        const int64_t rows = std::min(ROWS, job.rows.start[row + 1] - y);
        for (int64_t column = 0; column <= attention.width; ++column) {
          if (start[column] == start[column + 1]) continue;
          list_candidates(flags.data() + column * padded, objects, found);
          label_cell<CONFIDENCE>(corners(column), found, objects, start[column], start[column + 1],
              job.columns.share.data(), job.rows.share.data() + y, rows, band.stride, band.labels.data(),
              band.confidence.data());
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t place = (index * height + y + r) * pixels, counts = index * objects;
          const uint8_t* labels = band.labels.data() + r * band.stride;
          std::memcpy(job.labels + place, labels, pixels);
          if (CONFIDENCE) std::memcpy(job.confidence + place, band.confidence.data() + r * band.stride, 2 * pixels);
          if (job.areas) count_row(labels, pixels, y + r, job.areas + counts, job.boxes + 4 * counts);
        }
      }
    }
  }
}

}  // namespace

EVERY_CPU void write_labels(const Job& job, int64_t begin, int64_t end) { label_frames<false>(job, begin, end); }

EVERY_CPU void write_labels_and_confidence(const Job& job, int64_t begin, int64_t end) {
  label_frames<true>(job, begin, end);
}

namespace {

// `merged` is contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor> propagate_labels(
    const Tensor& image, const Tensor& video, const std::optional<Tensor>& merged, int64_t height, int64_t width,
    int64_t out_height, int64_t out_width, bool confidence, bool statistics) {
  const int64_t batch = image.size(0), frames = image.size(1), objects = video.size(3);
  const std::vector<int64_t> none{0}, pixels{batch, frames, out_height, out_width}, counts{batch, frames, objects};
  using torch::stable::new_empty, torch::stable::new_zeros;
  Tensor labels = new_empty(image, pixels, ScalarType::Byte);
  Tensor margins = new_empty(image, confidence ? pixels : none, ScalarType::Half);
  Tensor areas = new_zeros(image, statistics ? counts : none, ScalarType::Int);
  Tensor boxes = new_zeros(image, statistics ? std::vector<int64_t>{batch, frames, objects, 4} : none, ScalarType::Int);
  const int64_t* clusters = merged ? static_cast<const int64_t*>(merged->const_data_ptr()) : nullptr;
  const Job job{
      {Map(image), Map(video), clusters, frames, height, width, image.size(3), objects},
      Axis(height, out_height),
      Axis(width, out_width),
      static_cast<uint8_t*>(labels.mutable_data_ptr()),
      confidence ? static_cast<uint16_t*>(margins.mutable_data_ptr()) : nullptr,
      statistics ? static_cast<int32_t*>(areas.mutable_data_ptr()) : nullptr,
      statistics ? static_cast<int32_t*>(boxes.mutable_data_ptr()) : nullptr,
  };
  torch::stable::parallel_for(0, batch * frames, 1, [&](int64_t begin, int64_t end) {
    confidence ? write_labels_and_confidence(job, begin, end) : write_labels(job, begin, end);
  });
  return {labels, margins, areas, boxes};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("propagate_labels", TORCH_BOX(&slotkernels::propagate_labels));
}
