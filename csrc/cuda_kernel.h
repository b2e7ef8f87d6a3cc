// The kernel of the multi-tensor step: the mathematics of the CPU library over a list of tensors.
//
// A block works on a stretch of one row, whose coefficients it prepares in shared memory; or, where
// rows are short, its threads take single elements with coefficients of their own. The list travels
// in the kernel's parameters, so that nothing has to be copied to the device and a step can be
// captured in a CUDA graph.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "separable.h"

namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 4;          // elements of a thread at a time: 16 bytes of float
constexpr int kStretch = 4 * kThreads * kLanes;
constexpr int kShortRow = 128;     // below, a thread takes single elements
constexpr int kMaxEntries = 200;   // within 32 KB of kernel parameters

using Quad = Pair<Pair<float>>;

// One parameter, seen as (columns, n), and what goes with it.
struct Entry {
  Stored param, grad, buffer, anchor, dual, dual_init;
  const float *gain, *w, *s, *c;  // gain may be null, for 1; w, s, c (units, columns)
  int64_t n, columns;
  int first_block;  // of the grid
};

struct Launch {
  Entry entries[kMaxEntries];
  Options<float> options;
  int count, units;
  bool maximize;
  float weight_decay;
  const void* lr;  // on the device; null: options.lr holds it
  bool lr_is_double;
  const float *grad_scale, *found_inf;  // null: 1 and 0
  int* status;
};
static_assert(sizeof(Launch) <= 32764, "kernel parameters");

inline int64_t blocks_of(int64_t n, int64_t columns) {
  const auto stretches = [](int64_t length) { return (length + kStretch - 1) / kStretch; };
  return n < kShortRow ? stretches(n * columns) : columns * stretches(n);
}

// Coefficients that a row shares, in shared memory.
struct RowUnits {
  struct alignas(16) Aligned : Unit<float> {};  // its first four are read in one go
  Aligned unit[kMaxUnits];
  Bounds<float> bounds;
  float base;
  int count;

  __device__ const Unit<float>& operator[](int k) const { return unit[k]; }

  // By all threads of the block.
  __device__ void prepare(const Entry& e, int64_t column, int units) {
    for (int k = threadIdx.x; k < units; k += kThreads) {
      const int64_t i = k * e.columns + column;
      static_cast<Unit<float>&>(unit[k]) = make_unit(e.w[i], e.s[i], e.c[i]);
    }
    if (threadIdx.x == 0) count = units;
    __syncthreads();
    if (threadIdx.x == 0) {
      bounds = make_bounds<float>(*this);
      base = sigmas(0.0f, *this);
    }
    __syncthreads();
  }
};

// Coefficients of one column, read where they are.
struct ColumnUnits {
  const float *w, *s, *c;
  int64_t columns;
  int count;
  Bounds<float> bounds;
  float base;

  __device__ ColumnUnits(const Entry& e, int64_t column, int units)
      : w(e.w + column), s(e.s + column), c(e.c + column), columns(e.columns), count(units),
        bounds{}, base{} {
    bounds = make_bounds<float>(*this);
    base = sigmas(0.0f, *this);
  }
  __device__ Unit<float> operator[](int k) const {
    return make_unit(w[k * columns], s[k * columns], c[k * columns]);
  }
};

// One element, or four in one access where all addresses allow it.
template <class V> __device__ V load(const Stored& x, int64_t i);
template <> __device__ float load(const Stored& x, int64_t i) {
  if (!x.data) return 0.0f;
  if (x.type == Storage::f32) return static_cast<const float*>(x.data)[i];
  if (x.type == Storage::f16) return __half2float(static_cast<const __half*>(x.data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(x.data)[i]);
}
template <> __device__ Quad load(const Stored& x, int64_t i) {
  if (!x.data) return Quad{};
  if (x.type == Storage::f32) {
    const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + i);
    return {{v.x, v.y}, {v.z, v.w}};
  }
  const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x.data) + i);
  float2 a, b;
  if (x.type == Storage::f16) {
    a = __half22float2(reinterpret_cast<const __half2&>(v.x));
    b = __half22float2(reinterpret_cast<const __half2&>(v.y));
  } else {
    a = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v.x));
    b = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v.y));
  }
  return {{a.x, a.y}, {b.x, b.y}};
}

