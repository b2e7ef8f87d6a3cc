// Loops over rows of S(u) = gain * psi(u), compiled once for each instruction set.
#pragma once

#include "cpu.h"
#include "simd.h"

#include "separable.h"  // after simd.h, whose functions it calls

namespace {

// Two whole registers, where a count of lanes could stand.
struct Two {};
template <class T> MIRROR_FN Pair<Vec<T>> load(const T* p, Two) {
  return {load(p), load(p + kLanes<T>)};
}
template <class T> MIRROR_FN Pair<Vec<T>> load(const T* p, Two, T) { return load(p, Two{}); }
template <class T> MIRROR_FN void store(T* p, Pair<Vec<T>> v, Two) {
  store(p, v.a);
  store(p + kLanes<T>, v.b);
}

MIRROR_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Coefficients of neighbouring columns, one for each lane.
template <class T> struct ColumnUnits {
  Unit<Vec<T>> unit[kMaxUnits];
  Bounds<Vec<T>> bounds;
  Vec<T> base;
  int count;

  template <class Count>
  ColumnUnits(const Map<T>& map, int64_t column, Count lanes) : base{}, count(map.units) {
    for (int k = 0; k < count; ++k) {
      const int64_t i = k * map.columns + column;
      unit[k] = make_unit(load(map.w + i, lanes), load(map.s + i, lanes), load(map.c + i, lanes));
    }
    bounds = make_bounds<Vec<T>>(*this);
    base = sigmas(Vec<T>{}, *this);
  }
  const Unit<Vec<T>>& operator[](int k) const { return unit[k]; }
};

// Coefficients that a row of values shares. What is computed from them is computed in registers, so
// that it rounds as it does beside the values.
template <class T> struct RowUnits {
  Unit<T> unit[kMaxUnits];
  Bounds<T> bounds;
  T base;
  int count;

  RowUnits(const Map<T>& map, int64_t column) : base{}, count(map.units) {
    for (int k = 0; k < count; ++k) {
      const int64_t i = k * map.columns + column;
      const Vec<T> zero{};
      const Unit<Vec<T>> x = make_unit(map.w[i] + zero, map.s[i] + zero, map.c[i] + zero);
      unit[k] = {x.s[0],    x.b[0], x.ws[0],   x.w[0],         x.wss[0],
                 x.wsss[0], x.c[0], x.base[0], x.base_slope[0]};
    }
    bounds = make_bounds<T>(*this);
    base = sigmas(Vec<T>{}, *this)[0];
  }
  const Unit<T>& operator[](int k) const { return unit[k]; }
};

// Calls f(units, element, element of gain, lanes) for every register of the elements in [begin, end).
template <class T, class F>
MIRROR_FN void sweep(const Map<T>& map, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t full = kLanes<T>;
  if (map.n == 1) {
    for (int64_t i = begin, step; i < end; i += step) {
      const int64_t column = i % map.columns, g = i % map.gain_rows;
      step = least(least(full, end - i), map.columns - column);
      if (step == full) {
        f(ColumnUnits<T>(map, column, All{}), i, g, All{});
      } else {
        f(ColumnUnits<T>(map, column, (int)step), i, g, (int)step);
      }
    }
    return;
  }
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / map.n, stop = least(end, (row + 1) * map.n);
    const int64_t shift = (row - row % map.gain_rows) * map.n;
    const RowUnits<T> units(map, row % map.columns);
    for (; i + 2 * full <= stop; i += 2 * full) f(units, i, i - shift, Two{});
    for (; i + full <= stop; i += full) f(units, i, i - shift, All{});
    if (i < stop) f(units, i, i - shift, (int)(stop - i));
    i = stop;
  }
}

template <class T> void forward(const Map<T>& map, const T* u, T* out, int64_t begin, int64_t end) {
  sweep(map, begin, end, [&](const auto& units, int64_t i, int64_t g, auto lanes) {
    store(out + i, load(map.gain + g, lanes) * psi(load(u + i, lanes), units), lanes);
  });
}

template <class T>
int inverse(const Map<T>& map, const T* t, T* out, int64_t begin, int64_t end) {
  int status = kConverged;
  sweep(map, begin, end, [&](const auto& units, int64_t i, int64_t g, auto lanes) {
    // Lanes beyond the end hold zeros: their gain would make 0 / 0.
    const auto gain = load(map.gain + g, lanes, T(1));
    const auto target = load(t + i, lanes) / gain;
    store(out + i, solve<T>(target, target, units, status), lanes);
  });
  return status;
}

