// The parts of CUDA that a kernel needs to run without a GPU: one CPU thread for each thread of a block.
// With ThreadSanitizer it detects a missing __syncthreads or __syncwarp.
#pragma once

#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct Index {
  unsigned int x;
};
struct alignas(16) double2 {
  double x, y;
};

inline thread_local Index threadIdx, blockIdx;
inline std::unique_ptr<std::barrier<>> whole_block, first_warp;
inline double exchanged[32];

inline void __syncthreads() { whole_block->arrive_and_wait(); }
inline void __syncwarp() { first_warp->arrive_and_wait(); }  // only the first warp of a block may call it

template <class T>
T __shfl_xor_sync(unsigned int, T mine, int step) {
  exchanged[threadIdx.x] = static_cast<double>(mine);
  __syncwarp();
  const T other = static_cast<T>(exchanged[threadIdx.x ^ step]);
  __syncwarp();
  return other;
}

// kernel<<<blocks, threads>>>(arguments), one block after the other.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned int blocks, unsigned int threads, const Arguments&... arguments) {
  for (unsigned int block = 0; block < blocks; ++block) {
    whole_block = std::make_unique<std::barrier<>>(threads);
    first_warp = std::make_unique<std::barrier<>>(32);
    std::vector<std::thread> running;
    for (unsigned int i = 0; i < threads; ++i)
      running.emplace_back([&, i] {
        threadIdx.x = i;
        blockIdx.x = block;
        kernel(arguments...);
      });
    for (std::thread& thread : running) thread.join();
  }
}
