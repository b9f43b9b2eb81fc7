// Data of label maps that all levels of the CPU share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace slotkernels {

constexpr int64_t MAX_OBJECTS = 256;  // labels are bytes
constexpr int64_t PATCHES = 8;        // whose scores are summed side by side
constexpr int64_t ROWS = 16;          // of pixels that are labelled together
constexpr int64_t SLACK = 16;         // numbers past the end of a row that a vector may reach

inline int64_t whole(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// One direction of the interpolation. Cell c lies between patches c - 1 and c, clamped to those that exist. Pixel x is
// at (x + 1/2) patches / pixels - 1/2, computed in integers, so that rounding cannot change its cell.
struct Axis {
  int64_t patches, pixels;
  std::vector<int64_t> start;  // [patches + 2] first pixel of each cell
  std::vector<float> share;    // [pixels + SLACK] of the later patch

  Axis(int64_t patches, int64_t pixels)
      : patches(patches), pixels(pixels), start(patches + 2), share(pixels + SLACK) {
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

enum class Storage { FLOAT, BFLOAT, HALF };

// An attention map [B, T, rows, columns]; strides are in bytes.
struct Map {
  const char* data;
  Storage storage;
  int64_t strides[4];
};

struct Labelling {
  Map image, video;       // [B, T, M, N], [B, T, N, K]
  const int64_t* merged;  // [B, K] or nullptr: the cluster of each object
  int64_t frames, slots, objects;
  Axis rows, columns;
  uint8_t* labels;       // [B, T, H, W]
  uint16_t* confidence;  // [B, T, H, W] or nullptr: float16
  int32_t* areas;        // [B, T, K] or nullptr
  int32_t* boxes;        // [B, T, K, 4]
};

// Data of a thread's current frame. Allocated here, because code of one level must not define functions that other
// levels may call.
struct Frame {
  int64_t padded;                  // objects, rounded up
  int64_t stride;                  // of rows of pixels
  const char* image;               // the frame's attention
  int64_t held[2];                 // which rows of patches `scores` are of
  std::vector<float> patches;      // [PATCHES, N], where they cannot be read in place
  std::vector<float> video;        // [N, padded], columns of merged objects summed
  std::vector<float> scores[2];    // of an even and an odd row of patches [1 + width rounded up + 1, padded]
  std::vector<uint8_t> flags;      // of the cells of a row [width + 1, padded]
  std::vector<uint8_t> labels;     // [ROWS, stride]
  std::vector<uint16_t> margins;   // [ROWS, stride]

  explicit Frame(const Labelling& job)
      : padded(whole(job.objects, SLACK)),
        stride(whole(job.columns.pixels, SLACK) + SLACK),
        patches(PATCHES * job.slots),
        video(job.slots * padded),
        flags((job.columns.patches + 1) * padded),
        labels(ROWS * stride),
        margins(job.confidence ? ROWS * stride : 0) {
    for (auto& row : scores) row.resize((whole(job.columns.patches, PATCHES) + 2) * padded);
  }
};

}  // namespace slotkernels
