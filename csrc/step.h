// How the multi-tensor step is described to the loops of the CPU and to the CUDA kernel.
#pragma once

constexpr int kMaxUnits = 64;

enum class Storage : int { f32, f64, f16, bf16, other };  // f64 computed in double, other not served

struct Stored {
  void* data;  // null where the step does without
  Storage type;
};

template <class T> struct Options {
  T lr, momentum, decay, scale;  // the parameter is multiplied by decay, the gradient by scale
  T param_limit, buffer_limit;   // what their storage does not round to Inf
  bool primal, nesterov;
  bool gain, buffer, dual;  // what there is
};
