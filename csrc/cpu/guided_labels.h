// Data of guided label maps that all levels of the CPU share.
#pragma once

#include "propagation.h"

namespace slotkernels {

constexpr int64_t COLOURS = 3;
constexpr int64_t FIT = 4;    // coefficients of a segment: a slope for each colour, and an offset
constexpr int64_t GUIDE = 9;  // means of the guide: 3 colours, 6 products of two
constexpr int64_t BAND = 16;  // rows of blocks that one thread computes; each band starts new running sums

// Linear interpolation among `size` numbers, at (i + 1/2) numerator / denominator - 1/2 for i < count.
struct Samples {
  std::vector<int32_t> left;
  std::vector<float> share;  // of the number after `left`; 0 at the last one

  Samples(int64_t count, int64_t numerator, int64_t denominator, int64_t size)
      : left(count + SLACK), share(count + SLACK) {
    for (int64_t i = 0; i < count + SLACK; ++i) {
      const int64_t numbers = (2 * std::min(i, count - 1) + 1) * numerator - denominator, unit = 2 * denominator;
      const int64_t place = std::clamp<int64_t>(numbers, 0, unit * (size - 1));
      left[i] = static_cast<int32_t>(place / unit);
      share[i] = static_cast<float>(static_cast<double>(place % unit) / static_cast<double>(unit));
    }
  }
};

// For each row (or column), 1 / (number of rows in the window around it).
inline std::vector<float> window_shares(int64_t size, int64_t window, int64_t length) {
  std::vector<float> shares(length);
  for (int64_t i = 0; i < size; ++i) {
    shares[i] = 1.0f / static_cast<float>(std::min(i + window, size - 1) - std::max<int64_t>(i - window, 0) + 1);
  }
  return shares;
}

// The frames, uint8 [B, T, H, W, 3]; strides are in bytes.
struct Guide {
  const uint8_t* data;
  int64_t strides[5];
};

// A row of blocks has `stride` numbers, with zeros after the last block. A *line* is a row with the margins that
// horizontal sums need: `reach` zeros before it and at least `reach` zeros after it.
struct Guiding {
  Labelling labelling;
  Guide guide;
  int64_t subsample;
  float epsilon;
  int64_t rows, columns;       // of blocks
  int64_t drop, reach;         // a window has so many rows and columns on each side of its centre
  int64_t bands, stride, line;
  Samples patch_rows, patch_columns;        // of blocks, among patches
  Samples block_rows, block_columns;        // of pixels, among blocks
  std::vector<float> row_share, column_share;  // [rows], [stride]

  Guiding(Labelling job, const Guide& frames, int64_t window, float epsilon, int64_t side)
      : labelling(std::move(job)),
        guide(frames),
        subsample(side),
        epsilon(epsilon),
        rows((labelling.rows.pixels + side - 1) / side),
        columns((labelling.columns.pixels + side - 1) / side),
        drop(std::min(window, rows - 1)),
        reach(std::min(window, columns - 1)),
        bands((rows + BAND - 1) / BAND),
        stride(whole(columns, SLACK) + 2 * SLACK),
        line(whole(columns + 2 * reach, SLACK) + 2 * SLACK),
        patch_rows(rows, side * labelling.rows.patches, labelling.rows.pixels, labelling.rows.patches),
        patch_columns(columns, side * labelling.columns.patches, labelling.columns.pixels, labelling.columns.patches),
        block_rows(labelling.rows.pixels, 1, side, rows),
        block_columns(labelling.columns.pixels, 1, side, columns),
        row_share(window_shares(rows, drop, rows)),
        column_share(window_shares(columns, reach, stride)) {}
};

// Intermediate results of a frame.
struct Blocks {
  std::vector<float> masks;          // [h, K, stride] scores of each row of patches, interpolated along x
  std::vector<int64_t> undefined;    // [h] first segment with a score that is not finite, or K
  std::vector<float> guide;          // [rows, COLOURS, stride] mean colours, minus 1/2
  std::vector<float> fits;           // [rows, K, FIT, stride] coefficients, summed along x

  explicit Blocks(const Guiding& job)
      : masks(job.labelling.rows.patches * job.labelling.objects * job.stride),
        undefined(job.labelling.rows.patches),
        guide(job.rows * COLOURS * job.stride),
        fits(job.rows * job.labelling.objects * FIT * job.stride) {}
};

// Memory of a thread. Allocated here, because code of one level must not define functions that other levels may call.
struct Scratch {
  Frame frame;
  std::vector<uint8_t> bytes;         // a row of the guide
  std::vector<uint32_t> totals;       // sums over rows of the guide
  std::vector<float> colours;         // [COLOURS, W rounded up] a row of the guide, minus 1/2
  std::vector<float> guide_sums;      // [GUIDE, line] sums along y
  std::vector<float> mask_sums;       // [K, FIT, line]
  std::vector<float> fit_lines;       // [FIT, line]
  std::vector<float> doubled;         // a line and `reach` more on each side
  std::vector<float> solver;          // [GUIDE, stride] mean colours, and L D L' of their covariance
  std::vector<float> means;           // [FIT, stride]
  std::vector<float> fit_sums;        // [K, FIT, stride] sums along y
  std::vector<float> fit_rows[2];     // [K, FIT, stride] box means, of an even and an odd row of blocks
  std::vector<float> fits;            // [K, FIT, stride] of a row of pixels

  explicit Scratch(const Guiding& job)
      : frame(job.labelling),
        bytes(COLOURS * frame.stride),
        totals(COLOURS * frame.stride),
        colours(COLOURS * frame.stride),
        guide_sums(GUIDE * job.line),
        mask_sums(job.labelling.objects * FIT * job.line),
        fit_lines(FIT * job.line),
        doubled(job.line + 2 * job.reach),
        solver(GUIDE * job.stride),
        means(FIT * job.stride),
        fit_sums(job.labelling.objects * FIT * job.stride),
        fits(job.labelling.objects * FIT * job.stride) {
    for (auto& row : fit_rows) row.resize(fits.size());
  }
};

}  // namespace slotkernels
