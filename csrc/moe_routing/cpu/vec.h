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
MEGAFORGE_INLINE float least(M m, F x) { return _mm512_mask_reduce_min_ps(m, x); }
MEGAFORGE_INLINE std::int32_t total(I x) { return _mm512_reduce_add_epi32(x); }
MEGAFORGE_INLINE I offset(I x, std::int32_t by) { return _mm512_add_epi32(x, set(by)); }
// Lanes of m, close together; returns their number. Writes sixteen lanes whatever it is.
MEGAFORGE_INLINE int compress(float* to, std::int32_t* to_index, F x, I index, M m) {
  store(to, _mm512_maskz_compress_ps(m, x));
  store(to_index, _mm512_maskz_compress_epi32(m, index));
  return __builtin_popcount(m);
}
MEGAFORGE_INLINE F exponent(F x) { return _mm512_getexp_ps(x); }
MEGAFORGE_INLINE F mantissa(F x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }
MEGAFORGE_INLINE F load(const std::uint16_t* p) {
  const auto wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#else  // pieces of what the machine has: two of AVX2, four of SSE or NEON

#if defined(MEGAFORGE_AVX2)
constexpr int kPiece = 8;
#else
constexpr int kPiece = 4;
#endif
constexpr int kPieces = kLanes / kPiece;
typedef float FPiece __attribute__((vector_size(4 * kPiece)));
typedef std::int32_t IPiece __attribute__((vector_size(4 * kPiece)));
typedef std::uint32_t UPiece __attribute__((vector_size(4 * kPiece)));
typedef std::uint16_t HPiece __attribute__((vector_size(2 * kPiece)));
struct F { FPiece at[kPieces]; };
struct I { IPiece at[kPieces]; };
using M = I;  // all bits of a lane, or none

#define MEGAFORGE_PIECES(Result, expression) \
  Result out;                                \
  for (int p = 0; p < kPieces; ++p) out.at[p] = (expression); \
  return out

MEGAFORGE_INLINE F set(float x) { MEGAFORGE_PIECES(F, FPiece{} + x); }
MEGAFORGE_INLINE I set(std::int32_t x) { MEGAFORGE_PIECES(I, IPiece{} + x); }
MEGAFORGE_INLINE I load(const std::int32_t* from) { I x; __builtin_memcpy(&x, from, sizeof x); return x; }
MEGAFORGE_INLINE I iota() {
  alignas(64) static constexpr std::int32_t lanes[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(lanes);
}
MEGAFORGE_INLINE F load(const float* from) { F x; __builtin_memcpy(&x, from, sizeof x); return x; }
MEGAFORGE_INLINE F load(const float* from, int n, float rest) {
  alignas(64) float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < n ? from[lane] : rest;
  return load(lanes);
}
MEGAFORGE_INLINE void store(float* to, F x) { __builtin_memcpy(to, &x, sizeof x); }
MEGAFORGE_INLINE void store(float* to, F x, int n) {
  if (n == kLanes) return store(to, x);
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int lane = 0; lane < n; ++lane) to[lane] = lanes[lane];
}
MEGAFORGE_INLINE void store(std::int32_t* to, I x) { __builtin_memcpy(to, &x, sizeof x); }
MEGAFORGE_INLINE void stream(float* to, F x) {
#if defined(MEGAFORGE_AVX2)
  for (int p = 0; p < kPieces; ++p) _mm256_stream_ps(to + p * kPiece, reinterpret_cast<__m256>(x.at[p]));
#else
  store(to, x);
#endif
}
MEGAFORGE_INLINE F gather(const float* from, std::int64_t stride, int n) {
  alignas(64) float lanes[kLanes] = {};
  for (int lane = 0; lane < n; ++lane) lanes[lane] = from[lane * stride];
  return load(lanes);
}
MEGAFORGE_INLINE F add(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] + b.at[p]); }
MEGAFORGE_INLINE F sub(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] - b.at[p]); }
MEGAFORGE_INLINE F mul(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] * b.at[p]); }
MEGAFORGE_INLINE F div(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] / b.at[p]); }
MEGAFORGE_INLINE F fma(F a, F b, F c) { MEGAFORGE_PIECES(F, a.at[p] * b.at[p] + c.at[p]); }
MEGAFORGE_INLINE F max(F a, F b) { MEGAFORGE_PIECES(F, a.at[p] > b.at[p] ? a.at[p] : b.at[p]); }
MEGAFORGE_INLINE F negative_abs(F x) {
  MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>(reinterpret_cast<IPiece>(x.at[p]) | INT32_MIN));
}
MEGAFORGE_INLINE M less(F a, F b) { MEGAFORGE_PIECES(M, a.at[p] < b.at[p]); }
MEGAFORGE_INLINE M not_above(F a, F b) { MEGAFORGE_PIECES(M, a.at[p] <= b.at[p]); }
MEGAFORGE_INLINE M less(I a, I b) { MEGAFORGE_PIECES(M, a.at[p] < b.at[p]); }
MEGAFORGE_INLINE M negated(M m) { MEGAFORGE_PIECES(M, ~m.at[p]); }
MEGAFORGE_INLINE M either(M a, M b) { MEGAFORGE_PIECES(M, a.at[p] | b.at[p]); }
MEGAFORGE_INLINE M both(M a, M b) { MEGAFORGE_PIECES(M, a.at[p] & b.at[p]); }
MEGAFORGE_INLINE I pick(M m, I yes, I no) { MEGAFORGE_PIECES(I, (m.at[p] & yes.at[p]) | (~m.at[p] & no.at[p])); }
MEGAFORGE_INLINE F pick(M m, F yes, F no) {
  MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>((m.at[p] & reinterpret_cast<IPiece>(yes.at[p])) |
                                               (~m.at[p] & reinterpret_cast<IPiece>(no.at[p]))));
}
MEGAFORGE_INLINE I count(I x, M m) { MEGAFORGE_PIECES(I, x.at[p] - m.at[p]); }
MEGAFORGE_INLINE I offset(I x, std::int32_t by) { MEGAFORGE_PIECES(I, x.at[p] + by); }
MEGAFORGE_INLINE std::uint32_t bits(M m) {
  std::uint32_t out = 0;
#if defined(MEGAFORGE_AVX2)
  for (int p = 0; p < kPieces; ++p) {
    const auto lanes = static_cast<std::uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m.at[p])));
    out |= lanes << (p * kPiece);
  }