// S^-1(S(x) - lr g).
template <class T>
int step(const Map<T>& map, const T* x, const T* g, T lr, T* out, int64_t begin, int64_t end) {
  int status = kConverged;
  sweep(map, begin, end, [&](const auto& units, int64_t i, int64_t e, auto lanes) {
    const auto rise = lr * load(g + i, lanes) / load(map.gain + e, lanes, T(1));
    store(out + i, shift<T>(load(x + i, lanes), rise, units, status), lanes);
  });
  return status;
}

// Gradients of S (or of its inverse, whose value is `at`) for the elements [begin, end) of one
// column, counted over all rows that share its coefficients.
template <bool inverted, class T> struct Backward {
  const Map<T>& map;
  const Gradients<T>& to;
  const T *grad, *at;

  template <class Units, class Count>
  MIRROR_FN void element(const Units& units, int64_t i, int64_t g, Count lanes,
                         Moments<Vec<T>>* moments) const {
    const Vec<T> u = load(at + i, lanes), gain = load(map.gain + g, lanes, T(1));
    const Vec<T> dy = load(grad + i, lanes);
    if constexpr (inverted) {
      const Vec<T> q = dy / (gain * psi_slope(u, units).slope);
      const Point<Vec<T>> point = accumulate(u, -(q * gain), units, moments);
      store(to.at + i, q, lanes);
      store(to.gain + i, -q * point.value, lanes);
    } else {
      const Point<Vec<T>> point = accumulate(u, dy * gain, units, moments);
      store(to.at + i, dy * gain * point.slope, lanes);
      store(to.gain + i, dy * point.value, lanes);
    }
  }

  // One column of rows.
  void row_segment(int64_t column, int64_t begin, int64_t end, T* w, T* s, T* c) const {
    constexpr int64_t full = kLanes<T>;
    const RowUnits<T> units(map, column);
    Moments<Vec<T>> moments[kMaxUnits];
    for (int k = 0; k < units.count; ++k) moments[k] = Moments<Vec<T>>{};
    for (int64_t e = begin; e < end;) {
      const int64_t row = column + e / map.n * map.columns, j = e % map.n;
      const int64_t length = least(end - e, map.n - j);
      int64_t i = row * map.n + j;
      const int64_t stop = i + length, shift = (row - row % map.gain_rows) * map.n;
      for (; i + full <= stop; i += full) element(units, i, i - shift, All{}, moments);
      if (i < stop) element(units, i, i - shift, (int)(stop - i), moments);
      e += length;
    }
    for (int k = 0; k < units.count; ++k) {
      const Moments<T> sum{T(total<T>(moments[k].w)), T(total<T>(moments[k].slope)),
                           T(total<T>(moments[k].lever))};
      unit_gradient(sum, units[k], w[k * map.columns], s[k * map.columns], c[k * map.columns]);
    }
  }

  // Neighbouring columns of single elements, `rows` of each.
  template <class Count> void columns(int64_t column, int64_t rows, Count lanes) const {
    const ColumnUnits<T> units(map, column, lanes);
    Moments<Vec<T>> moments[kMaxUnits];
    for (int k = 0; k < units.count; ++k) moments[k] = Moments<Vec<T>>{};
    for (int64_t b = 0; b < rows; ++b) {
      const int64_t i = b * map.columns + column;
      element(units, i, i % map.gain_rows, lanes, moments);
    }
    for (int k = 0; k < units.count; ++k) {
      Vec<T> w, s, c;
      unit_gradient(moments[k], units[k], w, s, c);
      const int64_t i = k * map.columns + column;
      store(to.w + i, w, lanes);
      store(to.s + i, s, lanes);
      store(to.c + i, c, lanes);
    }
  }
};

template <bool inverted, class T>
void backward(const Map<T>& map, const T* grad, const T* at, const Gradients<T>& to,
              int64_t begin, int64_t end) {
  const Backward<inverted, T> kernel{map, to, grad, at};
  const int64_t rows = map.rows / map.columns;
  if (map.n == 1) {
    for (int64_t column = begin, step; column < end; column += step) {
      step = least(kLanes<T>, end - column);
      if (step == kLanes<T>) kernel.columns(column, rows, All{});
      else kernel.columns(column, rows, (int)step);
    }
    return;
  }
  const int64_t size = rows * map.n, block = map.units * map.columns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t column = task / to.segments, segment = task % to.segments;
    const int64_t first = segment * to.segment;
    kernel.row_segment(column, first, least(first + to.segment, size),
                       to.w + segment * block + column, to.s + segment * block + column,
                       to.c + segment * block + column);
  }
}

// Lanes of a stored tensor from element i on, in T.
template <class Count> concept OneRegister = !std::is_same_v<Count, Two>;

