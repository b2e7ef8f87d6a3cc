// The mathematics of a separable neural mirror map, for the CPU and for CUDA alike.
//
//   psi(u) = u + sum_k w_k [sigma(s_k (u - c_k)) - sigma(-s_k c_k)],   sigma(t) = t / sqrt(1 + t^2)
//
// mirror_opt/reference.py is the definition. A value is a number, or a register of numbers (`V`):
// where they differ, the file that includes this one has defined rsqrt, reciprocal, abs, select and any. `U` holds the
// coefficients: numbers where a row of values shares them, else registers.
#pragma once

#ifndef MIRROR_FN
#define MIRROR_FN __host__ __device__ __forceinline__
#define MIRROR_SLOW __host__ __device__ __noinline__
#endif

namespace {

// One unit of psi, and what it takes away to keep the origin fixed: with b = -s c,
// sigma(s (u - c)) = sigma(s u + b), base = sigma(b), base_slope = sigma'(b).
template <class U> struct Unit {
  U w, s, c, b, base, base_slope, ws;
};

// Bounds that hold for every u.
template <class U> struct Bounds {
  U span;       // |psi(u) - u| <= span
  U reach;      // no unit's argument exceeds kSaturated while |u| <= reach
  U curvature;  // |psi''(u)| <= curvature
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

template <class V> MIRROR_FN V larger(V a, V b) { return select(a > b, a, b); }
template <class V> MIRROR_FN V clamp(V x, V lower, V upper) {
  return select(x < lower, lower, select(x > upper, upper, x));
}

template <class U> MIRROR_FN Unit<U> make_unit(U w, U s, U c) {
  const U b = -s * c, limit = kSaturated + U{};
  const U t = clamp(b, -limit, limit), r = rsqrt(1 + t * t);
  return {w, s, c, b, t * r, r * (r * r), w * s};
}

template <class U, class Units> MIRROR_FN Bounds<U> make_bounds(const Units& units) {
  U span{}, steepest{}, farthest{}, curvature{};
  for (int k = 0; k < units.count; ++k) {
    const auto unit = units[k];
    span += 2 * abs(unit.w);
    steepest = larger(steepest, unit.s);
    farthest = larger(farthest, abs(unit.c));
    curvature += abs(unit.w) * (unit.s * unit.s);
  }
  // max |sigma''| = 48 / 5^(5/2)
  return {span, kSaturated / steepest - farthest, curvature * 0.8587f};
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
    slope += unit.ws * (r * (r * r));
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
    slope += unit.ws * steep;
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
  c = -unit.ws * moments.slope;
}

// One Newton step towards psi(y) = target, and the lanes for which it is proven to be the last.
//
// The proof is Kantorovich's: with p = psi'(y) > 0, residual r and |psi''| <= M, if M |r| <= p^2 / 2
// then the root is within 2 |r| / p, and the residual after the step is at most 4 M r^2 / p^2.
template <class V, class M> struct Newton {
  V residual, y;
  M last;
};

template <class T, class V, class Units>
MIRROR_FN auto newton(V y, V target, V scale, const Units& units) {
  const auto point = psi_slope(y, units);
  const V residual = point.value - target, square = point.slope * point.slope;
  const V error = units.bounds.curvature * abs(residual);
  const auto last = (2 * error <= square) & (point.slope > 0) &
                    (error * abs(residual) <= (2 * Limits<T>::eps) * (square * scale));
  return Newton<V, decltype(last)>{residual, y - residual * reciprocal(point.slope), last};
}

// newton.solve_monotone, lane by lane. The bracket always holds the root; a step that leaves it, or
// does not halve the residual, is a bisection. A lane stops when its residual is within rounding,
// and after the last Newton step, without evaluating psi again.
template <class T, class V, class Units>
MIRROR_SLOW V solve_in_bracket(V target, V start, const Units& units, int& status) {
  using L = Limits<T>;
  const V bracket = T(1.05) * units.bounds.span + (4 * L::eps) * abs(target) + L::tiny;
  const V scale = abs(target) + units.bounds.span;
  V lower = target - bracket, upper = target + bracket;
  V y = clamp(start, lower, upper);
  V previous = L::max + V{}, residual{};
  auto done = target < target;
  auto bisected = done;
  for (int i = 0;; ++i) {
    const auto step = newton<T>(y, target, scale, units);
    residual = step.residual;
    const auto last = (!done) & step.last;
    // A NaN residual never improves: it is done too. So are neighbouring floats.
    done = done | last | !(abs(residual) > (8 * L::eps) * scale) |
           (upper - lower <= (4 * L::eps) * abs(y) + L::tiny);
    y = select(last, step.y, y);
    if (!any(!done) || i == kMaxSteps) break;
    lower = select((!done) & (residual < 0), y, lower);
    upper = select((!done) & (residual > 0), y, upper);
    const auto inside = (bisected | (abs(residual) <= T(0.5) * previous)) & (step.y > lower) &
                        (step.y < upper);
    const V next = select(inside, step.y, lower + T(0.5) * (upper - lower));
    y = select(done, y, next);
    bisected = !inside;
    previous = abs(residual);
  }
  const auto finite = (abs(target) <= L::max) & (abs(residual) <= L::max);
  if (any(!finite)) status = kNonfinite;
  else if (any(!done) && status < kMaxIterations) status = kMaxIterations;
  const V nothing = (V{} + L::max) * L::max * V{};
  return select(finite & done, y, nothing);
}

// Solves psi(y) = target; NaN, and a status that says why, where that failed.
template <class T, class V, class Units>
MIRROR_FN V solve(V target, V start, const Units& units, int& status) {
  const auto step = newton<T>(start, target, abs(target) + units.bounds.span, units);
  if (!any(!step.last)) return step.y;
  return solve_in_bracket<T>(target, start, units, status);
}

}  // namespace
