// Products with packed weights for any CPU.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bitgemm.h"

#define MF_ISA scalar
#include "finish.h"

namespace megaforge::bitgemm {
namespace scalar {

float quantize(const void* x, Type type, int64_t columns, int bits, std::int8_t* codes) {
  const auto value = [&](int64_t i) {
    if (type == Type::f32) return static_cast<const float*>(x)[i];
    return std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(x)[i]) << 16);
  };
  std::uint32_t largest_bits = 0;
  for (int64_t i = 0; i < columns; ++i) {
    largest_bits = std::max(largest_bits, std::bit_cast<std::uint32_t>(value(i)) & 0x7fffffffu);
  }
  if (largest_bits >= kInfinity) {
    std::memset(codes, 0, static_cast<std::size_t>(columns));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float largest = std::max(std::bit_cast<float>(largest_bits), kLeast);
  const int most = (1 << (bits - 1)) - 1;
  const float times = factor(largest, static_cast<float>(most));
  for (int64_t i = 0; i < columns; ++i) {
    codes[i] = static_cast<std::int8_t>(std::clamp(static_cast<int>(std::lrint(value(i) * times)), -most - 1, most));
  }
  return largest / static_cast<float>(most);
}

void tile(int bits, int count, const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps,
          std::int32_t* sums) {
  std::memset(sums, 0, sizeof(std::int32_t) * static_cast<std::size_t>(count * kPanel));
  const int mask = (1 << bits) - 1;
  for (int place = 0; place < 8 / bits; ++place) {
    for (int64_t s = 0; s < steps; ++s) {
      for (int m = 0; m < count; ++m) {
        const std::int8_t* four = tokens + ((place * steps + s) * count + m) * 4;
        for (int row = 0; row < kPanel; ++row) {
          const std::uint8_t* codes = panel + (s * kPanel + row) * 4;
          std::int32_t sum = 0;
          for (int b = 0; b < 4; ++b) sum += ((codes[b] >> (place * bits)) & mask) * four[b];
          sums[m * kPanel + row] += sum;
        }
      }
    }
  }
}

}  // namespace scalar

const Kernels scalar_kernels = {scalar::quantize, scalar::tile, scalar::scale, scalar::finish, nullptr, nullptr};

}  // namespace megaforge::bitgemm
