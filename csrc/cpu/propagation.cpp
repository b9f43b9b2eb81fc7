// Label maps on CPUs: kernels/slotkernels/propagation/reference.py says what is computed. Threads share out the frames.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "propagation.h"

#define KERNELS "propagation_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Map view(const Tensor& tensor) {
  Map map{static_cast<const char*>(tensor.const_data_ptr()), Storage::FLOAT, {}};
  switch (tensor.scalar_type()) {
    case ScalarType::Float: break;
    case ScalarType::BFloat16: map.storage = Storage::BFLOAT; break;
    case ScalarType::Half: map.storage = Storage::HALF; break;
    default: STD_TORCH_CHECK(false, "slotkernels: expected float32, bfloat16 or float16 attention");
  }
  const int64_t itemsize = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = 0; d < 4; ++d) map.strides[d] = tensor.stride(d) * itemsize;
  return map;
}

// `merged` is contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor> propagate_labels(const Tensor& image, const Tensor& video,
                                                            const std::optional<Tensor>& merged, int64_t height,
                                                            int64_t width, int64_t out_height, int64_t out_width,
                                                            bool confidence, bool statistics) {
  const int64_t batch = image.size(0), frames = image.size(1), objects = video.size(3);
  const std::vector<int64_t> none{0}, pixels{batch, frames, out_height, out_width};
  const std::vector<int64_t> counts{batch, frames, objects}, corners{batch, frames, objects, 4};
  using torch::stable::new_empty, torch::stable::new_zeros;
  Tensor labels = new_empty(image, pixels, ScalarType::Byte);
  Tensor margins = new_empty(image, confidence ? pixels : none, ScalarType::Half);
  Tensor areas = new_zeros(image, statistics ? counts : none, ScalarType::Int);
  Tensor boxes = new_zeros(image, statistics ? corners : none, ScalarType::Int);

  Labelling job{view(image),
                view(video),
                merged ? merged->const_data_ptr<int64_t>() : nullptr,
                frames,
                image.size(3),
                objects,
                Axis(height, out_height),
                Axis(width, out_width),
                labels.mutable_data_ptr<uint8_t>()};
  if (confidence) job.confidence = static_cast<uint16_t*>(margins.mutable_data_ptr());
  if (statistics) {
    job.areas = areas.mutable_data_ptr<int32_t>();
    job.boxes = boxes.mutable_data_ptr<int32_t>();
  }
  const auto label_frames = BEST_LEVEL(label_frames);
  torch::stable::parallel_for(0, batch * frames, 1, [&](int64_t begin, int64_t end) {
    Frame frame(job);
    label_frames(job, begin, end, frame);
  });
  return {labels, margins, areas, boxes};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) {
  m.impl("propagate_labels", TORCH_BOX(&slotkernels::propagate_labels));
}
