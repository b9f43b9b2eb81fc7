// Clustering of slots on CPUs, as in kernels/slotkernels/merging/reference.py. One thread solves a problem.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../linkage.h"
#include "tensors.h"

#define KERNELS "merging_kernels.h"
#include "levels.h"

namespace slotkernels {
namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 18;  // multiplications
constexpr int64_t CLUSTERING = 200;          // its time for each pair of slots, in multiplications

std::tuple<Tensor, Tensor> cluster_slots(Tensor slots, Maybe mask, double threshold, int64_t n_clusters,
                                         int64_t linkage, int64_t min_clusters) {
  const int64_t batch = slots.size(0), count = slots.size(1), width = slots.size(2);
  const Tensor labels = empty({batch, count}, ScalarType::Long);
  const Tensor counts = empty({batch}, ScalarType::Long);
  const float* from = slots.const_data_ptr<float>();
  const bool* valid = mask ? mask->const_data_ptr<bool>() : nullptr;
  int64_t *to_labels = labels.mutable_data_ptr<int64_t>(), *to_counts = counts.mutable_data_ptr<int64_t>();
  const Rule rule{static_cast<int>(linkage), threshold, static_cast<int>(n_clusters), static_cast<int>(min_clusters)};

  const auto cluster_sets = BEST_LEVEL(cluster_sets);
  const int64_t grain = 1 + WORTH_A_THREAD / (count * count * (width + CLUSTERING));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    cluster_sets(rule, from, valid, count, width, begin, end, to_labels, to_counts);
  });
  return {labels, counts};
}

}  // namespace
}  // namespace slotkernels

STABLE_TORCH_LIBRARY_IMPL(slotkernels_native, CPU, m) { m.impl("cluster_slots", TORCH_BOX(&slotkernels::cluster_slots)); }
