// Guided label maps on CPUs, as in kernels/slotkernels/guided_labels/reference.py. Each thread computes some frames or,
// if there are fewer frames than threads, some bands of each frame. Results are the same bit for bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "guided_labels.h"
#include "label_job.h"

#define KERNELS "guided_labels_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

Guide guide_of(const Tensor& tensor) {
  Guide guide{tensor.const_data_ptr<uint8_t>(), {}};
  for (int64_t d = 0; d < 5; ++d) guide.strides[d] = tensor.stride(d);
  return guide;
}

// `merged` is contiguous.
LabelTensors guided_labels(const Tensor& image, const Tensor& video, const Maybe& merged,
                           const Tensor& guide, int64_t height, int64_t width, int64_t window, double epsilon,
                           int64_t subsample, bool confidence, bool statistics) {
  auto [labelling, results] = label_job(image, video, merged, Axis(height, guide.size(2)), Axis(width, guide.size(3)),
                                        confidence, statistics);
  const Guiding job(std::move(labelling), guide_of(guide), window, static_cast<float>(epsilon), subsample);
  const auto steps = {BEST_LEVEL(prepare_bands), BEST_LEVEL(fit_bands), BEST_LEVEL(label_bands)};
  const auto count = BEST_LEVEL(count_frame);
  const int64_t frames = image.size(0) * image.size(1);
  if (frames >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, frames, 1, [&](int64_t begin, int64_t end) {
      Blocks blocks(job);
      Scratch scratch(job);
      for (int64_t index = begin; index < end; ++index) {
        for (const auto step : steps) step(job, index, 0, job.bands, blocks, scratch);
        if (statistics) count(job, index, scratch);
      }
    });
    return results;
  }
  Blocks blocks(job);
  for (int64_t index = 0; index < frames; ++index) {
    for (const auto step : steps) {
      torch::stable::parallel_for(0, job.bands, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(job);
        step(job, index, begin, end, blocks, scratch);
      });
    }
    if (statistics) {
      Scratch scratch(job);
      count(job, index, scratch);
    }
  }
  return results;
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("guided_labels", TORCH_BOX(&slotkernels::guided_labels));
}
