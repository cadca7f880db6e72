// AVX-512's own bf16; included behind types.h.

namespace megaforge::pointwise::MF_ISA {

// To the nearest bf16, halves to even; NaN stays NaN.
MF_INLINE inline Half narrow(Vec x) { return (Half)_mm512_cvtneps_pbh(x); }

}  // namespace megaforge::pointwise::MF_ISA
