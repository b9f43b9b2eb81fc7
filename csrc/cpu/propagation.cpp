// Label maps from two attention maps. Of a frame only the scores of two rows of patches exist at a time.
//
// A cell is the rectangle of pixels between four patch centres; cells at the border lie between a centre and its copy.
// Within a cell an object's score is u + ty v with u and v linear in x, so nothing is gathered. Interpolation stays between
// the least and the greatest of the four scores: an object wins a pixel only if its greatest reaches every other's
// least. In most cells of a segmentation one or two objects do, and what is left of the work is to write the labels.
//
// Floor: 5 vector instructions for each candidate and 16 pixels, and one byte written a pixel.

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "half.h"

namespace slotkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t PATCHES = 8;       // patches whose scores are summed side by side
constexpr int64_t ROWS = 16;         // of pixels that are labelled together
constexpr int64_t MAX_OBJECTS = 256;  // labels are bytes
constexpr float INF = std::numeric_limits<float>::infinity();
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// One direction of the interpolation. Cell c lies between patches c - 1 and c, clamped to those that exist. Pixel x is at
// (x + 1/2) patches / pixels - 1/2, computed in integers: no rounding decides on a pixel's cell.
struct Axis {
  std::vector<int64_t> start;  // [patches + 2] first pixel of each cell
  std::vector<float> share;    // [pixels + LANES] of the later patch

  Axis(int64_t patches, int64_t pixels) : start(patches + 2), share(pixels + LANES) {
    for (int64_t c = 1; c <= patches; ++c) {
      const int64_t numerator = std::max<int64_t>((2 * c - 1) * pixels - patches, 0);
      start[c] = std::min((numerator + 2 * patches - 1) / (2 * patches), pixels);
    }
    start[patches + 1] = pixels;
    for (int64_t c = 0; c <= patches; ++c) {
      for (int64_t x = start[c]; x < start[c + 1]; ++x) {
        const int64_t distance = (2 * x + 1) * patches - (2 * c - 1) * pixels;
        share[x] = static_cast<float>(static_cast<double>(distance) / static_cast<double>(2 * pixels));
      }
    }
  }
};

// An attention map [B, T, rows, columns] of any strides and of any float type up to 32 bits.
struct Map {
  const char* data;
  ScalarType type;
  int64_t strides[4];

  explicit Map(const Tensor& tensor)
      : data(static_cast<const char*>(tensor.const_data_ptr())), type(tensor.scalar_type()) {
    for (int64_t d = 0; d < 4; ++d) strides[d] = tensor.stride(d) * static_cast<int64_t>(tensor.element_size());
  }
};

struct Job {
  Map image, video;       // [B, T, M, N], [B, T, N, K]
  const int64_t* merged;  // [B, K] or nullptr
  int64_t frames, height, width, slots, objects;
  Axis rows, columns;
  uint8_t* labels;       // [B, T, H, W]
  uint16_t* confidence;  // [B, T, H, W] or nullptr
  int32_t* areas;        // [B, T, K] or nullptr
  int32_t* boxes;        // [B, T, K, 4]
};

// ---------------------------------------------------------------------------------------------- scores of patches

template <class Convert>
ALWAYS_INLINE void widen(const char* from, int64_t count, int64_t stride, float* to, Convert convert) {
  for (int64_t i = 0; i < count; i += LANES) {
    Halves piece{};
    const int64_t rest = std::min(LANES, count - i);
    if (stride == 2 && rest == LANES) {
      std::memcpy(&piece, from + 2 * i, sizeof(piece));
    } else {
      for (int64_t l = 0; l < rest; ++l) std::memcpy((char*)&piece + 2 * l, from + (i + l) * stride, 2);
    }
    const Floats wide = convert(piece);
    std::memcpy(to + i, &wide, rest * sizeof(float));
  }
}

// `count` numbers that are `stride` bytes apart, as floats.
ALWAYS_INLINE void read(const char* from, ScalarType type, int64_t count, int64_t stride, float* to) {
  if (type == ScalarType::BFloat16) {
    widen(from, count, stride, to, [](Halves v) __attribute__((always_inline)) { return from_bfloat16(v); });
  } else if (type == ScalarType::Half) {
    widen(from, count, stride, to, [](Halves v) __attribute__((always_inline)) { return from_float16(v); });
  } else if (stride == sizeof(float)) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i, from + i * stride, sizeof(float));
  }
}

// What a thread keeps of its current frame.
struct Frame {
  int64_t padded;               // objects, rounded up
  std::vector<float> image;     // patches [PATCHES, N], where they cannot be read in place
  std::vector<float> video;     // [N, padded], columns of merged objects summed
  std::vector<float> scores[2];  // of an even and an odd row of patches [1 + width rounded up + 1, padded]
  int64_t held[2];              // which rows these are
  const char* base;             // of the frame's image attention

  explicit Frame(const Job& job)
      : padded(round_up(job.objects, LANES)),
        image(PATCHES * job.slots),
        video(job.slots * padded) {
    for (auto& row : scores) row.resize((round_up(job.width, PATCHES) + 2) * padded);
  }
};