__device__ void store(const Stored& x, int64_t i, float value) {
  if (x.type == Storage::f32) static_cast<float*>(x.data)[i] = value;
  else if (x.type == Storage::f16) static_cast<__half*>(x.data)[i] = __float2half_rn(value);
  else static_cast<__nv_bfloat16*>(x.data)[i] = __float2bfloat16_rn(value);
}
__device__ void store(const Stored& x, int64_t i, const Quad& q) {
  if (x.type == Storage::f32) {
    return write_back(reinterpret_cast<float4*>(static_cast<float*>(x.data) + i),
                      float4{q.a.a, q.a.b, q.b.a, q.b.b});
  }
  uint2 v;
  if (x.type == Storage::f16) {
    reinterpret_cast<__half2&>(v.x) = __floats2half2_rn(q.a.a, q.a.b);
    reinterpret_cast<__half2&>(v.y) = __floats2half2_rn(q.b.a, q.b.b);
  } else {
    reinterpret_cast<__nv_bfloat162&>(v.x) = __floats2bfloat162_rn(q.a.a, q.a.b);
    reinterpret_cast<__nv_bfloat162&>(v.y) = __floats2bfloat162_rn(q.b.a, q.b.b);
  }
  write_back(reinterpret_cast<uint2*>(static_cast<uint16_t*>(x.data) + i), v);
}

template <class V, class Units>
__device__ void step(const Entry& e, const Options<float>& options, const Units& units, int64_t i,
                     int& status) {
  const auto get = [i](const Stored& x) { return load<V>(x, i); };
  const Stored gain{const_cast<float*>(e.gain), Storage::f32};
  Elements<V> x{get(e.param),  get(e.grad), e.gain ? get(gain) : V{} + 1.0f, get(e.buffer),
                get(e.anchor), get(e.dual), get(e.dual_init)};
  mirror_step<float>(x, options, units, status);
  store(e.param, i, x.param);
  if (options.dual) store(e.dual, i, x.dual);
  if (options.buffer) store(e.buffer, i, x.buffer);
}

// Whether element i of every tensor begins four elements in one aligned access.
__device__ bool aligned(const Entry& e, int64_t i) {
  uintptr_t low = reinterpret_cast<uintptr_t>(e.gain + (e.gain ? i : 0)) & 15;
  for (const Stored* x : {&e.param, &e.grad, &e.buffer, &e.anchor, &e.dual, &e.dual_init}) {
    const int size = x->type == Storage::f32 ? 4 : 2;
    if (x->data) low |= (reinterpret_cast<uintptr_t>(x->data) + i * size) & (4 * size - 1);
  }
  return low == 0;
}

__device__ Options<float> options_of(const Launch& launch, const Entry& e) {
  Options<float> options = launch.options;
  if (launch.lr) {
    options.lr = launch.lr_is_double ? static_cast<float>(*static_cast<const double*>(launch.lr))
                                     : *static_cast<const float*>(launch.lr);
  }
  options.decay = 1 - options.lr * launch.weight_decay;
  options.scale = (launch.maximize ? -1.0f : 1.0f) / (launch.grad_scale ? *launch.grad_scale : 1.0f);
  options.gain = e.gain != nullptr;
  options.buffer = e.buffer.data != nullptr;
  options.dual = e.dual.data != nullptr;
  options.param_limit = limit(0.0f, e.param.type);
  options.buffer_limit = limit(0.0f, e.buffer.type);
  return options;
}

__global__ void __launch_bounds__(kThreads, 4) step_kernel(const __grid_constant__ Launch launch) {
  if (launch.found_inf && *launch.found_inf != 0) return;
  int first = 0;  // the last entry that begins at this block or before
  for (int stop = launch.count; stop - first > 1;) {
    const int middle = (first + stop) / 2;
    (launch.entries[middle].first_block <= static_cast<int>(blockIdx.x) ? first : stop) = middle;
  }
  const Entry& e = launch.entries[first];
  const int block = static_cast<int>(blockIdx.x) - e.first_block;
  const Options<float> options = options_of(launch, e);

  int status = kConverged;
  if (e.n < kShortRow) {
    const int64_t begin = static_cast<int64_t>(block) * kStretch, left = e.n * e.columns - begin;
    const int stop = left < kStretch ? static_cast<int>(left) : kStretch;
    const int n = static_cast<int>(e.n), rest = static_cast<int>(begin % n);
    for (int i = threadIdx.x; i < stop; i += kThreads) {
      const ColumnUnits units(e, begin / n + (rest + i) / n, launch.units);
      step<float>(e, options, units, begin + i, status);
    }
  } else {
    const int stretches = static_cast<int>((e.n + kStretch - 1) / kStretch);
    const int64_t column = block / stretches, begin = block % stretches * int64_t{kStretch};
    __shared__ RowUnits units;
    units.prepare(e, column, launch.units);
    const int64_t row = column * e.n, left = e.n - begin;
    const int stop = left < kStretch ? static_cast<int>(left) : kStretch;
    const bool wide = aligned(e, row + begin);
    for (int j = threadIdx.x * kLanes; j < stop; j += kThreads * kLanes) {
      const int64_t i = row + begin + j;
      if (wide && j + kLanes <= stop) {
        step<Quad>(e, options, units, i, status);
      } else {
        for (int k = 0; k < kLanes && j + k < stop; ++k) {
          step<float>(e, options, units, i + k, status);
        }
      }
    }
  }
  if (status != kConverged) atomicMax(launch.status, status);
}

}  // namespace
