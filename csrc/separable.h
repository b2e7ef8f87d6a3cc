// The mathematics of a separable neural mirror map, for the CPU and for CUDA alike.
//
//   psi(u) = u + sum_k w_k [sigma(s_k (u - c_k)) - sigma(-s_k c_k)],   sigma(t) = t / sqrt(1 + t^2)
//
// mirror_opt/reference.py is the definition. A value is a number, or a register of numbers (`V`):
// where they differ, the file that includes this one has defined rsqrt, abs and any. `U` holds the
// coefficients: numbers where a row of values shares them, else registers.
#pragma once

#ifndef MIRROR_FN
#define MIRROR_FN __host__ __device__ __forceinline__
#endif

namespace {

// One unit of psi, and what it takes away to keep the origin fixed: with b = -s c,
// sigma(s (u - c)) = sigma(s u + b), base = sigma(b), base_slope = sigma'(b).
template <class U> struct Unit {
  U w, s, c, b, base, base_slope;
};

// Bounds that hold for every u, with m <= psi' <= l and |psi''| <= M.
template <class U> struct Bounds {
  U span;   // |psi(u) - u| <= span
  U reach;  // no unit's argument exceeds kSaturated while |u| <= reach
  U trust;  // a residual r of psi(y) = t with r^2 <= trust * scale needs one more Newton step only
};

// Here every sigma is 1 to the last bit of a double, and its square is still finite in a float.
constexpr float kSaturated = 1e18f;

template <class T> struct Limits;
template <> struct Limits<float> {
  static constexpr float eps = 1.1920929e-7f, tiny = 1.17549435e-38f, max = 3.4028234e38f;
};
template <> struct Limits<double> {
  static constexpr double eps = 2.220446049250313e-16, tiny = 2.2250738585072014e-308,
                          max = 1.7976931348623157e308;
};

enum Status { kConverged = 0, kMaxIterations = 1, kNonfinite = 2 };  // as newton.Status
constexpr int kMaxSteps = 100;

template <class V> MIRROR_FN V smaller(V a, V b) { return a < b ? a : b; }
template <class V> MIRROR_FN V larger(V a, V b) { return a > b ? a : b; }
template <class V> MIRROR_FN V clamp(V x, V lower, V upper) {
  return x < lower ? lower : x > upper ? upper : x;
}

template <class U> MIRROR_FN Unit<U> make_unit(U w, U s, U c) {
  const U b = -s * c, limit = kSaturated + U{};
  const U t = clamp(b, -limit, limit), r = rsqrt(1 + t * t);
  return {w, s, c, b, t * r, r * (r * r)};
}

template <class T, class U, class Units> MIRROR_FN Bounds<U> make_bounds(const Units& units) {
  U span{}, steepest{}, farthest{}, curvature{}, falling{}, rising{};
  for (int k = 0; k < units.count; ++k) {
    const auto unit = units[k];
    span += 2 * abs(unit.w);
    steepest = larger(steepest, unit.s);
    farthest = larger(farthest, abs(unit.c));
    curvature += T(0.8587) * abs(unit.w) * (unit.s * unit.s);  // max |sigma''| = 48 / 5^(5/2)
    const U slope = unit.w * unit.s;
    falling += smaller(slope, U{});
    rising += larger(slope, U{});
  }
  // After a Newton step from the residual r, |psi(y) - t| <= l (M / 2m) (r / m)^2.
  const U m = 1 + falling, l = 1 + rising, most = T(1e30) + U{};
  const U trust = (2 * Limits<T>::eps) * (2 * (m * (m * m))) / (curvature * l);
  return {span, kSaturated / steepest - farthest, m > 0 ? smaller(trust, most) : -most};
}

template <bool clamped, class V, class U> MIRROR_FN V argument(V u, const Unit<U>& unit) {
  if constexpr (!clamped) return unit.s * u + unit.b;
  const V limit = kSaturated + V{};
  return clamp<V>(unit.s * (u - unit.c), -limit, limit);
}

// psi and psi' at one point.
template <class V> struct Point {
  V value, slope;
};

template <bool clamped, class V, class Units> MIRROR_FN V psi(V u, const Units& units) {
  V sum{};
  for (int k = 0; k < units.count; ++k) {
    const auto unit = units[k];
    const V t = argument<clamped>(u, unit);
    sum += unit.w * (t * rsqrt(1 + t * t) - unit.base);
  }
  return u + sum;
}

template <bool clamped, class V, class Units> MIRROR_FN Point<V> psi_slope(V u, const Units& units) {
  V sum{}, slope{};
  for (int k = 0; k < units.count; ++k) {
    const auto unit = units[k];
    const V t = argument<clamped>(u, unit);
    const V r = rsqrt(1 + t * t);
    sum += unit.w * (t * r - unit.base);
    slope += (unit.w * unit.s) * (r * (r * r));
  }
  return {u + sum, 1 + slope};
}

// Clamping costs two operations a unit and is hardly ever needed: ask once for all units.
template <class V, class Units> MIRROR_FN V psi(V u, const Units& units) {
  if (any(abs(u) > units.bounds.reach)) return psi<true>(u, units);
  return psi<false>(u, units);
}

template <class V, class Units> MIRROR_FN Point<V> psi_slope(V u, const Units& units) {
  if (any(abs(u) > units.bounds.reach)) return psi_slope<true>(u, units);
  return psi_slope<false>(u, units);
}

// What one point gives to the gradient of the coefficients, summed over points with weight q.
template <class V> struct Moments {
  V w, slope, lever;  // sums of q (sigma - base), q (sigma' - base_slope), q u sigma'
};

// Adds to the moments of every unit, and returns psi and psi'.
template <bool clamped, class V, class Units>
MIRROR_FN Point<V> accumulate(V u, V q, const Units& units, Moments<V>* moments) {
  V sum{}, slope{};
  const V lever = q * u;
  for (int k = 0; k < units.count; ++k) {
    const auto unit = units[k];
    const V t = argument<clamped>(u, unit);
    const V r = rsqrt(1 + t * t), rise = t * r - unit.base, steep = r * (r * r);
    // Differences at the point, not of the sums: at u = 0 they are exactly zero.
    moments[k].w += q * rise;
    moments[k].slope += q * (steep - unit.base_slope);
    moments[k].lever += lever * steep;
    sum += unit.w * rise;
    slope += (unit.w * unit.s) * steep;
  }
  return {u + sum, 1 + slope};
}

template <class V, class Units>
MIRROR_FN Point<V> accumulate(V u, V q, const Units& units, Moments<V>* moments) {
  if (any(abs(u) > units.bounds.reach)) return accumulate<true>(u, q, units, moments);
  return accumulate<false>(u, q, units, moments);
}

// The gradient in the coefficients of one unit, from its moments.
template <class V, class U> MIRROR_FN void unit_gradient(const Moments<V>& moments,
                                                         const Unit<U>& unit, V& w, V& s, V& c) {
  w = moments.w;
  s = unit.w * (moments.lever - unit.c * moments.slope);
  c = -(unit.w * unit.s) * moments.slope;
}

// Solves psi(y) = target by safeguarded Newton: newton.solve_monotone, lane by lane. The bracket
// always holds the root; a step that leaves it, or does not halve the residual, is a bisection.
//
// Two things stop a lane: a residual within rounding, and one so small that the quadratic
// convergence of Newton's method, with the bounds of psi, proves the next step to be within
// rounding. That step is taken without evaluating psi again.
template <class T, class V, class Units>
MIRROR_FN V solve(V target, V start, const Units& units, int& status) {
  using L = Limits<T>;
  const V bracket = T(1.05) * units.bounds.span + (4 * L::eps) * abs(target) + L::tiny;
  const V scale = abs(target) + units.bounds.span;
  V lower = target - bracket, upper = target + bracket;
  V y = clamp(start, lower, upper);
  V previous = L::max + V{};
  V residual{};
  auto done = target < target;
  auto bisected = done;
  for (int i = 0;; ++i) {
    const auto point = psi_slope(y, units);
    residual = point.value - target;
    const V newton = y - residual / point.slope;
    const auto trusted = (!done) & (residual * residual <= units.bounds.trust * scale);
    // A NaN residual never improves: it is done too. So are neighbouring floats.
    done = done | trusted | !(abs(residual) > 8 * L::eps * scale) |
           (upper - lower <= (4 * L::eps) * abs(y) + L::tiny);
    y = trusted ? newton : y;
    if (!any(!done) || i == kMaxSteps) break;
    lower = (!done) & (residual < 0) ? y : lower;
    upper = (!done) & (residual > 0) ? y : upper;
    const auto inside = (bisected | (abs(residual) <= T(0.5) * previous)) & (newton > lower) &
                        (newton < upper);
    const V next = inside ? newton : lower + T(0.5) * (upper - lower);
    y = done ? y : next;
    bisected = !inside;
    previous = abs(residual);
  }
  const auto finite = (abs(target) <= L::max) & (abs(residual) <= L::max);
  if (any(!done)) status = status > kMaxIterations ? status : kMaxIterations;
  if (any(!finite)) status = kNonfinite;
  const V nothing = (V{} + L::max) * L::max * V{};
  return finite & done ? y : nothing;
}

}  // namespace
