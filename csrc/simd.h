// One vector register of float or double, for the instruction set this file is compiled for.
//
// Arithmetic, comparisons and selection come from the compiler's vector extension; what it lacks is
// here. Everything has internal linkage: the same source is compiled for several instruction sets
// into one library, and the linker must not merge them.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MIRROR_INLINE __attribute__((always_inline))
#define MIRROR_FN inline MIRROR_INLINE
#define MIRROR_SLOW __attribute__((noinline, cold))
#define MIRROR_APART MIRROR_FN
#define MIRROR_UNROLL  // as the compiler sees fit

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class T> struct Register;
template <> struct Register<float> { typedef float type __attribute__((vector_size(kBytes))); };
template <> struct Register<double> { typedef double type __attribute__((vector_size(kBytes))); };

template <class T> using Vec = typename Register<T>::type;
template <class T> constexpr int kLanes = kBytes / sizeof(T);
typedef int32_t Mask32 __attribute__((vector_size(kBytes)));
typedef int64_t Mask64 __attribute__((vector_size(kBytes)));

template <class T> MIRROR_FN Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T> MIRROR_FN void store(T* p, Vec<T> v) { std::memcpy(p, &v, sizeof(v)); }

// All lanes, where a count of lanes could stand.
struct All {};
template <class T> MIRROR_FN Vec<T> load(const T* p, All) { return load(p); }
template <class T> MIRROR_FN void store(T* p, Vec<T> v, All) { store(p, v); }

// The first `count` lanes, in [0, kLanes); zeros in the others. Reads nothing beyond them.
template <class T> MIRROR_FN Vec<T> load(const T* p, int count) {
  Vec<T> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class T> MIRROR_FN void store(T* p, Vec<T> v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}

#if defined(__AVX512F__)

template <> MIRROR_FN Vec<float> load(const float* p, int count) {
  return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
template <> MIRROR_FN void store(float* p, Vec<float> v, int count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}
template <> MIRROR_FN Vec<double> load(const double* p, int count) {
  return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
}
template <> MIRROR_FN void store(double* p, Vec<double> v, int count) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
}
MIRROR_FN bool any(Mask32 m) { return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0; }
MIRROR_FN bool any(Mask64 m) { return _mm512_test_epi64_mask((__m512i)m, (__m512i)m) != 0; }

#elif defined(__AVX2__)

MIRROR_FN __m256i first32(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
MIRROR_FN __m256i first64(int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <> MIRROR_FN Vec<float> load(const float* p, int count) {
  return (Vec<float>)_mm256_maskload_ps(p, first32(count));
}
template <> MIRROR_FN void store(float* p, Vec<float> v, int count) {
  _mm256_maskstore_ps(p, first32(count), (__m256)v);
}
template <> MIRROR_FN Vec<double> load(const double* p, int count) {
  return (Vec<double>)_mm256_maskload_pd(p, first64(count));
}
template <> MIRROR_FN void store(double* p, Vec<double> v, int count) {
  _mm256_maskstore_pd(p, first64(count), (__m256d)v);
}
MIRROR_FN bool any(Mask32 m) { return _mm256_movemask_ps((__m256)m) != 0; }
MIRROR_FN bool any(Mask64 m) { return _mm256_movemask_pd((__m256d)m) != 0; }

#else

MIRROR_FN bool any(Mask32 m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
MIRROR_FN bool any(Mask64 m) { return (m[0] | m[1]) != 0; }

#endif

// With `fill` in the lanes beyond count.
template <class T> MIRROR_FN Vec<T> load(const T* p, All, T) { return load(p); }
template <class T> MIRROR_FN Vec<T> load(const T* p, int count, T fill) {
  Vec<T> v = load(p, count);
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i < count ? v[i] : fill;
  return v;
}

// Half precision, 16 bits a lane.
typedef uint16_t Half16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kBytes)));

MIRROR_FN Half16 load16(const uint16_t* p, All) {
  Half16 h;
  std::memcpy(&h, p, sizeof(h));
  return h;
}
MIRROR_FN Half16 load16(const uint16_t* p, int count) {
  Half16 h{};
  std::memcpy(&h, p, count * sizeof(uint16_t));
  return h;
}
MIRROR_FN void store16(uint16_t* p, Half16 h, All) { std::memcpy(p, &h, sizeof(h)); }
MIRROR_FN void store16(uint16_t* p, Half16 h, int count) {
  std::memcpy(p, &h, count * sizeof(uint16_t));
}

MIRROR_FN Vec<float> from_bf16(Half16 h) {
  return (Vec<float>)(__builtin_convertvector(h, Bits32) << 16);
}
// To nearest, ties to even. A NaN may come out as another NaN or as Inf.
MIRROR_FN Half16 to_bf16(Vec<float> x) {
  const Bits32 bits = (Bits32)x;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Half16);
}

