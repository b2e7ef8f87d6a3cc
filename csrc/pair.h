// Two values at once, registers or numbers: what one waits for, the other fills.
#pragma once

#include <type_traits>

namespace {

template <class M, class V> MIRROR_FN V select(M mask, V a, V b) { return mask ? a : b; }

template <class R> struct Pair {
  R a, b;
};

template <class T> concept Number = std::is_arithmetic_v<T>;

template <class R> struct LaneOf { using type = std::remove_cvref_t<decltype(R{}[0])>; };
template <Number R> struct LaneOf<R> { using type = R; };
template <class R> struct LaneOf<Pair<R>> : LaneOf<R> {};
template <class R> using Lane = typename LaneOf<R>::type;

#define MIRROR_PAIR_OPERATOR(op)                                                                  \
  template <class R, class S> MIRROR_FN auto operator op(Pair<R> x, Pair<S> y) {                  \
    return Pair<decltype(x.a op y.a)>{x.a op y.a, x.b op y.b};                                    \
  }                                                                                               \
  template <class R, Number N> MIRROR_FN auto operator op(Pair<R> x, N number) {                  \
    const Lane<R> y = static_cast<Lane<R>>(number);                                               \
    return Pair<decltype(x.a op y)>{x.a op y, x.b op y};                                          \
  }                                                                                               \
  template <class R, Number N> MIRROR_FN auto operator op(N number, Pair<R> y) {                  \
    const Lane<R> x = static_cast<Lane<R>>(number);                                               \
    return Pair<decltype(x op y.a)>{x op y.a, x op y.b};                                          \
  }
MIRROR_PAIR_OPERATOR(+)
MIRROR_PAIR_OPERATOR(-)
MIRROR_PAIR_OPERATOR(*)
MIRROR_PAIR_OPERATOR(/)
MIRROR_PAIR_OPERATOR(<)
MIRROR_PAIR_OPERATOR(>)
MIRROR_PAIR_OPERATOR(<=)
MIRROR_PAIR_OPERATOR(&)
MIRROR_PAIR_OPERATOR(|)
#undef MIRROR_PAIR_OPERATOR

template <class R> MIRROR_FN Pair<R> operator-(Pair<R> x) { return {-x.a, -x.b}; }
template <class R> MIRROR_FN Pair<R> operator!(Pair<R> x) { return {!x.a, !x.b}; }
template <class R> MIRROR_FN Pair<R>& operator+=(Pair<R>& x, Pair<R> y) { return x = x + y; }
template <class R> MIRROR_FN Pair<R> rsqrt(Pair<R> x) { return {rsqrt(x.a), rsqrt(x.b)}; }
template <class R> MIRROR_FN Pair<R> rough_rsqrt(Pair<R> x) {
  return {rough_rsqrt(x.a), rough_rsqrt(x.b)};
}
template <class R> MIRROR_FN Pair<R> reciprocal(Pair<R> x) {
  return {reciprocal(x.a), reciprocal(x.b)};
}
template <class R> MIRROR_FN Pair<R> abs(Pair<R> x) { return {abs(x.a), abs(x.b)}; }
template <class M> MIRROR_FN bool any(Pair<M> m) { return any(m.a | m.b); }
template <class M, class R> MIRROR_FN Pair<R> select(Pair<M> m, Pair<R> x, Pair<R> y) {
  return {select(m.a, x.a, y.a), select(m.b, x.b, y.b)};
}

}  // namespace