#else
  alignas(64) std::int32_t lanes[kLanes];
  store(lanes, m);
  for (int lane = 0; lane < kLanes; ++lane) out |= static_cast<std::uint32_t>(lanes[lane] & 1) << lane;
#endif
  return out;
}
// Lanes of m, close together; returns their number.
MEGAFORGE_INLINE int compress(float* to, std::int32_t* to_index, F x, I index, M m) {
  alignas(64) float lanes[kLanes];
  alignas(64) std::int32_t index_lanes[kLanes];
  store(lanes, x);
  store(index_lanes, index);
  int held = 0;
  for (std::uint32_t left = bits(m); left != 0; left &= left - 1) {
    to[held] = lanes[__builtin_ctz(left)];
    to_index[held++] = index_lanes[__builtin_ctz(left)];
  }
  return held;
}
MEGAFORGE_INLINE F round(F x) { MEGAFORGE_PIECES(F, (x.at[p] + 12582912.0f) - 12582912.0f); }  // |x| < 2^22
MEGAFORGE_INLINE F times_power_of_two(F x, F n) {
  const F factor = [&] {
    MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>((__builtin_convertvector(n.at[p], IPiece) + 127) << 23));
  }();
  return pick(less(n, set(-126.0f)), set(0.0f), mul(x, factor));
}
MEGAFORGE_INLINE float sum(F x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}
MEGAFORGE_INLINE std::int32_t total(I x) {
  alignas(64) std::int32_t lanes[kLanes];
  store(lanes, x);
  std::int32_t out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out += lanes[lane];
  return out;
}
MEGAFORGE_INLINE float largest(F x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  float out = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) out = lanes[lane] > out ? lanes[lane] : out;
  return out;
}
MEGAFORGE_INLINE float least(M m, F x) {
  return -largest(pick(m, sub(set(0.0f), x), set(-__builtin_inff())));
}
MEGAFORGE_INLINE F exponent(F x) {
  MEGAFORGE_PIECES(F, __builtin_convertvector(((reinterpret_cast<IPiece>(x.at[p]) >> 23) & 255) - 127, FPiece));
}
MEGAFORGE_INLINE F mantissa(F x) {
  MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>((reinterpret_cast<IPiece>(x.at[p]) & 0x007fffff) | 0x3f800000));
}
MEGAFORGE_INLINE F load(const std::uint16_t* from) {
  HPiece narrow[kPieces];
  __builtin_memcpy(narrow, from, sizeof narrow);
  MEGAFORGE_PIECES(F, reinterpret_cast<FPiece>(__builtin_convertvector(narrow[p], UPiece) << 16));
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
MEGAFORGE_INLINE void store(std::uint16_t* to, F x) {
#if defined(MEGAFORGE_AVX512)
  const I b = _mm512_castps_si512(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), set(1));
  const I rounded = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, set(0x7fff))), 16);
  const I nan = _mm512_or_si512(_mm512_srli_epi32(b, 16), set(0x40));
  const M is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m256i narrow = _mm512_cvtepi32_epi16(pick(is_nan, nan, rounded));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
#else
  HPiece narrow[kPieces];
  for (int p = 0; p < kPieces; ++p) {
    const auto b = reinterpret_cast<UPiece>(x.at[p]);
    const auto is_nan = reinterpret_cast<UPiece>(x.at[p] != x.at[p]);
    const UPiece rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    narrow[p] = __builtin_convertvector((is_nan & ((b >> 16) | 0x40u)) | (~is_nan & rounded), HPiece);
  }
  __builtin_memcpy(to, narrow, sizeof narrow);
#endif
}

// After stream(): what was written past the caches is seen by whoever sees later stores.
MEGAFORGE_INLINE void end_of_streams() {
#if defined(MEGAFORGE_AVX512) || defined(MEGAFORGE_AVX2)
  _mm_sfence();
#endif
}

}  // namespace megaforge::moe::MEGAFORGE_MOE_ISA
