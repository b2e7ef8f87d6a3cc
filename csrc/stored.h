// How a tensor of a step's lists is stored. For the files that see torch's headers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "step.h"

namespace {

using Tensors = std::vector<torch::stable::Tensor>;

inline Storage storage(const torch::stable::Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Storage::f32;
    case torch::headeronly::ScalarType::Double: return Storage::f64;
    case torch::headeronly::ScalarType::Half: return Storage::f16;
    case torch::headeronly::ScalarType::BFloat16: return Storage::bf16;
    default: return Storage::other;
  }
}

// A tensor that is only read, which may be shared: asking for memory to write to would copy it first.
inline Stored stored(const torch::stable::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), storage(x)};
}

inline Stored stored(const Tensors& list, size_t i) {
  return list.empty() ? Stored{nullptr, Storage::f32} : stored(list[i]);
}

// One that is written to.
inline Stored changed(const Tensors& list, size_t i) {
  if (list.empty()) return {nullptr, Storage::f32};
  return {list[i].mutable_data_ptr(), storage(list[i])};
}

}  // namespace