ALWAYS_INLINE void start_frame(const Job& job, int64_t index, Frame& frame) {
  const int64_t b = index / job.frames, t = index % job.frames;
  frame.base = job.image.data + b * job.image.strides[0] + t * job.image.strides[1];
  frame.held[0] = frame.held[1] = -1;
  const char* video = job.video.data + b * job.video.strides[0] + t * job.video.strides[1];
  float row[MAX_OBJECTS];
  for (int64_t n = 0; n < job.slots; ++n) {
    float* out = frame.video.data() + n * frame.padded;
    std::fill(out, out + frame.padded, 0.0f);
    read(video + n * job.video.strides[2], job.video.type, job.objects, job.video.strides[3], row);
    for (int64_t k = 0; k < job.objects; ++k) {
      const int64_t object = job.merged ? job.merged[b * job.objects + k] : k;
      if (object >= 0 && object < job.objects) out[object] += row[k];
    }
  }
}

// Scores of row `i` of patches, [width + 2, padded]: first and last patch twice.
ALWAYS_INLINE const float* scores_of(const Job& job, int64_t i, Frame& frame) {
  float* scores = frame.scores[i % 2].data();
  if (frame.held[i % 2] == i) return scores;
  frame.held[i % 2] = i;
  const int64_t slots = job.slots, padded = frame.padded, *strides = job.image.strides;
  const bool compact = strides[2] == slots * strides[3];  // patches follow one another: read all of them as one
  const bool ready = compact && strides[3] == sizeof(float) && job.image.type == ScalarType::Float;
  for (int64_t j = 0; j < job.width; j += PATCHES) {
    const char* from = frame.base + (i * job.width + j) * strides[2];
    const float* image = reinterpret_cast<const float*>(from);
    if (const int64_t count = std::min(PATCHES, job.width - j); !ready || count < PATCHES) {
      for (int64_t p = 0; p < (compact ? 1 : count); ++p) {
        const int64_t numbers = compact ? count * slots : slots;
        read(from + p * strides[2], job.image.type, numbers, strides[3], frame.image.data() + p * slots);
      }
      image = frame.image.data();
    }
    for (int64_t k = 0; k < padded; k += LANES) {
      Floats sums[PATCHES] = {};
      for (int64_t n = 0; n < slots; ++n) {
        const Floats video = load(frame.video.data() + n * padded + k);
        for (int64_t p = 0; p < PATCHES; ++p) sums[p] += image[p * slots + n] * video;
      }
      for (int64_t p = 0; p < PATCHES; ++p) store(scores + (1 + j + p) * padded + k, sums[p]);
    }
  }
  std::memcpy(scores, scores + padded, padded * sizeof(float));
  std::memcpy(scores + (job.width + 1) * padded, scores + job.width * padded, padded * sizeof(float));
  return scores;
}

// ------------------------------------------------------------------------------------------------- labels of a cell

ALWAYS_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
ALWAYS_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

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

