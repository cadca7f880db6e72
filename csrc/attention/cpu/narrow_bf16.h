// AVX-512's own bf16 and its products; included behind types.h.

namespace megaforge::attention::MF_ISA {

// To the nearest bf16, halves to even; NaN stays NaN.
inline Half narrow(Vec x) { return (Half)_mm512_cvtneps_pbh(x); }

inline Vec multiply_add(Bf16, Word left, Vec right, Vec sums) {
  return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(static_cast<int>(left)), (__m512bh)right);
}

}  // namespace megaforge::attention::MF_ISA
