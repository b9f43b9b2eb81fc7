// Clustering of slots on GPUs: one block a problem, a single warp for up to 32 slots and 256 threads for up to 256.
//
// A block reads its K x D floats once for every 1,280 tiles of 2 x 2 pairs (once for up to 32 slots) through shared
// memory, where they are doubles, and keeps the sums of its tiles in registers. Distances stay in shared memory for a
// warp, and in a scratch of global memory for a block (K^2 doubles, in the L2 cache). Its first warp then clusters.
// Floor: K (K + 1) / 2 products of D doubles; a warp alone is bound by the latency of its 3 K searches.
#pragma once

#include "../linkage.h"

namespace slotkernels {

constexpr int WARP = 32;
constexpr int DEPTH = 16;         // numbers of each slot that are in shared memory at a time
constexpr int TILES = 5;          // tiles of a thread: 16 x 17 / 2 of them cover 32 slots
constexpr int MOST_SLOTS = 256;   // of one problem

// The threads of a block, for loops shared by all.
template <int THREADS>
struct Block {
  static constexpr int WIDTH = THREADS;
  const int lane = threadIdx.x;
  ON_LANES void sync() const { __syncthreads(); }
};

// The first warp, for the clustering itself.
struct Warp {
  static constexpr int WIDTH = WARP;
  const int lane = threadIdx.x;
  ON_LANES void sync() const { __syncwarp(); }
  ON_LANES Nearest nearest(Nearest mine) const {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
      const double distance = __shfl_xor_sync(0xffffffff, mine.distance, step);
      const int index = __shfl_xor_sync(0xffffffff, mine.index, step);
      if (distance < mine.distance || (distance == mine.distance && index < mine.index)) mine = {distance, index};
    }
    return mine;
  }
};

struct Arguments {
  const float* slots;  // [B, K, D]
  const bool* valid;   // [B, K] or null
  int count, width;    // K, D
  Rule rule;
  double* scratch;     // [B, K, K] for more than 32 slots
  int64_t *labels, *clusters;
};

// Products of all pairs of slots of one problem. Tile t joins pairs of slots 2a, 2a + 1 and 2b, 2b + 1 with
// t = b (b + 1) / 2 + a and a <= b. `staged` is [DEPTH, pitch].
template <int THREADS, int PITCH>
__device__ void multiply_pairs(const float* slots, int width, const Problem& problem, double (*staged)[PITCH]) {
  const int count = problem.count, sides = (count + 1) / 2, tiles = sides * (sides + 1) / 2;
  for (int begin = 0; begin < tiles; begin += THREADS * TILES) {
    double sums[TILES][2][2] = {};
    int left[TILES], right[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const int tile = begin + t * THREADS + static_cast<int>(threadIdx.x);
      int b = 0;
      while (b + 1 < sides && (b + 1) * (b + 2) / 2 <= tile) ++b;
      left[t] = 2 * (tile < tiles ? tile - b * (b + 1) / 2 : 0);
      right[t] = 2 * b;
    }
    for (int from = 0; from < width; from += DEPTH) {
      __syncthreads();
      for (int i = threadIdx.x; i < 2 * sides * DEPTH; i += THREADS) {
        const int slot = i / DEPTH, d = i % DEPTH;
        const bool inside = slot < count && from + d < width;
        staged[d][slot] = inside ? slots[static_cast<int64_t>(slot) * width + from + d] : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        if (begin + t * THREADS >= tiles) break;  // for all threads alike
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
          const double2 one = *reinterpret_cast<const double2*>(&staged[d][left[t]]);
          const double2 other = *reinterpret_cast<const double2*>(&staged[d][right[t]]);
          sums[t][0][0] += one.x * other.x;
          sums[t][0][1] += one.x * other.y;
          sums[t][1][0] += one.y * other.x;
          sums[t][1][1] += one.y * other.y;
        }
      }
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      if (begin + t * THREADS + static_cast<int>(threadIdx.x) >= tiles) break;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const int i = left[t] + corner / 2, j = right[t] + corner % 2;
        if (i <= j && j < count) problem.row(i)[j] = problem.row(j)[i] = sums[t][corner / 2][corner % 2];
      }
    }
  }
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS, THREADS == WARP ? 16 : 2) cluster_kernel(Arguments arguments) {
  constexpr bool IN_SHARED = THREADS == WARP;
  constexpr int MOST = IN_SHARED ? WARP : MOST_SLOTS, PITCH = MOST + 2;  // two more: rows of `staged` on other banks
  alignas(16) __shared__ double staged[DEPTH][PITCH];
  __shared__ double distances[IN_SHARED ? MOST * (MOST + 1) : 1];
  __shared__ double heights[MOST];
  __shared__ int sizes[MOST], chain[MOST], lower[MOST], upper[MOST];

  const int count = arguments.count;
  const int64_t block = blockIdx.x;
  Problem problem;
  problem.count = count;
  problem.stride = IN_SHARED ? MOST + 1 : count;
  problem.valid = arguments.valid == nullptr ? nullptr : arguments.valid + block * count;
  problem.distances = IN_SHARED ? distances : arguments.scratch + block * count * count;
  problem.heights = heights;
  problem.sizes = sizes;
  problem.chain = chain;
  problem.lower = lower;
  problem.upper = upper;

  multiply_pairs<THREADS, PITCH>(arguments.slots + block * count * arguments.width, arguments.width, problem, staged);
  __syncthreads();
  distances_of_products(Block<THREADS>{}, problem);
  __syncthreads();
  if (threadIdx.x < WARP)
    cluster(Warp{}, problem, arguments.rule, arguments.labels + block * count, arguments.clusters + block);
}

}  // namespace slotkernels
