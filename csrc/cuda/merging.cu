// The op of merging.cuh: same schema as on CPUs, on the current stream, with memory of torch's allocator.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "merging.cuh"

namespace slotkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> cluster_slots(Tensor slots, std::optional<Tensor> mask, double threshold, int64_t n_clusters,
                                         int64_t linkage, int64_t min_clusters) {
  const int64_t batch = slots.size(0), count = slots.size(1), width = slots.size(2);
  STD_TORCH_CHECK(count <= MOST_SLOTS, "cluster_slots takes at most ", MOST_SLOTS, " slots");
  const bool one_warp = count <= WARP;
  const Tensor labels = torch::stable::new_empty(slots, {batch, count}, ScalarType::Long);
  const Tensor clusters = torch::stable::new_empty(slots, {batch}, ScalarType::Long);
  const Tensor scratch = torch::stable::new_empty(slots, {one_warp ? 0 : batch, count, count}, ScalarType::Double);
  if (batch == 0) return {labels, clusters};

  const Rule rule{static_cast<int>(linkage), threshold, static_cast<int>(n_clusters), static_cast<int>(min_clusters)};
  const Arguments arguments{slots.const_data_ptr<float>(),
                            mask ? mask->const_data_ptr<bool>() : nullptr,
                            static_cast<int>(count),
                            static_cast<int>(width),
                            rule,
                            scratch.mutable_data_ptr<double>(),
                            labels.mutable_data_ptr<int64_t>(),
                            clusters.mutable_data_ptr<int64_t>()};
  const auto device = slots.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto blocks = static_cast<unsigned int>(batch);
  if (one_warp)
    cluster_kernel<WARP><<<blocks, WARP, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  else
    cluster_kernel<MOST_SLOTS><<<blocks, MOST_SLOTS, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {labels, clusters};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CUDA, m) { m.impl("cluster_slots", TORCH_BOX(&slotkernels::cluster_slots)); }
