// The multi-tensor step on CUDA, without a just-in-time compiler: tensors in, a launch out.
//
// Only the stable ABI of LibTorch is used, so that one binary serves torch 2.11 and newer. Shapes
// and dtypes are checked by the caller (mirror_opt/ops/multi_tensor.py).

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <optional>

#ifdef __CUDACC__  // tests/cuda_on_host.cpp brings its own
#define MIRROR_FN __device__ __forceinline__
#define MIRROR_SLOW __device__ __noinline__
#define MIRROR_APART MIRROR_SLOW  // a call costs less than the registers of two ways in one kernel
#define MIRROR_UNROLL _Pragma("unroll 2")  // with four elements a thread more only costs registers

namespace {

// Of d >= 1 and of slopes: neither is ever denormal, so nothing has to guard against that.
MIRROR_FN float rsqrt(float d) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return r;
}
MIRROR_FN float rough_rsqrt(float d) { return rsqrt(d); }
MIRROR_FN float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
MIRROR_FN float abs(float x) { return fabsf(x); }
MIRROR_FN float product(float x, float y) { return __fmul_rn(x, y); }
MIRROR_FN bool any(bool x) { return x; }
// One access: an assignment may be split into its members.
template <class Wide> MIRROR_FN void write_back(Wide* at, Wide value) { __stwb(at, value); }

}  // namespace
#endif

#include "cuda_kernel.h"  // after the functions that it calls
#include "stored.h"

using torch::stable::Tensor;

namespace {

const float* floats(const Tensors& list, size_t i) {
  return list.empty() ? nullptr : static_cast<const float*>(list[i].const_data_ptr());
}

const float* number(const std::optional<Tensor>& x) {
  return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
}

void step_(Tensors params, Tensors grads, Tensor lr, Tensors gains, Tensors w, Tensors s, Tensors c,
           Tensors buffers, Tensors anchors, Tensors duals, Tensors dual_inits,
           std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, Tensor status,
           double momentum, double weight_decay, bool nesterov, bool maximize, bool primal) {
  const auto device = params[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  Launch launch{};
  launch.options.momentum = static_cast<float>(momentum);
  launch.options.primal = primal;
  launch.options.nesterov = nesterov;
  launch.weight_decay = static_cast<float>(weight_decay);
  launch.maximize = maximize;
  launch.units = static_cast<int>(w[0].size(0));
  launch.lr_is_double = lr.scalar_type() == torch::headeronly::ScalarType::Double;
  if (lr.is_cuda()) {
    launch.lr = lr.const_data_ptr();
  } else {
    const void* value = lr.const_data_ptr();
    launch.options.lr = launch.lr_is_double ? static_cast<float>(*static_cast<const double*>(value))
                                            : *static_cast<const float*>(value);
  }
  launch.grad_scale = number(grad_scale);
  launch.found_inf = number(found_inf);
  launch.status = static_cast<int*>(status.mutable_data_ptr());

  int64_t blocks = 0;
  const auto flush = [&] {
    if (blocks) {
      void* arguments[] = {&launch};
      const cudaError_t error = cudaLaunchKernel(
          reinterpret_cast<const void*>(&step_kernel), dim3(static_cast<unsigned>(blocks)),
          dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream));
      STD_TORCH_CHECK(error == cudaSuccess, "mirror_opt step_: ", cudaGetErrorString(error));
    }
    launch.count = 0;
    blocks = 0;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t total = params[i].numel(), columns = w[i].size(1);
    if (total == 0) continue;
    const int64_t n = total / columns, more = blocks_of(n, columns);
    STD_TORCH_CHECK(more <= INT32_MAX, "mirror_opt step_: a tensor of ", total, " elements in ",
                    columns, " rows needs too many blocks: split it");
    if (launch.count == kMaxEntries || blocks + more > INT32_MAX) flush();
    launch.entries[launch.count++] = {changed(params, i), stored(grads, i), changed(buffers, i),
                                      stored(anchors, i), changed(duals, i), stored(dual_inits, i),
                                      floats(gains, i), floats(w, i), floats(s, i), floats(c, i),
                                      n, columns, static_cast<int>(blocks)};
    blocks += more;
  }
  flush();
}

}  // namespace

STABLE_TORCH_LIBRARY(mirror_opt_cuda, m) {
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor lr, Tensor[] gains, Tensor[] w, Tensor[] s,"
      " Tensor[] c, Tensor(b!)[] buffers, Tensor[] anchors, Tensor(c!)[] duals, Tensor[] dual_inits,"
      " Tensor? grad_scale, Tensor? found_inf, Tensor(d!) status, float momentum,"
      " float weight_decay, bool nesterov, bool maximize, bool primal) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mirror_opt_cuda, CUDA, m) { m.impl("step_", TORCH_BOX(&step_)); }
