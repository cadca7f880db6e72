// Sixteen floats in a register of AVX-512.
#pragma once

#define MEGAFORGE_INLINE inline __attribute__((always_inline))

namespace megaforge::moe::MF_ISA {

constexpr int kLanes = 16;

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

// To the nearest bf16, ties to even; a NaN stays one.
MEGAFORGE_INLINE void store(std::uint16_t* to, F x) {
  const I b = _mm512_castps_si512(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), set(1));
  const I rounded = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, set(0x7fff))), 16);
  const I nan = _mm512_or_si512(_mm512_srli_epi32(b, 16), set(0x40));
  const M is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m256i narrow = _mm512_cvtepi32_epi16(pick(is_nan, nan, rounded));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
}

// After stream(): what was written past the caches is seen by whoever sees later stores.
MEGAFORGE_INLINE void end_of_streams() {
  _mm_sfence();
}

}  // namespace megaforge::moe::MF_ISA
