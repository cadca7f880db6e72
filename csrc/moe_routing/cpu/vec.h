// Sixteen floats, for the instruction set that the including file is compiled for and says with MEGAFORGE_AVX512 or
// MEGAFORGE_AVX2. Everything is inside a namespace of its own, so that code for different instruction sets never
// shares a symbol.
#pragma once

#if defined(MEGAFORGE_AVX512)
#define MEGAFORGE_MOE_ISA avx512
#elif defined(MEGAFORGE_AVX2)
#define MEGAFORGE_MOE_ISA avx2
#else
#define MEGAFORGE_MOE_ISA scalar
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own intrinsics
#pragma GCC diagnostic ignored "-Wpsabi"                // nothing here has an ABI: all of it is inlined
#endif
#define MEGAFORGE_INLINE inline __attribute__((always_inline))

namespace megaforge::moe::MEGAFORGE_MOE_ISA {

constexpr int kLanes = 16;

#if defined(MEGAFORGE_AVX512)

using F = __m512;
using I = __m512i;
using M = __mmask16;

MEGAFORGE_INLINE M first_lanes(int n) { return static_cast<M>((1u << n) - 1); }
MEGAFORGE_INLINE F set(float x) { return _mm512_set1_ps(x); }
MEGAFORGE_INLINE I set(std::int32_t x) { return _mm512_set1_epi32(x); }
MEGAFORGE_INLINE I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
MEGAFORGE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
MEGAFORGE_INLINE F load(const float* p, int n, float rest) { return _mm512_mask_loadu_ps(set(rest), first_lanes(n), p); }
MEGAFORGE_INLINE I load(const std::int32_t* p) { return _mm512_loadu_si512(p); }
MEGAFORGE_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
MEGAFORGE_INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
MEGAFORGE_INLINE void store(std::int32_t* p, I x) { _mm512_storeu_si512(p, x); }
MEGAFORGE_INLINE void stream(float* p, F x) { _mm512_stream_ps(p, x); }
MEGAFORGE_INLINE F gather(const float* p, std::int64_t stride, int n) {
  const I at = _mm512_mullo_epi32(iota(), set(static_cast<std::int32_t>(stride)));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_lanes(n), at, p, 4);
}
MEGAFORGE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
MEGAFORGE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
MEGAFORGE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
MEGAFORGE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
MEGAFORGE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
MEGAFORGE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is a NaN
MEGAFORGE_INLINE F negative_abs(F x) { return _mm512_or_ps(x, set(-0.0f)); }
MEGAFORGE_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
MEGAFORGE_INLINE M not_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
MEGAFORGE_INLINE M less(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
MEGAFORGE_INLINE M negated(M m) { return static_cast<M>(~m); }
MEGAFORGE_INLINE M either(M a, M b) { return a | b; }
MEGAFORGE_INLINE M both(M a, M b) { return a & b; }
MEGAFORGE_INLINE F pick(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
MEGAFORGE_INLINE I pick(M m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }
MEGAFORGE_INLINE I count(I x, M m) { return _mm512_mask_add_epi32(x, m, x, set(1)); }
MEGAFORGE_INLINE std::uint32_t bits(M m) { return m; }
MEGAFORGE_INLINE F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
MEGAFORGE_INLINE F times_power_of_two(F x, F n) { return _mm512_scalef_ps(x, n); }
MEGAFORGE_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
MEGAFORGE_INLINE float largest(F x) { return _mm512_reduce_max_ps(x); }
MEGAFORGE_INLINE F exponent(F x) { return _mm512_getexp_ps(x); }
MEGAFORGE_INLINE F mantissa(F x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }
MEGAFORGE_INLINE F load(const std::uint16_t* p) {
  const auto wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#else  // GCC and Clang vectors: two of AVX2, or whatever else there is

typedef float F __attribute__((vector_size(64), aligned(64)));
typedef std::int32_t I __attribute__((vector_size(64), aligned(64)));
typedef std::uint32_t U __attribute__((vector_size(64), aligned(64)));
typedef std::uint16_t H __attribute__((vector_size(32), aligned(32)));
using M = I;

MEGAFORGE_INLINE F set(float x) { return F{} + x; }
MEGAFORGE_INLINE I set(std::int32_t x) { return I{} + x; }
MEGAFORGE_INLINE I iota() { return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
MEGAFORGE_INLINE F load(const float* p) { F x; __builtin_memcpy(&x, p, sizeof x); return x; }
MEGAFORGE_INLINE F load(const float* p, int n, float rest) { F x = set(rest); __builtin_memcpy(&x, p, 4 * n); return x; }
MEGAFORGE_INLINE I load(const std::int32_t* p) { I x; __builtin_memcpy(&x, p, sizeof x); return x; }
MEGAFORGE_INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
MEGAFORGE_INLINE void store(float* p, F x, int n) { __builtin_memcpy(p, &x, 4 * n); }
MEGAFORGE_INLINE void store(std::int32_t* p, I x) { __builtin_memcpy(p, &x, sizeof x); }
MEGAFORGE_INLINE void stream(float* p, F x) {
#if defined(MEGAFORGE_AVX2)
  _mm256_stream_ps(p, __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_stream_ps(p + 8, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  store(p, x);
#endif
}
MEGAFORGE_INLINE F gather(const float* p, std::int64_t stride, int n) {
  F x{};
  for (int lane = 0; lane < n; ++lane) x[lane] = p[lane * stride];
  return x;
}
MEGAFORGE_INLINE F add(F a, F b) { return a + b; }
MEGAFORGE_INLINE F sub(F a, F b) { return a - b; }
MEGAFORGE_INLINE F mul(F a, F b) { return a * b; }
MEGAFORGE_INLINE F div(F a, F b) { return a / b; }
MEGAFORGE_INLINE F fma(F a, F b, F c) { return a * b + c; }
MEGAFORGE_INLINE F max(F a, F b) { return a > b ? a : b; }
MEGAFORGE_INLINE F negative_abs(F x) { return reinterpret_cast<F>(reinterpret_cast<I>(x) | set(INT32_MIN)); }
MEGAFORGE_INLINE M less(F a, F b) { return a < b; }
MEGAFORGE_INLINE M not_above(F a, F b) { return a <= b; }
MEGAFORGE_INLINE M less(I a, I b) { return a < b; }
MEGAFORGE_INLINE M negated(M m) { return ~m; }
MEGAFORGE_INLINE M either(M a, M b) { return a | b; }
MEGAFORGE_INLINE M both(M a, M b) { return a & b; }
MEGAFORGE_INLINE F pick(M m, F yes, F no) { return m ? yes : no; }
MEGAFORGE_INLINE I pick(M m, I yes, I no) { return m ? yes : no; }
MEGAFORGE_INLINE I count(I x, M m) { return x - m; }
MEGAFORGE_INLINE std::uint32_t bits(M m) {
#if defined(MEGAFORGE_AVX2)
  const __m256i low = reinterpret_cast<__m256i>(__builtin_shufflevector(m, m, 0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i high = reinterpret_cast<__m256i>(__builtin_shufflevector(m, m, 8, 9, 10, 11, 12, 13, 14, 15));
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(low))) |
         static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(high))) << 8;
#else
  std::uint32_t out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out |= static_cast<std::uint32_t>(m[lane] & 1) << lane;
  return out;
#endif
}
MEGAFORGE_INLINE F round(F x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| < 2^22
MEGAFORGE_INLINE F times_power_of_two(F x, F n) {
  const I bits = (__builtin_convertvector(n, I) + 127) << 23;
  return n < -126.0f ? F{} : x * reinterpret_cast<F>(bits);
}
MEGAFORGE_INLINE float sum(F x) {
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
  }
  return x[0];
}
MEGAFORGE_INLINE float largest(F x) {
  float out = x[0];
  for (int lane = 1; lane < kLanes; ++lane) out = x[lane] > out ? x[lane] : out;
  return out;
}
MEGAFORGE_INLINE F exponent(F x) { return __builtin_convertvector(((reinterpret_cast<I>(x) >> 23) & 255) - 127, F); }
MEGAFORGE_INLINE F mantissa(F x) {
  return reinterpret_cast<F>((reinterpret_cast<I>(x) & 0x007fffff) | 0x3f800000);
}
MEGAFORGE_INLINE F load(const std::uint16_t* p) {
  H narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  return reinterpret_cast<F>(__builtin_convertvector(narrow, I) << 16);
}

#endif

// exp(x) for x <= 0, to 1.5 units in the last place; below -104 (AVX-512) or -87 (others) zero. A NaN stays one.
MEGAFORGE_INLINE F exp_of_negative(F x) {
  x = max(set(-104.0f), x);
  const F n = round(mul(x, set(1.44269504088896341f)));
  F r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  F y = fma(set(1.9875691500e-4f), r, set(1.3981999507e-3f));  // Cephes, expf
  y = fma(y, r, set(8.3334519073e-3f));
  y = fma(y, r, set(4.1665795894e-2f));
  y = fma(y, r, set(1.6666665459e-1f));
  y = fma(y, r, set(5.0000001201e-1f));
  y = add(fma(y, mul(r, r), r), set(1.0f));
  return times_power_of_two(y, n);
}

// log(x) for normal x > 0, to 1.5 units in the last place.
MEGAFORGE_INLINE F log_of_positive(F x) {
  F n = exponent(x), m = mantissa(x);  // x = 2^n * m, m in [1, 2)
  const M high = less(set(1.41421356f), m);
  n = pick(high, add(n, set(1.0f)), n);
  m = sub(pick(high, mul(m, set(0.5f)), m), set(1.0f));
  const F square = mul(m, m);
  F y = fma(set(7.0376836292e-2f), m, set(-1.1514610310e-1f));  // Cephes, logf
  y = fma(y, m, set(1.1676998740e-1f));
  y = fma(y, m, set(-1.2420140846e-1f));
  y = fma(y, m, set(1.4249322787e-1f));
  y = fma(y, m, set(-1.6668057665e-1f));
  y = fma(y, m, set(2.0000714765e-1f));
  y = fma(y, m, set(-2.4999993993e-1f));
  y = fma(y, m, set(3.3333331174e-1f));
  y = mul(mul(y, m), square);
  y = fma(n, set(-2.12194440e-4f), y);
  y = fma(square, set(-0.5f), y);
  return fma(n, set(0.693359375f), add(m, y));
}

// 1 / (1 + exp(-x)).
MEGAFORGE_INLINE F sigmoid(F x) {
  const F small = exp_of_negative(negative_abs(x));
  return div(pick(less(x, set(0.0f)), small, set(1.0f)), add(small, set(1.0f)));
}

// To the nearest bf16, ties to even; a NaN stays one.
MEGAFORGE_INLINE void store(std::uint16_t* p, F x) {
#if defined(MEGAFORGE_AVX512)
  const I b = _mm512_castps_si512(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), set(1));
  const I rounded = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, set(0x7fff))), 16);
  const I nan = _mm512_or_si512(_mm512_srli_epi32(b, 16), set(0x40));
  const M is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m256i narrow = _mm512_cvtepi32_epi16(pick(is_nan, nan, rounded));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
#else
  const U b = reinterpret_cast<U>(x);
  const U rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const H narrow = __builtin_convertvector((b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded, H);
  __builtin_memcpy(p, &narrow, sizeof narrow);
#endif
}

// After stream(): what was written past the caches is seen by whoever sees later stores.
MEGAFORGE_INLINE void end_of_streams() {
#if defined(MEGAFORGE_AVX512) || defined(MEGAFORGE_AVX2)
  _mm_sfence();
#endif
}

}  // namespace megaforge::moe::MEGAFORGE_MOE_ISA
