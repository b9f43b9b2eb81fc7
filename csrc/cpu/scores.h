// Scores of patches: products of image and video attention, of two rows of patches of a frame at a time. And where
// pixels lie between patches.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "vectors.h"

namespace slotkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t PATCHES = 8;        // whose scores are summed side by side
constexpr int64_t MAX_OBJECTS = 256;  // labels are bytes

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// One direction of the interpolation. Cell c lies between patches c - 1 and c, clamped to those that exist. Pixel x is
// at (x + 1/2) patches / pixels - 1/2, computed in integers: no rounding decides on a pixel's cell.
struct Axis {
  std::vector<int64_t> start;  // [patches + 2] first pixel of each cell
  std::vector<float> share;    // [pixels + WIDTH] of the later patch

  Axis(int64_t patches, int64_t pixels) : start(patches + 2), share(pixels + WIDTH) {
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

// Attention of all frames.
struct Attention {
  Map image, video;       // [B, T, M, N], [B, T, N, K]
  const int64_t* merged;  // [B, K] or nullptr: the cluster of each object
  int64_t frames, height, width, slots, objects;
};

template <class Convert>
ALWAYS_INLINE void widen(const char* from, int64_t count, int64_t stride, float* to, Convert convert) {
  for (int64_t i = 0; i < count; i += WIDTH) {
    Half8 piece{};
    const int64_t rest = std::min(WIDTH, count - i);
    if (stride == 2 && rest == WIDTH) {
      std::memcpy(&piece, from + 2 * i, sizeof(piece));
    } else {
      for (int64_t l = 0; l < rest; ++l) std::memcpy((char*)&piece + 2 * l, from + (i + l) * stride, 2);
    }
    const Float8 wide = convert(piece);
    std::memcpy(to + i, &wide, rest * sizeof(float));
  }
}

// `count` numbers that are `stride` bytes apart, as floats.
ALWAYS_INLINE void read(const char* from, ScalarType type, int64_t count, int64_t stride, float* to) {
  if (type == ScalarType::BFloat16) {
    widen(from, count, stride, to, [](Half8 v) __attribute__((always_inline)) { return from_bfloat16(v); });
  } else if (type == ScalarType::Half) {
    widen(from, count, stride, to, [](Half8 v) __attribute__((always_inline)) { return from_float16(v); });
  } else if (stride == sizeof(float)) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i, from + i * stride, sizeof(float));
  }
}

// What a thread keeps of its current frame.
struct Frame {
  int64_t padded;                // objects, rounded up
  std::vector<float> image;      // patches [PATCHES, N], where they cannot be read in place
  std::vector<float> video;      // [N, padded], columns of merged objects summed
  std::vector<float> scores[2];  // of an even and an odd row of patches [1 + width rounded up + 1, padded]
  int64_t held[2];               // which rows these are
  const char* base;              // of the frame's image attention

  explicit Frame(const Attention& attention)
      : padded(round_up(attention.objects, WIDTH)),
        image(PATCHES * attention.slots),
        video(attention.slots * padded) {
    for (auto& row : scores) row.resize((round_up(attention.width, PATCHES) + 2) * padded);
  }
};

ALWAYS_INLINE void start_frame(const Attention& attention, int64_t index, Frame& frame) {
  const int64_t b = index / attention.frames, t = index % attention.frames;
  frame.base = attention.image.data + b * attention.image.strides[0] + t * attention.image.strides[1];
  frame.held[0] = frame.held[1] = -1;
  const Map& from = attention.video;
  const char* video = from.data + b * from.strides[0] + t * from.strides[1];
  float row[MAX_OBJECTS];
  for (int64_t n = 0; n < attention.slots; ++n) {
    float* out = frame.video.data() + n * frame.padded;
    std::fill(out, out + frame.padded, 0.0f);
    read(video + n * from.strides[2], from.type, attention.objects, from.strides[3], row);
    for (int64_t k = 0; k < attention.objects; ++k) {
      const int64_t object = attention.merged ? attention.merged[b * attention.objects + k] : k;
      if (object >= 0 && object < attention.objects) out[object] += row[k];
    }
  }
}

// Scores of row `i` of patches, [width + 2, padded]: first and last patch twice.
ALWAYS_INLINE const float* scores_of(const Attention& attention, int64_t i, Frame& frame) {
  float* scores = frame.scores[i % 2].data();
  if (frame.held[i % 2] == i) return scores;
  frame.held[i % 2] = i;
  const int64_t slots = attention.slots, padded = frame.padded, *strides = attention.image.strides;
  const bool compact = strides[2] == slots * strides[3];  // patches follow one another: read all of them as one
  const bool ready = compact && strides[3] == sizeof(float) && attention.image.type == ScalarType::Float;
  for (int64_t j = 0; j < attention.width; j += PATCHES) {
    const char* from = frame.base + (i * attention.width + j) * strides[2];
    const float* image = reinterpret_cast<const float*>(from);
    if (const int64_t count = std::min(PATCHES, attention.width - j); !ready || count < PATCHES) {
      for (int64_t p = 0; p < (compact ? 1 : count); ++p) {
        const int64_t numbers = compact ? count * slots : slots;
        read(from + p * strides[2], attention.image.type, numbers, strides[3], frame.image.data() + p * slots);
      }
      image = frame.image.data();
    }
    for (int64_t k = 0; k < padded; k += WIDTH) {
      Float8 sums[PATCHES] = {};
      for (int64_t n = 0; n < slots; ++n) {
        const Float8 video = load8(frame.video.data() + n * padded + k);
        for (int64_t p = 0; p < PATCHES; ++p) sums[p] += image[p * slots + n] * video;
      }
      for (int64_t p = 0; p < PATCHES; ++p) put(scores + (1 + j + p) * padded + k, sums[p]);
    }
  }
  std::memcpy(scores, scores + padded, padded * sizeof(float));
  std::memcpy(scores + (attention.width + 1) * padded, scores + attention.width * padded, padded * sizeof(float));
  return scores;
}

}  // namespace
}  // namespace slotkernels
