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
//
// Where a row shares its units, f.whole(units, element, element of gain, registers) is called instead,
// if there is one, for all of the row's whole registers at once.
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
    if constexpr (requires { f.whole(units, i, i, i); }) {
      const int64_t registers = (stop - i) / full;
      f.whole(units, i, i - shift, registers);
      i += registers * full;
    } else {
      for (; i + 2 * full <= stop; i += 2 * full) f(units, i, i - shift, Two{});
      for (; i + full <= stop; i += full) f(units, i, i - shift, All{});
    }
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

// One register of a step.
template <class T> struct StepLanes {
  const Entry<T>& entry;
  const Options<T>& options;
  int& status;

  template <class Units, class Count>
  MIRROR_FN void operator()(const Units& units, int64_t i, int64_t, Count lanes) const {
    using V = decltype(load((const T*)nullptr, lanes));
    V gain = V{} + T(1);
    if (options.gain) gain = load(entry.map.gain + i, lanes, T(1));
    const auto get = [&](const Stored& x) { return x.data ? read(T{}, x, i, lanes) : V{}; };
    Elements<V> x{get(entry.param),  get(entry.grad), gain, get(entry.buffer),
                  get(entry.anchor), get(entry.dual), get(entry.dual_init)};
    mirror_step<T>(x, options, units, status);
    write(entry.param, i, x.param, lanes);
    if (options.dual) write(entry.dual, i, x.dual, lanes);
    if (options.buffer) write(entry.buffer, i, x.buffer, lanes);
  }
};

// The same without momentum, anchor and dual state, of tensors stored in T itself: what it does
// without, the compiler then leaves out.
template <class T> struct CommonStepLanes {
  const Entry<T>& entry;
  const Options<T>& options;
  int& status;

  static bool serves(const Entry<T>& entry, const Options<T>& options) {
    const bool stored = entry.param.type == entry.grad.type && entry.param.type <= Storage::f64;
    return stored && options.primal && !options.buffer && !options.dual && !entry.anchor.data &&
           !entry.dual_init.data;
  }

  template <class Units, class Count>
  MIRROR_FN void operator()(const Units& units, int64_t i, int64_t, Count lanes) const {
    using V = decltype(load((const T*)nullptr, lanes));
    Options<T> mine = options;
    mine.primal = true;
    mine.buffer = mine.dual = false;
    mine.buffer_limit = Limits<T>::max;
    V gain = V{} + T(1);
    if (options.gain) gain = load(entry.map.gain + i, lanes, T(1));
    T* param = (T*)entry.param.data + i;
    Elements<V> x{load(param, lanes), load((const T*)entry.grad.data + i, lanes), gain, V{}, V{}, V{}, V{}};
    mirror_step<T>(x, mine, units, status);
    store(param, x.param, lanes);
  }

  // A block of registers at a time: first the derivatives of psi for all, then the series for all.
  // In one go each register would wait for the long chain of its series; apart, the chains of a block
  // run side by side. A block for which the series is not proven is done as above.
  void whole(const RowUnits<float>& units, int64_t i, int64_t, int64_t registers) const {
    constexpr int64_t full = kLanes<float>;
    for (int count; registers > 0; registers -= count, i += count * full) {
      count = (int)least(kBlock, registers);
      if (block(units, i, count)) continue;
      int j = 0;
      for (; j + 2 <= count; j += 2) far(units, i + j * full, Two{});
      if (j < count) far(units, i + j * full, All{});
    }
  }

 private:
  static constexpr int kBlock = 8;

  template <class Count>
  MIRROR_SLOW void far(const RowUnits<float>& units, int64_t i, Count lanes) const {
    (*this)(units, i, i, lanes);
  }

  // Whether the block was done.
  MIRROR_FN bool block(const RowUnits<float>& units, int64_t i, int count) const {
    constexpr int64_t full = kLanes<float>;
    using V = Vec<float>;
    float* param = (float*)entry.param.data + i;
    const float* grad = (const float*)entry.grad.data + i;
    V rise[kBlock], y[kBlock];
    Derivatives<V> at[kBlock];
    auto good = V{} <= V{};
    for (int j = 0; j < count; ++j) {
      const V move = options.lr * (options.scale * load(grad + j * full));
      rise[j] = options.gain ? move * (1 / load(entry.map.gain + i + j * full)) : move;
      y[j] = options.decay * load(param + j * full);
      good = good & is_small<float>(y[j], rise[j], units.bounds);
    }
    if (any(!good)) return false;
    int j = 0;
    for (; j + 2 <= count; j += 2) {
      const auto two = derivatives(Pair<V>{y[j], y[j + 1]}, units);
      at[j] = {two.first.a, two.second.a, two.third.a};
      at[j + 1] = {two.first.b, two.second.b, two.third.b};
    }
    if (j < count) at[j] = derivatives(y[j], units);
    for (j = 0; j < count; ++j) {
      const auto near = series<float>(y[j], rise[j], at[j], units.bounds);
      good = good & near.proven & (abs(near.y) <= options.param_limit);
      y[j] = near.y;
    }
    if (any(!good)) return false;
    for (j = 0; j < count; ++j) store(param + j * full, y[j]);
    return true;
  }
};

template <class T> int step_(const Entry<T>& entry, Options<T> options, int64_t begin, int64_t end) {
  options.gain = entry.map.gain != nullptr;
  options.buffer = entry.buffer.data != nullptr;
  options.dual = entry.dual.data != nullptr;
  options.param_limit = limit(T{}, entry.param.type);
  options.buffer_limit = limit(T{}, entry.buffer.type);
  int status = kConverged;
  if (CommonStepLanes<T>::serves(entry, options)) {
    sweep(entry.map, begin, end, CommonStepLanes<T>{entry, options, status});
  } else {
    sweep(entry.map, begin, end, StepLanes<T>{entry, options, status});
  }
  return status;
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
