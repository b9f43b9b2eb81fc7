// Arguments and results of the ops that make label maps, as tensors and as plain pointers for the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <utility>

#include "propagation.h"
#include "tensors.h"

namespace slotkernels {

using LabelTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // labels, confidence, areas, boxes

inline Map view(const Tensor& tensor) {
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

// What to compute, and the tensors that it is written to. `merged` is contiguous.
inline std::pair<Labelling, LabelTensors> label_job(const Tensor& image, const Tensor& video,
                                                    const Maybe& merged, Axis rows, Axis columns,
                                                    bool confidence, bool statistics) {
  const int64_t batch = image.size(0), frames = image.size(1), objects = video.size(3);
  const Sizes none{0}, pixels{batch, frames, rows.pixels, columns.pixels};
  const Sizes counts{batch, frames, objects}, corners{batch, frames, objects, 4};
  using torch::stable::new_zeros;
  Tensor labels = empty(pixels, ScalarType::Byte), margins = empty(confidence ? pixels : none, ScalarType::Half);
  Tensor areas = new_zeros(image, statistics ? counts : none, ScalarType::Int);
  Tensor boxes = new_zeros(image, statistics ? corners : none, ScalarType::Int);

  Labelling job{view(image),
                view(video),
                merged ? merged->const_data_ptr<int64_t>() : nullptr,
                frames,
                image.size(3),
                objects,
                std::move(rows),
                std::move(columns),
                labels.mutable_data_ptr<uint8_t>()};
  if (confidence) job.confidence = static_cast<uint16_t*>(margins.mutable_data_ptr());
  if (statistics) {
    job.areas = areas.mutable_data_ptr<int32_t>();
    job.boxes = boxes.mutable_data_ptr<int32_t>();
  }
  return {std::move(job), {labels, margins, areas, boxes}};
}

}  // namespace slotkernels
