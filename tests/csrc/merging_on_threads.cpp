// Runs the CUDA kernel of clustering on CPU threads and compares its labels with those of one lane.

#include <cstdio>
#include <cstdlib>
#include <random>

#include "gpu_on_threads.h"

#include "../../csrc/cuda/merging.cuh"

using namespace slotkernels;

namespace {

struct Labels {
  std::vector<int64_t> labels, clusters;
  bool operator==(const Labels&) const = default;
};

// The oracle: plain loops for the products, then the same clustering on one lane, as in csrc/cpu/merging.cpp.
Labels on_one_lane(const std::vector<float>& slots, const bool* valid, int batch, int count, int width, Rule rule) {
  Labels result{std::vector<int64_t>(batch * count), std::vector<int64_t>(batch)};
  std::vector<double> doubles(count * (count + 1));
  std::vector<int> integers(4 * count);
  for (int b = 0; b < batch; ++b) {
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < count; ++j) {
        double sum = 0;
        for (int d = 0; d < width; ++d)
          sum += static_cast<double>(slots[(b * count + i) * width + d]) * slots[(b * count + j) * width + d];
        doubles[i * count + j] = sum;
      }
    int* ints = integers.data();
    const Problem problem{count,        count, valid == nullptr ? nullptr : valid + b * count, doubles.data(),
                          &doubles[count * count], ints, ints + count, ints + 2 * count, ints + 3 * count};
    distances_of_products(OneLane{}, problem);
    cluster(OneLane{}, problem, rule, &result.labels[b * count], &result.clusters[b]);
  }
  return result;
}

Labels on_threads(const std::vector<float>& slots, const bool* valid, int batch, int count, int width, Rule rule) {
  Labels result{std::vector<int64_t>(batch * count, -7), std::vector<int64_t>(batch, -7)};
  std::vector<double> scratch(batch * count * count);
  const Arguments arguments{slots.data(), valid, count, width, rule, scratch.data(), result.labels.data(), result.clusters.data()};
  if (count <= WARP)
    launch(cluster_kernel<WARP>, batch, WARP, arguments);
  else
    launch(cluster_kernel<MOST_SLOTS>, batch, MOST_SLOTS, arguments);
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937 random(0);
  const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
  int problems = 0;
  for (int argument = 1; argument < argc; ++argument) {
    const int count = std::atoi(argv[argument]), batch = 2;
    for (int linkage : {COMPLETE, AVERAGE, SINGLE}) {
      // Small integers, so products are exact and distances tie. More numbers in a slot than are loaded at a time.
      const int width = 3 + below(20);
      std::vector<float> slots(batch * count * width);
      for (float& number : slots) number = static_cast<float>(below(3) - 1);
      const std::unique_ptr<bool[]> mask(new bool[batch * count]);
      for (int i = 0; i < batch * count; ++i) mask[i] = below(4) != 0;
      const bool by_count = below(2) == 0;
      const Rule rule{linkage, by_count ? NEVER : 0.2 + 0.2 * below(5), by_count ? 1 + below(count) : 1, 1 + below(2)};
      const bool* valid = below(2) == 0 ? nullptr : mask.get();
      if (on_threads(slots, valid, batch, count, width, rule) != on_one_lane(slots, valid, batch, count, width, rule)) {
        std::printf("different labels: %d slots of width %d, linkage %d\n", count, width, linkage);
        return 1;
      }
      problems += batch;
    }
  }
  std::printf("%d problems agree\n", problems);
}
