// Numbers in bf16 by AVX-512's products of them; included behind part.h.

namespace megaforge::gemv::MF_ISA {

template <>
struct Part<Bf16> {
  using Values = __m512i;
  static constexpr int kValues = 32;
  static Values load(const Bf16* from) { return _mm512_loadu_si512(from); }
  static Values load_some(const Bf16* from, int64_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1ull), from);
  }
  static Vec product(Values a, Values b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

}  // namespace megaforge::gemv::MF_ISA
