// Products of two bytes at once, whose sums multiples of codes would overflow; included in front of wide.h.

namespace megaforge::bitgemm::MF_ISA {

constexpr bool kMultiples = false;

// sum + the four products of unsigned codes and a token's bytes, in each lane.
inline __m512i add_products(__m512i sum, __m512i codes, __m512i token) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, token), _mm512_set1_epi16(1)));
}

// Codes at `place` of their bytes.
template <int kBits>
inline __m512i codes_at(const std::uint8_t* line, int place, __m512i mask) {
  return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(line), static_cast<unsigned>(place * kBits)), mask);
}

template <int kBits>
inline __m512i mask_of(int) {
  return _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
}

}  // namespace megaforge::bitgemm::MF_ISA
