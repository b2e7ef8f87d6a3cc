// The CUDA library as a program for the CPU, so that its kernel can be tested without a GPU.
//
// A launch runs its blocks one after the other, each of whose threads is a thread of the CPU. What
// only a device can show is left out: its own square root and reciprocal, and how accesses are
// compiled (bench/aot_cuda.py looks at that).

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __grid_constant__
#undef __launch_bounds__
#define __global__ static
#define __device__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define MIRROR_FN inline
#define MIRROR_SLOW inline
#define MIRROR_APART inline
#define MIRROR_UNROLL

namespace {

thread_local uint3 threadIdx, blockIdx;
std::barrier<>* block_barrier;

void __syncthreads() { block_barrier->arrive_and_wait(); }

void atomicMax(int* at, int value) {
  std::atomic_ref<int> shared(*at);
  for (int seen = shared; seen < value && !shared.compare_exchange_weak(seen, value);) {}
}

float rsqrt(float d) { return 1 / std::sqrt(d); }
float rough_rsqrt(float d) { return rsqrt(d); }
float reciprocal(float x) { return 1 / x; }
float abs(float x) { return std::fabs(x); }
float product(float x, float y) {
  volatile float xy = x * y;  // rounded before anything is added
  return xy;
}
bool any(bool x) { return x; }
template <class Wide> void write_back(Wide* at, Wide value) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(Wide)) std::abort();  // as a device would
  *at = value;
}

}  // namespace

// There is no device to guard, and no stream.
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "no error"; }

#include "../csrc/step_cuda.cu"

extern "C" cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                        size_t, cudaStream_t) {
  const auto run = reinterpret_cast<decltype(&step_kernel)>(const_cast<void*>(kernel));
  std::barrier<> threads_of_block(block.x), between_blocks(block.x);
  block_barrier = &threads_of_block;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < block.x; ++i) {
    threads.emplace_back([&, i] {
      threadIdx.x = i;
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        run(*static_cast<const Launch*>(arguments[0]));
        between_blocks.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}

STABLE_TORCH_LIBRARY_IMPL(mirror_opt_cuda, CPU, m) { m.impl("step_", TORCH_BOX(&step_)); }
