// What AVX2 has an instruction for; included behind lanes.h.
#pragma once

namespace megaforge::moe::MF_ISA {

MEGAFORGE_INLINE void stream(float* to, F x) {
  for (int p = 0; p < kPieces; ++p) _mm256_stream_ps(to + p * kPiece, reinterpret_cast<__m256>(x.at[p]));
}
MEGAFORGE_INLINE std::uint32_t bits(M m) {
  std::uint32_t out = 0;
  for (int p = 0; p < kPieces; ++p) {
    const auto lanes = static_cast<std::uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m.at[p])));
    out |= lanes << (p * kPiece);
  }
  return out;
}

// After stream(): what was written past the caches is seen by whoever sees later stores.
MEGAFORGE_INLINE void end_of_streams() {
  _mm_sfence();
}

}  // namespace megaforge::moe::MF_ISA