// Flags [padded] of the objects that may have the highest score somewhere in the cell or, with CONFIDENCE, one of the two
// highest: 1, or 3 if one of the four scores is NaN.
template <bool CONFIDENCE>
ALWAYS_INLINE void find_candidates(const Corners& corners, int64_t objects, uint8_t* flags) {
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Floats lowest = Floats{} - INF;
  Floats first = lowest, second = lowest, greatest[MAX_OBJECTS / LANES];
  for (int64_t k = 0; k < objects; k += LANES) {
    const Floats a = load(corners.top_left + k), b = load(corners.top_right + k);
    const Floats c = load(corners.bottom_left + k), d = load(corners.bottom_right + k);
    const Floats sum = (a + b) + (c + d);
    greatest[k / LANES] = sum == sum ? larger(larger(a, b), larger(c, d)) : -lowest;
    const Floats least = lane < (int32_t)(objects - k) ? smaller(smaller(a, b), smaller(c, d)) : lowest;
    second = larger(second, smaller(first, least));
    first = larger(first, least);
  }
  const float bound = reduce<CONFIDENCE>(first, second);
  for (int64_t k = 0; k < objects; k += LANES) {
    const Floats most = greatest[k / LANES];
    const Ints chosen = ((most >= Floats{} + bound) & 1) | ((most == -lowest) & 2);
    const Ints real = lane < (int32_t)(objects - k);
    const Bytes bytes = __builtin_convertvector(chosen & real, Bytes);
    std::memcpy(flags + k, &bytes, sizeof(bytes));
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
      : stride(round_up(pixels, LANES) + LANES), labels(ROWS * stride), confidence(ROWS * stride) {}
};

// Labels of pixels begin..end of `rows` rows; `across` and `down` are the shares of the later patch.
template <bool CONFIDENCE>
ALWAYS_INLINE void label_cell(
    const Corners& corners, const Candidates& found, int64_t objects, int64_t begin, int64_t end, const float* across,
    const float* down, int64_t rows, int64_t stride, uint8_t* labels, uint16_t* confidence) {
  if (found.undefined >= 0 || (!CONFIDENCE && found.count == 1)) {
    const uint8_t object = (uint8_t)(found.undefined >= 0 ? found.undefined : found.object[0]);
    const Bytes label = Bytes{} + object;
    const Halves nan = Halves{} + (uint16_t)0x7e00;
    for (int64_t x = begin; x < end; x += LANES) {
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(labels + r * stride + x, &label, sizeof(label));
        if (CONFIDENCE) std::memcpy(confidence + r * stride + x, &nan, sizeof(nan));
      }
    }
    return;
  }
  Floats u[MAX_OBJECTS], v[MAX_OBJECTS];
  for (int64_t x = begin; x < end; x += LANES) {
    const Floats t = load(across + x);
    for (int64_t c = 0; c < found.count; ++c) {
      const int64_t k = found.object[c];
      u[c] = corners.top_left[k] + t * (corners.top_right[k] - corners.top_left[k]);
      v[c] = corners.bottom_left[k] + t * (corners.bottom_right[k] - corners.bottom_left[k]) - u[c];
    }
    for (int64_t r = 0; r < rows; ++r) {
      Floats best = u[0] + down[r] * v[0], second = Floats{} + (objects == 1 ? 0.0f : -INF);
      Ints label = Ints{} + found.object[0];
      for (int64_t c = 1; c < found.count; ++c) {
        const Floats score = u[c] + down[r] * v[c];
        const Ints better = score > best;
        if (CONFIDENCE) second = larger(second, better ? best : score);
        best = better ? score : best;
        label = better ? Ints{} + found.object[c] : label;
      }
      const Bytes bytes = __builtin_convertvector(label, Bytes);
      std::memcpy(labels + r * stride + x, &bytes, sizeof(bytes));
      if (CONFIDENCE) {
        const Halves margin = to_float16(best - second);
        std::memcpy(confidence + r * stride + x, &margin, sizeof(margin));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- areas and boxes

// Adds row `y` of labels to areas and boxes (x0, y0, x1, y1; ends excluded), run by run. Reads up to 8 bytes past the row.
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
  Frame frame(job);
  const int64_t pixels = job.columns.start.back(), height = job.rows.start.back();
  Band band(pixels);
  const int64_t *start = job.columns.start.data(), objects = job.objects, padded = frame.padded;
  std::vector<uint8_t> flags((job.width + 1) * padded);
  Candidates found;
  for (int64_t index = begin; index < end; ++index) {
    start_frame(job, index, frame);
    for (int64_t row = 0; row <= job.height; ++row) {
      if (job.rows.start[row] == job.rows.start[row + 1]) continue;
      const float* top = scores_of(job, std::max<int64_t>(row - 1, 0), frame);
      const float* bottom = scores_of(job, std::min(row, job.height - 1), frame);
      const auto corners = [&](int64_t column) __attribute__((always_inline)) {
        const int64_t left = column * padded, right = left + padded;
        return Corners{top + left, top + right, bottom + left, bottom + right};
      };
      // Apart from the loop below, whose branches then need not wait for sums and comparisons.
      for (int64_t column = 0; column <= job.width; ++column) {
        find_candidates<CONFIDENCE>(corners(column), objects, flags.data() + column * padded);
      }
      for (int64_t y = job.rows.start[row]; y < job.rows.start[row + 1]; y += ROWS) {
        const int64_t rows = std::min(ROWS, job.rows.start[row + 1] - y);
        for (int64_t column = 0; column <= job.width; ++column) {
          if (start[column] == start[column + 1]) continue;
          list_candidates(flags.data() + column * padded, objects, found);
          label_cell<CONFIDENCE>(corners(column), found, objects, start[column], start[column + 1],
              job.columns.share.data(), job.rows.share.data() + y, rows, band.stride, band.labels.data(),
              band.confidence.data());
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t place = (index * height + y + r) * pixels, counts = index * job.objects;
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

std::tuple<Tensor, Tensor, Tensor, Tensor> propagate_labels(
    const Tensor& image, const Tensor& video, const std::optional<Tensor>& merged, int64_t height, int64_t width,
    int64_t out_height, int64_t out_width, bool confidence, bool statistics) {
  const int64_t batch = image.size(0), frames = image.size(1), objects = video.size(3);
  using torch::stable::new_empty, torch::stable::new_zeros;
  const std::vector<int64_t> pixels{batch, frames, out_height, out_width}, none{0};
  Tensor labels = new_empty(image, pixels, ScalarType::Byte);
  Tensor margins = new_empty(image, confidence ? pixels : none, ScalarType::Half);
  const std::vector<int64_t> counts{batch, frames, objects}, corners{batch, frames, objects, 4};
  Tensor areas = new_zeros(image, statistics ? counts : none, ScalarType::Int);
  Tensor boxes = new_zeros(image, statistics ? corners : none, ScalarType::Int);
  const std::optional<Tensor> clusters = merged ? std::optional(torch::stable::contiguous(*merged)) : std::nullopt;
  const Job job{
      Map(image),
      Map(video),
      clusters ? static_cast<const int64_t*>(clusters->const_data_ptr()) : nullptr,
      frames,
      height,
      width,
      image.size(3),
      objects,
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
