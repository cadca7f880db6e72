// Products with packed weights for CPUs with AVX2.
#include "common/intrinsics.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "bitgemm.h"

#include "common/begin_avx2.h"

#define MF_ISA avx2
#include "finish.h"

namespace megaforge::bitgemm {
namespace avx2 {

constexpr int kLanes = 8;

inline __m256 load(const void* x, Type type, int64_t at) {
  if (type == Type::f32) return _mm256_loadu_ps(static_cast<const float*>(x) + at);
  const auto* narrow = reinterpret_cast<const __m128i*>(static_cast<const std::uint16_t*>(x) + at);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(narrow)), 16));
}

// The last values, with zeros behind them.
inline __m256 load_some(const void* x, Type type, int64_t at, int64_t count) {
  alignas(32) float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    values[i] = type == Type::f32 ? static_cast<const float*>(x)[at + i]
                                  : std::bit_cast<float>(
                                        static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(x)[at + i]) << 16);
  }
  return _mm256_load_ps(values);
}

float quantize(const void* x, Type type, int64_t columns, int bits, std::int8_t* codes) {
  const int64_t whole = columns / kLanes * kLanes;
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest_lanes = _mm256_setzero_si256();
  for (int64_t i = 0; i < columns; i += kLanes) {
    const __m256 values = i < whole ? load(x, type, i) : load_some(x, type, i, columns - i);
    largest_lanes = _mm256_max_epu32(largest_lanes, _mm256_and_si256(_mm256_castps_si256(values), magnitude));
  }
  alignas(32) std::uint32_t lanes[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest_lanes);
  const std::uint32_t largest_bits = *std::max_element(lanes, lanes + kLanes);
  if (largest_bits >= kInfinity) {
    std::memset(codes, 0, static_cast<std::size_t>(columns));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float largest = std::max(std::bit_cast<float>(largest_bits), kLeast);
  const int most = (1 << (bits - 1)) - 1;
  const __m256 times = _mm256_set1_ps(factor(largest, static_cast<float>(most)));
  const __m256i high = _mm256_set1_epi32(most), low = _mm256_set1_epi32(-most - 1);
  for (int64_t i = 0; i < columns; i += kLanes) {
    const __m256 values = i < whole ? load(x, type, i) : load_some(x, type, i, columns - i);
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(values, times));
    const __m256i clipped = _mm256_max_epi32(_mm256_min_epi32(rounded, high), low);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(clipped), _mm256_extracti128_si256(clipped, 1));
    const long long eight = _mm_cvtsi128_si64(_mm_packs_epi16(half, half));
    std::memcpy(codes + i, &eight, static_cast<std::size_t>(std::min<int64_t>(kLanes, columns - i)));
  }
  return largest / static_cast<float>(most);
}

// Up to four tokens and half of a panel.
template <int kBits, int kCount>
inline void part(const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps, int stride, std::int32_t* sums) {
  __m256i total[kCount][2];
#pragma GCC unroll 4
  for (int m = 0; m < kCount; ++m) total[m][0] = total[m][1] = _mm256_setzero_si256();
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1), ones = _mm256_set1_epi16(1);
  for (int place = 0; place < 8 / kBits; ++place) {
    const std::int8_t* four = tokens + place * steps * stride;
    for (int64_t s = 0; s < steps; ++s, four += stride) {
      const auto* line = reinterpret_cast<const __m256i*>(panel + s * kPanel * 4);
      __m256i codes[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        codes[h] = _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256(line + h), place * kBits), mask);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kCount; ++m) {
        int word;
        std::memcpy(&word, four + 4 * m, 4);
        const __m256i token = _mm256_set1_epi32(word);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256i pairs = _mm256_maddubs_epi16(codes[h], token);
          total[m][h] = _mm256_add_epi32(total[m][h], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kCount; ++m) {
    for (int h = 0; h < 2; ++h) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + m * kPanel + h * kLanes), total[m][h]);
    }
  }
}

template <int kBits>
void tile_of(int count, const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps, std::int32_t* sums) {
  const int stride = 4 * count;
  for (int half = 0; half < 2; ++half) {
    const std::uint8_t* rows = panel + half * 64;
    for (int m = 0; m < count; m += 4) {
      std::int32_t* const out = sums + m * kPanel + half * 16;
      if (count == 1) part<kBits, 1>(rows, tokens, steps, stride, out);
      else if (count == 2) part<kBits, 2>(rows, tokens, steps, stride, out);
      else part<kBits, 4>(rows, tokens + 4 * m, steps, stride, out);
    }
  }
}

void tile(int bits, int count, const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps,
          std::int32_t* sums) {
  const auto run = bits == 1 ? tile_of<1> : bits == 2 ? tile_of<2> : tile_of<4>;
  run(count, panel, tokens, steps, sums);
}

}  // namespace avx2

const Kernels avx2_kernels = {avx2::quantize, avx2::tile, avx2::scale, avx2::finish, nullptr, nullptr};

}  // namespace megaforge::bitgemm

#include "common/end_isa.h"