template <OneRegister Count>
MIRROR_FN Vec<double> read(double, const Stored& x, int64_t i, Count lanes) {
  return load((const double*)x.data + i, lanes);
}
template <OneRegister Count>
MIRROR_FN Vec<float> read(float, const Stored& x, int64_t i, Count lanes) {
  if (x.type == Storage::f32) return load((const float*)x.data + i, lanes);
  const Half16 h = load16((const uint16_t*)x.data + i, lanes);
  return x.type == Storage::f16 ? from_f16(h) : from_bf16(h);
}
template <class T> MIRROR_FN Pair<Vec<T>> read(T type, const Stored& x, int64_t i, Two) {
  return {read(type, x, i, All{}), read(type, x, i + kLanes<T>, All{})};
}

template <OneRegister Count>
MIRROR_FN void write(const Stored& x, int64_t i, Vec<double> value, Count lanes) {
  store((double*)x.data + i, value, lanes);
}
template <OneRegister Count>
MIRROR_FN void write(const Stored& x, int64_t i, Vec<float> value, Count lanes) {
  if (x.type == Storage::f32) return store((float*)x.data + i, value, lanes);
  const Half16 h = x.type == Storage::f16 ? to_f16(value) : to_bf16(value);
  store16((uint16_t*)x.data + i, h, lanes);
}
template <class V> MIRROR_FN void write(const Stored& x, int64_t i, Pair<V> value, Two) {
  write(x, i, value.a, All{});
  write(x, i + (int64_t)(sizeof(V) / (x.type == Storage::f64 ? 8 : 4)), value.b, All{});
}

// With `common`, the step without momentum, anchor and dual state of tensors stored in T itself:
// what it does without, the compiler then leaves out.
template <bool common, class T>
int step_elements(const Entry<T>& entry, const Options<T>& options, int64_t begin, int64_t end) {
  constexpr Storage own = std::is_same_v<T, double> ? Storage::f64 : Storage::f32;
  int status = kConverged;
  const auto one = [&](const auto& units, int64_t i, int64_t, auto lanes) MIRROR_INLINE {
    using V = decltype(load((const T*)nullptr, lanes));
    Options<T> mine = options;
    V gain = V{} + T(1);
    if (options.gain) gain = load(entry.map.gain + i, lanes, T(1));
    if constexpr (common) {
      mine.primal = true;
      mine.buffer = mine.dual = false;
      mine.buffer_limit = Limits<T>::max;
      const Stored param{entry.param.data, own}, grad{entry.grad.data, own};
      Elements<V> x{read(T{}, param, i, lanes), read(T{}, grad, i, lanes), gain, V{}, V{}, V{}, V{}};
      mirror_step<T>(x, mine, units, status);
      write(param, i, x.param, lanes);
    } else {
      const auto get = [&](const Stored& x) { return x.data ? read(T{}, x, i, lanes) : V{}; };
      Elements<V> x{get(entry.param),  get(entry.grad), gain, get(entry.buffer),
                    get(entry.anchor), get(entry.dual), get(entry.dual_init)};
      mirror_step<T>(x, mine, units, status);
      write(entry.param, i, x.param, lanes);
      if (options.dual) write(entry.dual, i, x.dual, lanes);
      if (options.buffer) write(entry.buffer, i, x.buffer, lanes);
    }
  };
  sweep(entry.map, begin, end, one);
  return status;
}

template <class T> int step_(const Entry<T>& entry, Options<T> options, int64_t begin, int64_t end) {
  options.gain = entry.map.gain != nullptr;
  options.buffer = entry.buffer.data != nullptr;
  options.dual = entry.dual.data != nullptr;
  options.param_limit = limit(T{}, entry.param.type);
  options.buffer_limit = limit(T{}, entry.buffer.type);
  const bool stored = entry.param.type == entry.grad.type && entry.param.type <= Storage::f64;
  const bool common = stored && options.primal && !options.buffer && !options.dual &&
                      !entry.anchor.data && !entry.dual_init.data;
  return common ? step_elements<true>(entry, options, begin, end)
                : step_elements<false>(entry, options, begin, end);
}

// Whether some |x| is above the bound, or NaN.
template <class T> bool exceeds(const Stored& x, T bound, int64_t begin, int64_t end) {
  constexpr int64_t full = kLanes<T>;
  auto bad = bound + Vec<T>{} < bound;
  for (; begin + full <= end; begin += full) bad = bad | !(abs(read(T{}, x, begin, All{})) <= bound);
  if (begin < end) bad = bad | !(abs(read(T{}, x, begin, (int)(end - begin))) <= bound);
  return any(bad);
}

template <class T> constexpr Kernels<T> table() {
  return {forward<T>, inverse<T>, step<T>, backward<false, T>, backward<true, T>, step_<T>, exceeds<T>};
}

}  // namespace
