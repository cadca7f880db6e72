// What AVX-512 has an instruction for; included behind narrow.h or narrow_bf16.h. lanes.h has the same for others.

namespace megaforge::pointwise::MF_ISA {

// Zeros in the lanes that are not there, which are neither read nor written.
MF_INLINE inline __mmask16 mask(Some part) { return static_cast<__mmask16>((1u << part.count) - 1u); }
MF_INLINE inline Vec load(const float* from, Some part) { return _mm512_maskz_loadu_ps(mask(part), from); }
MF_INLINE inline Vec load(const Bf16* from, Some part) { return widen((Half)_mm256_maskz_loadu_epi16(mask(part), from)); }
MF_INLINE inline void store(float* to, Vec x, Some part) { _mm512_mask_storeu_ps(to, mask(part), x); }
MF_INLINE inline void store(Bf16* to, Vec x, Some part) { _mm256_mask_storeu_epi16(to, mask(part), (__m256i)narrow(x)); }

// x, and `other` in the lanes that are not there.
MF_INLINE inline Vec keep(Vec x, Some part, float other) { return _mm512_mask_blend_ps(mask(part), all(other), x); }

MF_INLINE inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }

MF_INLINE inline Vec within(Vec x, float least, float most) {
  return _mm512_min_ps(all(most), _mm512_max_ps(all(least), x));  // a NaN stays one
}

MF_INLINE inline Vec nearest_whole(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// p 2^n for whole n, and 0 for n below -126.
MF_INLINE inline Vec times_power_of_two(Vec p, Vec n) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, all(-126.0f), _CMP_NLT_UQ), p, n);
}

// To 6e-5 for what is rounded to bf16, a thirtieth of its rounding.
template <class T>
MF_INLINE inline Vec one_over(Vec x) {
  if constexpr (sizeof(T) == 2) return _mm512_rcp14_ps(x);
  else return 1.0f / x;
}

}  // namespace megaforge::pointwise::MF_ISA
