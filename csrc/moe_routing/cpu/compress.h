// For instruction sets that do not compress; included behind what there is of bits().
#pragma once

namespace megaforge::moe::MF_ISA {

// Lanes of m, close together; returns their number.
MEGAFORGE_INLINE int compress(float* to, std::int32_t* to_index, F x, I index, M m) {
  alignas(64) float lanes[kLanes];
  alignas(64) std::int32_t index_lanes[kLanes];
  store(lanes, x);
  store(index_lanes, index);
  int held = 0;
  for (std::uint32_t left = bits(m); left != 0; left &= left - 1) {
    to[held] = lanes[__builtin_ctz(left)];
    to_index[held++] = index_lanes[__builtin_ctz(left)];
  }
  return held;
}

}  // namespace megaforge::moe::MF_ISA
