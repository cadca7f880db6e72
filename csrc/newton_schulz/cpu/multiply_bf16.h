// Numbers rounded to bf16 are kept so and multiplied by AVX-512's own products; included behind words.h.

namespace megaforge::newton_schulz::MF_ISA {

using Half = std::uint16_t;

inline __m512 multiply_add(Bf16, Word a, __m512 b, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}

}  // namespace megaforge::newton_schulz::MF_ISA
