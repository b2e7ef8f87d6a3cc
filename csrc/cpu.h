// What the loops of one instruction set are given, and the tables by which they are found.
#pragma once

#include <cstdint>

#include "step.h"

// S(u) = gain * psi(u) over rows of n contiguous elements. Row r has the coefficients of column
// r % columns, and the gains of row r % gain_rows, where gain_rows is a multiple of columns.
template <class T> struct Map {
  const T *gain, *w, *s, *c;  // gain (gain_rows, n); w, s, c (units, columns)
  int64_t rows, n, columns, gain_rows;
  int units;
};

// Where a backward pass writes: `at` and `gain` (rows, n); w, s, c (segments, units, columns), of
// which each segment has counted `segment` elements of the column, or fewer at its end.
template <class T> struct Gradients {
  T *at, *gain, *w, *s, *c;
  int64_t segments, segment;
};

// One parameter of the multi-tensor step, seen as rows with coefficients of their own, and what goes
// with it, all of the same shape. gain may be null, for 1.
template <class T> struct Entry {
  Map<T> map;
  Stored param, grad, buffer, anchor, dual, dual_init;
};

// [begin, end) counts elements, except in backward: there it counts segments, column by
// column; for n = 1, where there is one segment, columns.
template <class T> struct Kernels {
  void (*forward)(const Map<T>&, const T* u, T* out, int64_t begin, int64_t end);
  int (*inverse)(const Map<T>&, const T* t, T* out, int64_t begin, int64_t end);  // a Status
  int (*step)(const Map<T>&, const T* x, const T* g, T lr, T* out, int64_t begin, int64_t end);
  void (*backward)(const Map<T>&, const T* grad, const T* u, const Gradients<T>&, int64_t begin,
                   int64_t end);
  void (*inverse_backward)(const Map<T>&, const T* grad, const T* y, const Gradients<T>&,
                           int64_t begin, int64_t end);
  int (*step_)(const Entry<T>&, Options<T>, int64_t begin, int64_t end);
  bool (*exceeds)(const Stored&, T bound, int64_t begin, int64_t end);  // or is NaN
};

struct InstructionSet {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

extern const InstructionSet portable, avx2, avx512;
