// Label maps on CPUs, as in kernels/slotkernels/propagation/reference.py. One thread computes a frame.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "label_job.h"

#define KERNELS "propagation_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

// `merged` is contiguous.
LabelTensors propagate_labels(const Tensor& image, const Tensor& video, const Maybe& merged,
                              int64_t height, int64_t width, int64_t out_height, int64_t out_width, bool confidence,
                              bool statistics) {
  const auto [job, results] = label_job(image, video, merged, Axis(height, out_height), Axis(width, out_width),
                                        confidence, statistics);
  const auto label_frames = BEST_LEVEL(label_frames);
  torch::stable::parallel_for(0, image.size(0) * image.size(1), 1, [&](int64_t begin, int64_t end) {
    Frame frame(job);
    label_frames(job, begin, end, frame);
  });
  return results;
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("propagate_labels", TORCH_BOX(&slotkernels::propagate_labels));
}
