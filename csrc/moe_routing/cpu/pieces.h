// What AVX2 has an instruction for (pieces_avx2.h), for any CPU; included behind lanes.h.
#pragma once

namespace megaforge::moe::MF_ISA {

MEGAFORGE_INLINE void stream(float* to, F x) { store(to, x); }
MEGAFORGE_INLINE std::uint32_t bits(M m) {
  std::uint32_t out = 0;
  alignas(64) std::int32_t lanes[kLanes];
  store(lanes, m);
  for (int lane = 0; lane < kLanes; ++lane) out |= static_cast<std::uint32_t>(lanes[lane] & 1) << lane;
  return out;
}

// After stream(): what was written past the caches is seen by whoever sees later stores.
MEGAFORGE_INLINE void end_of_streams() {}

}  // namespace megaforge::moe::MF_ISA
