// The mathematics of a separable neural mirror map, for the CPU and for CUDA alike.
//
//   psi(u) = u + sum_k w_k [sigma(s_k (u - c_k)) - sigma(-s_k c_k)],   sigma(t) = t / sqrt(1 + t^2)
//
// mirror_opt/reference.py is the definition. A value `V` is a number or a register of numbers; where
// they differ, the file that includes this one has defined rsqrt, rough_rsqrt, reciprocal, abs,
// select, any, and product, which rounds before anything is added. Coefficients `U` are numbers where
// a row of values shares them, else registers. No result depends on which other values a register
// holds.
#pragma once

#include "pair.h"
#include "step.h"

namespace {

// One unit of psi: with b = -s c, sigma(s (u - c)) = sigma(s u + b). At the origin sigma is base and
// sigma' is base_slope. What evaluations read comes first.
template <class U> struct Unit {
  U s, b, ws, w, wss, wsss, c, base, base_slope;
};

// What all units have together.
template <class U> struct Bounds {
  U span;       // |psi(u) - u| <= span
  U reach;      // no unit's argument exceeds kSaturated while |u| <= reach
  U curvature;  // |psi''(u)| <= curvature
  U remainder;  // |psi''''(u)| / 24 <= remainder
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
  return {s, b, w * s, w, w * s * s, w * s * s * s, c, product(t, r), product(r, r * r)};
}

template <class U, class Units> MIRROR_FN Bounds<U> make_bounds(const Units& units) {
  U span{}, steepest{}, farthest{}, curvature{}, fourth{};
  MIRROR_UNROLL
  for (int k = 0; k < units.count; ++k) {
    const auto& unit = units[k];
    span += 2 * abs(unit.w);
    steepest = larger(steepest, unit.s);
    farthest = larger(farthest, abs(unit.c));
    curvature += abs(unit.wss);
    fourth += abs(unit.wsss) * unit.s;
  }
  // max |sigma''| = 48 / 5^(5/2), max |sigma''''| = 8.0617
  return {span, kSaturated / steepest - farthest, curvature * 0.8587f, fourth * 0.33591f};
}

template <bool far, class V, class U, class Reach>
MIRROR_FN V argument(V u, const Unit<U>& unit, Reach reach) {
  const V t = unit.s * u + unit.b;
  if constexpr (!far) return t;
  const V limit = kSaturated + V{};
  return select(abs(u) > reach, clamp<V>(unit.s * (u - unit.c), -limit, limit), t);
}

// sum_k w_k sigma(s_k (u - c_k)).
template <bool far, class V, class Units> MIRROR_FN V sigmas(V u, const Units& units) {
  V sum{};
  MIRROR_UNROLL
  for (int k = 0; k < units.count; ++k) {
    const auto& unit = units[k];
    const V t = argument<far>(u, unit, units.bounds.reach);
    sum += unit.w * (t * rsqrt(1 + t * t));
  }
  return sum;
}

// Clamping costs two operations a unit and is hardly ever needed: ask once for all units.
template <class V, class Units> MIRROR_SLOW V far_sigmas(V u, const Units& units) {
  return sigmas<true>(u, units);
}
template <class V, class Units> MIRROR_FN V sigmas(V u, const Units& units) {
  return any(abs(u) > units.bounds.reach) ? far_sigmas(u, units) : sigmas<false>(u, units);
}

// units.base is sigmas(0), which makes psi(0) = 0 exactly.
template <class V, class Units> MIRROR_FN V psi(V u, const Units& units) {
  return u + (sigmas(u, units) - units.base);
}

// psi and psi' at one point.
template <class V> struct Point {
  V value, slope;
};

template <bool far, class V, class Units> MIRROR_FN Point<V> psi_slope(V u, const Units& units) {
  V sum{}, slope{};
  MIRROR_UNROLL
  for (int k = 0; k < units.count; ++k) {
    const auto& unit = units[k];
    const V t = argument<far>(u, unit, units.bounds.reach);
    const V r = rsqrt(1 + t * t);
    sum += unit.w * (t * r);
    slope += unit.ws * (r * (r * r));
  }
  return {u + (sum - units.base), 1 + slope};
}

template <class V, class Units> MIRROR_SLOW Point<V> far_psi_slope(V u, const Units& units) {
  return psi_slope<true>(u, units);
}
template <class V, class Units> MIRROR_FN Point<V> psi_slope(V u, const Units& units) {
  return any(abs(u) > units.bounds.reach) ? far_psi_slope(u, units) : psi_slope<false>(u, units);
}

// What one point gives to the gradient of the coefficients, summed over points with weight q.
template <class V> struct Moments {
  V w, slope, lever;  // sums of q (sigma - base), q (sigma' - base_slope), q u sigma'
};

// Adds to the moments of every unit, and returns psi and psi'.
template <bool far, class V, class Units>
MIRROR_FN Point<V> accumulate(V u, V q, const Units& units, Moments<V>* moments) {
  V sum{}, slope{};
  const V lever = q * u;
  MIRROR_UNROLL
  for (int k = 0; k < units.count; ++k) {
    const auto& unit = units[k];
    const V t = argument<far>(u, unit, units.bounds.reach);
    const V r = rsqrt(1 + t * t), rise = product(t, r) - unit.base, steep = product(r, r * r);
    // Differences at the point, not of the sums: at u = 0 they are zero exactly.
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
  return any(abs(u) > units.bounds.reach) ? accumulate<true>(u, q, units, moments)
                                          : accumulate<false>(u, q, units, moments);
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
  const V residual = point.value - target, inverse = reciprocal(point.slope);
  // Divided by p, where p^2 could overflow and would pass for a proof of anything. What overflows
  // here is no proof, nor is a slope that is infinite.
  const V step = residual * inverse, error = units.bounds.curvature * abs(residual) * inverse;
  const auto last = (2 * error <= point.slope) & (inverse > 0) &
                    (error * abs(step) <= (2 * Limits<T>::eps) * scale);
  return Newton<V, decltype(last)>{residual, y - step, last};
}

// newton.solve_monotone, lane by lane. The bracket always holds the root; a step that leaves it, or
// does not halve the residual, is a bisection. A lane stops when its residual is within rounding,
// and after the last Newton step, without evaluating psi again.
template <class T, class V, class Units, class First>
MIRROR_SLOW V solve_in_bracket(V target, const First& first, const Units& units, int& status) {
  using L = Limits<T>;
  const V bracket = T(1.05) * units.bounds.span + (4 * L::eps) * abs(target) + L::tiny;
  const V scale = abs(target) + units.bounds.span;
  V lower = target - bracket, upper = target + bracket;
  V y = select(first.last | ((first.y > lower) & (first.y < upper)), first.y, target);
  V previous = L::max + V{}, residual{};
  auto done = first.last;
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
  const auto first = newton<T>(start, target, abs(target) + units.bounds.span, units);
  if (!any(!first.last)) return first.y;
  int found = kConverged;  // apart, so that the caller's can stay in a register
  const V y = solve_in_bracket<T>(target, first, units, found);
  status = status < found ? found : status;
  return y;
}

// psi^-1(psi(u) - rise) by the Taylor series of psi about u, and the lanes for which it is proven.
//
// psi is evaluated once, and of that only the derivatives are needed. With d = y - u and slope p,
// p (d + a2 d^2 + a3 d^3) = -rise up to a remainder, for which the fourth derivative has a bound.
template <class V, class M> struct Series {
  V y;
  M proven;
};

// psi', -psi'' / 3 and psi''' / 3 at one point.
template <class V> struct Derivatives {
  V first, second, third;
};

template <class V, class Units> MIRROR_FN Derivatives<V> derivatives(V u, const Units& units) {
  V first{}, second{}, third{};
  MIRROR_UNROLL
  for (int k = 0; k < units.count; ++k) {
    const auto& unit = units[k];
    const V t = unit.s * u + unit.b;
    const V r = rough_rsqrt(1 + t * t), square = r * r, cube = r * square, fifth = cube * square;
    first += unit.ws * cube;
    second += unit.wss * (t * fifth);
    third += unit.wsss * (fifth * (4 - 5 * square));
  }
  return {1 + first, second, third};
}

template <class T, class V, class U>
MIRROR_FN auto series(V u, V rise, const Derivatives<V>& at, const Bounds<U>& bounds) {
  const V inverse = reciprocal(at.first);
  const V a2 = T(-1.5) * at.second * inverse, a3 = T(0.5) * at.third * inverse;
  const V linear = -(rise * inverse), h = a2 * linear;
  const V d = linear * (1 - h + (2 * h * h - a3 * (linear * linear)));  // the inverse series
  const V square = d * d, residual = (d - linear) + square * (a2 + a3 * d);
  const V error = at.first * abs(residual) + bounds.remainder * (square * square);
  const auto proven = (at.first > 0) & (error <= (4 * Limits<T>::eps) * (abs(u) + bounds.span));
  return Series<V, decltype(proven)>{u + d, proven};
}

// Where the series is likely to be proven. Elsewhere it is not tried.
template <class T, class V, class U> MIRROR_FN auto is_small(V u, V rise, const Bounds<U>& bounds) {
  const V square = rise * rise;
  return bounds.remainder * (square * square) <= (4 * Limits<T>::eps) * (abs(u) + bounds.span);
}

// psi^-1(psi(u) - rise) by Newton's method, from a start that is right to second order in rise.
template <class T, class V, class Units>
MIRROR_APART V shift_far(V u, V rise, const Units& units, int& status) {
  const auto point = psi_slope(u, units);
  return solve<T>(point.value - rise, u - rise * reciprocal(point.slope), units, status);
}

// psi^-1(psi(u) - rise); NaN, and a status that says why, where that failed.
template <class T, class V, class Units>
MIRROR_FN V shift(V u, V rise, const Units& units, int& status) {
  if constexpr (std::is_same_v<T, float>) {  // a double asks for more than the series has
    const auto likely = is_small<T>(u, rise, units.bounds);
    if (any(likely)) {
      const auto near = series<T>(u, rise, derivatives(u, units), units.bounds);
      const auto taken = likely & near.proven;
      if (!any(!taken)) return near.y;
      return select(taken, near.y, shift_far<T>(u, rise, units, status));
    }
  }
  return shift_far<T>(u, rise, units, status);
}

// The largest number that a storage does not round to Inf.
MIRROR_FN float limit(float, Storage type) {
  return type == Storage::f16    ? 65519.996f
         : type == Storage::bf16 ? 0x1.fefffep127f
                                 : Limits<float>::max;
}
MIRROR_FN double limit(double, Storage) { return Limits<double>::max; }

// The elements of one parameter and of what goes with it. Absent: zeros, and 1 for the gain.
template <class V> struct Elements {
  V param, grad, gain, buffer, anchor, dual, dual_init;
};

// optim.MirrorDescent's step; with displacement u = phi - anchor,
//
//   stateless    z = grad h(decay phi - anchor)
//   dual state   z = zeta + z_0,  or grad h of the decayed anchor + grad h*(zeta + z_0)
//
// then z -= lr d, phi = anchor + grad h*(z) and zeta = z - z_0. Elements for which that is not
// finite, in the storage of the parameter and of the momentum, keep parameter and state.
template <class T, class V, class Units>
MIRROR_FN void mirror_step(Elements<V>& x, const Options<T>& options, const Units& units,
                           int& worst) {
  int status = kConverged;
  const V shrink = options.gain ? 1 / x.gain : x.gain;
  V d = options.scale * x.grad, b = x.buffer;
  if (options.buffer) {
    b = options.momentum * b + d;
    d = options.nesterov ? d + options.momentum * b : b;
  }
  const V move = options.lr * d;

  V u = x.param, z = x.dual + x.dual_init;
  const bool moved = !options.dual || options.decay != 1;  // z has to be taken from the point
  if (options.primal) {
    // In units of psi, z / gain.
    V t = z * shrink;
    if (moved && options.dual) u = x.anchor + solve<T>(t, u - x.anchor, units, status);
    u = options.decay * u - x.anchor;
    if (!options.dual) {
      u = shift<T>(u, move * shrink, units, status);
    } else {
      V start = u;
      if (moved) {
        const auto point = psi_slope(u, units);
        t = point.value;
        start = u - move * shrink * reciprocal(point.slope);
      }
      t = t - move * shrink;
      u = solve<T>(t, start, units, status);
      z = t * x.gain;
    }
  } else {
    if (moved) {
      if (options.dual) u = x.anchor + x.gain * psi(z, units);
      const V target = (options.decay * u - x.anchor) * shrink;
      z = solve<T>(target, options.dual ? z : target, units, status);
    }
    z = z - move;
    u = x.gain * psi(z, units);
  }
  const V y = x.anchor + u, dual = options.dual ? z - x.dual_init : V{};
  const auto good = (abs(y) <= options.param_limit) & (abs(b) <= options.buffer_limit) &
                    (abs(dual) <= Limits<T>::max);
  if (any(!good) && status == kConverged) status = kNonfinite;
  worst = worst < status ? status : worst;
  x.param = select(good, y, x.param);
  x.buffer = select(good, b, x.buffer);
  x.dual = select(good, dual, x.dual);
}

}  // namespace
