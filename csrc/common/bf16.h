// bfloat16, whichever compiler reads it.
#pragma once

#include <cstdint>
#include <cstring>

namespace megaforge {

struct Bf16 {
  std::uint16_t bits;
};

// The nearest, ties to even; NaN stays NaN. On a host: a GPU has an instruction.
inline Bf16 nearest_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace megaforge
