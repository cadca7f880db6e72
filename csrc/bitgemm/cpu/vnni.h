// Products of four bytes at once (VNNI); included in front of wide.h.

namespace megaforge::bitgemm::MF_ISA {

constexpr bool kMultiples = true;  // codes stay where they are in their bytes: multiples of 2^(kBits place)

// sum + the four products of unsigned codes and a token's bytes, in each lane.
inline __m512i add_products(__m512i sum, __m512i codes, __m512i token) { return _mm512_dpbusd_epi32(sum, codes, token); }

template <int kBits>
inline __m512i codes_at(const std::uint8_t* line, int, __m512i mask) {
  return _mm512_and_si512(_mm512_loadu_si512(line), mask);
}

template <int kBits>
inline __m512i mask_of(int place) {
  return _mm512_set1_epi8(static_cast<char>(((1 << kBits) - 1) << (place * kBits)));
}

}  // namespace megaforge::bitgemm::MF_ISA