MIRROR_FN Vec<float> from_f16(Half16 h) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps((__mmask16)-1, (__m256i)h);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = (float)__builtin_bit_cast(_Float16, (uint16_t)h[i]);
  return x;
#endif
}
MIRROR_FN Half16 to_f16(Vec<float> x) {
#if defined(__AVX512F__)
  return (Half16)_mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Half16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  Half16 h;
  for (int i = 0; i < kLanes<float>; ++i) h[i] = __builtin_bit_cast(uint16_t, (_Float16)x[i]);
  return h;
#endif
}

// 1 / sqrt(d) for normal d >= 1. The estimates of x86 hold 14 (AVX-512) and 11 bits (AVX2); one
// step of Newton's method, or of Halley's, brings them to within 2 units in the last place.
MIRROR_FN Vec<float> rsqrt(Vec<float> d) {
#if defined(__AVX512F__)
  Vec<float> r = (Vec<float>)_mm512_maskz_rsqrt14_ps((__mmask16)-1, (__m512)d);
  return r * (1.5f - (0.5f * d) * (r * r));
#elif defined(__AVX2__)
  Vec<float> r = (Vec<float>)_mm256_rsqrt_ps((__m256)d);
  Vec<float> e = 1.0f - d * (r * r);
  return r + r * (e * (0.5f + 0.375f * e));
#else
  Vec<float> r;
  for (int i = 0; i < kLanes<float>; ++i) r[i] = 1 / __builtin_sqrtf(d[i]);
  return r;
#endif
}

// To within 4 units in the last place, where that saves an operation: enough for a slope that is
// multiplied by a small step.
MIRROR_FN Vec<float> rough_rsqrt(Vec<float> d) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  Vec<float> r = (Vec<float>)_mm256_rsqrt_ps((__m256)d);
  return r * (1.5f - (0.5f * d) * (r * r));
#else
  return rsqrt(d);
#endif
}

MIRROR_FN Vec<double> rsqrt(Vec<double> d) {
  Vec<double> r;
  for (int i = 0; i < kLanes<double>; ++i) r[i] = __builtin_sqrt(d[i]);
  return 1.0 / r;
}

// The sign bit off.
MIRROR_FN Vec<float> abs(Vec<float> x) { return (Vec<float>)((Mask32)x & 0x7fffffff); }
MIRROR_FN Vec<double> abs(Vec<double> x) {
  return (Vec<double>)((Mask64)x & 0x7fffffffffffffff);
}

// 1 / x to a few units in the last place, for x that is neither huge nor tiny.
MIRROR_FN Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  Vec<float> r = (Vec<float>)_mm512_maskz_rcp14_ps((__mmask16)-1, (__m512)x);
  return r + r * (1.0f - x * r);
#elif defined(__AVX2__)
  Vec<float> r = (Vec<float>)_mm256_rcp_ps((__m256)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

MIRROR_FN Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

// x * y, which the compiler must not contract with a sum.
#if defined(__AVX512F__)
#define MIRROR_ROUND(x) asm("" : "+v"(x))
#elif defined(__x86_64__)
#define MIRROR_ROUND(x) asm("" : "+x"(x))
#elif defined(__aarch64__)
#define MIRROR_ROUND(x) asm("" : "+w"(x))
#else
#define MIRROR_ROUND(x) asm("" : "+m"(x))
#endif
template <class V> MIRROR_FN V product(V x, V y) {
  V xy = x * y;
  MIRROR_ROUND(xy);
  return xy;
}

MIRROR_FN float abs(float x) { return __builtin_fabsf(x); }
MIRROR_FN double abs(double x) { return __builtin_fabs(x); }

// All lanes added in a fixed order.
template <class T> MIRROR_FN double total(Vec<T> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

}  // namespace
