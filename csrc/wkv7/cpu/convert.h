// Element types. Everything here is force-inlined, so that code for different instruction sets never shares a symbol.
#pragma once

#include <cstddef>
#include <cstdint>

#include "wkv7.h"

#define MEGAFORGE_INLINE inline __attribute__((always_inline))

namespace megaforge::wkv7 {

MEGAFORGE_INLINE std::size_t size_of(Type type) { return type == Type::bf16 ? 2 : type == Type::f32 ? 4 : 8; }

MEGAFORGE_INLINE float from_bf16(std::uint16_t x) { return __builtin_bit_cast(float, static_cast<std::uint32_t>(x) << 16); }

// To the nearest, ties to even; a NaN stays one.
MEGAFORGE_INLINE std::uint16_t to_bf16(float x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace megaforge::wkv7
