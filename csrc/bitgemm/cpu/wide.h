// The code for AVX-512, for the instruction set that MF_ISA names; included behind vnni.h or pairs.h.

namespace megaforge::bitgemm::MF_ISA {

constexpr int kLanes = 16;

inline __m512 load(const void* x, Type type, int64_t at, __mmask16 valid) {
  if (type == Type::f32) return _mm512_maskz_loadu_ps(valid, static_cast<const float*>(x) + at);
  const __m256i narrow = _mm256_maskz_loadu_epi16(valid, static_cast<const std::uint16_t*>(x) + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline __mmask16 valid(int64_t left) {
  return static_cast<__mmask16>(left >= kLanes ? 0xffff : (1u << left) - 1u);
}

inline float quantize(const void* x, Type type, int64_t columns, int bits, std::int8_t* codes) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i lanes = _mm512_setzero_si512();
  for (int64_t i = 0; i < columns; i += kLanes) {
    const __m512i values = _mm512_castps_si512(load(x, type, i, valid(columns - i)));
    lanes = _mm512_max_epu32(lanes, _mm512_and_si512(values, magnitude));
  }
  const std::uint32_t largest_bits = _mm512_reduce_max_epu32(lanes);
  if (largest_bits >= kInfinity) {
    std::memset(codes, 0, static_cast<std::size_t>(columns));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float largest = std::max(std::bit_cast<float>(largest_bits), kLeast);
  const int most = (1 << (bits - 1)) - 1;
  const __m512 times = _mm512_set1_ps(factor(largest, static_cast<float>(most)));
  const __m512i high = _mm512_set1_epi32(most), low = _mm512_set1_epi32(-most - 1);
  for (int64_t i = 0; i < columns; i += kLanes) {
    const __mmask16 some = valid(columns - i);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(x, type, i, some), times));
    const __m512i clipped = _mm512_max_epi32(_mm512_min_epi32(rounded, high), low);
    _mm_mask_storeu_epi8(codes + i, some, _mm512_cvtepi32_epi8(clipped));
  }
  return largest / static_cast<float>(most);
}

// Holds a value in its register, in this order: compilers load operands twice, and reorder sums until registers run out.
inline void keep(__m512i& x) { asm volatile("" : "+v"(x)); }

inline __m512i broadcast(const std::int8_t* four) {
  int word;
  std::memcpy(&word, four, 4);
  return _mm512_set1_epi32(word);
}

// A pass over the panel for each place of a byte, from the highest to the lowest. Where codes are multiples, what the sums have of a
// higher place is a multiple of what a lower one is, and is shifted down in between.
template <int kBits, int kCount>
void tile_of(const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps, std::int32_t* sums) {
  __m512i total[kCount][2];
#pragma GCC unroll 12
  for (int m = 0; m < kCount; ++m) total[m][0] = total[m][1] = _mm512_setzero_si512();
  for (int place = 8 / kBits - 1; place >= 0; --place) {
    const __m512i mask = mask_of<kBits>(place);
    const std::int8_t* four = tokens + place * steps * kCount * 4;
    for (int64_t s = 0; s < steps; ++s, four += kCount * 4) {
      const __m512i low = codes_at<kBits>(panel + s * kPanel * 4, place, mask);
      const __m512i high = codes_at<kBits>(panel + s * kPanel * 4 + 64, place, mask);
#pragma GCC unroll 12
      for (int m = 0; m < kCount; ++m) {
        const __m512i token = broadcast(four + 4 * m);
        total[m][0] = add_products(total[m][0], low, token);
        total[m][1] = add_products(total[m][1], high, token);
      }
    }
    if (kMultiples && place > 0) {
#pragma GCC unroll 12
      for (int m = 0; m < kCount; ++m) {
        total[m][0] = _mm512_srai_epi32(total[m][0], kBits);
        total[m][1] = _mm512_srai_epi32(total[m][1], kBits);
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kCount; ++m) {
    _mm512_storeu_si512(sums + m * kPanel, total[m][0]);
    _mm512_storeu_si512(sums + m * kPanel + 16, total[m][1]);
  }
}

// One pass for one or two tokens, of multiples: the weights come from memory, once. Each place has sums of its own.
template <int kBits, int kCount>
void pass_once(const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps, std::int32_t* sums) {
  constexpr int kPlaces = 8 / kBits;
  __m512i total[kCount][kPlaces][2], mask[kPlaces];
#pragma GCC unroll 8
  for (int p = 0; p < kPlaces; ++p) {
    mask[p] = mask_of<kBits>(p);
#pragma GCC unroll 2
    for (int m = 0; m < kCount; ++m) total[m][p][0] = total[m][p][1] = _mm512_setzero_si512();
  }
  const int64_t apart = steps * kCount * 4;
  for (int64_t s = 0; s < steps; ++s) {
    const __m512i low = _mm512_loadu_si512(panel + s * kPanel * 4);
    const __m512i high = _mm512_loadu_si512(panel + s * kPanel * 4 + 64);
#pragma GCC unroll 8
    for (int p = 0; p < kPlaces; ++p) {
      const __m512i low_codes = _mm512_and_si512(low, mask[p]), high_codes = _mm512_and_si512(high, mask[p]);
#pragma GCC unroll 2
      for (int m = 0; m < kCount; ++m) {
        const __m512i token = broadcast(tokens + p * apart + (s * kCount + m) * 4);
        total[m][p][0] = add_products(total[m][p][0], low_codes, token);
        total[m][p][1] = add_products(total[m][p][1], high_codes, token);
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < kCount; ++m) {
    for (int h = 0; h < 2; ++h) {
      __m512i sum = total[m][kPlaces - 1][h];
#pragma GCC unroll 8
      for (int p = kPlaces - 2; p >= 0; --p) {
        sum = _mm512_add_epi32(_mm512_srai_epi32(sum, kBits), total[m][p][h]);
      }
      _mm512_storeu_si512(sums + m * kPanel + 16 * h, sum);
    }
  }
}

template <int kBits>
void tile_for(int count, const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps, std::int32_t* sums) {
  if constexpr (kMultiples) {
    if (count == 1) return pass_once<kBits, 1>(panel, tokens, steps, sums);
    if (count == 2) return pass_once<kBits, 2>(panel, tokens, steps, sums);
  }
  switch (count) {
    case 1: return tile_of<kBits, 1>(panel, tokens, steps, sums);
    case 2: return tile_of<kBits, 2>(panel, tokens, steps, sums);
    case 4: return tile_of<kBits, 4>(panel, tokens, steps, sums);
    case 8: return tile_of<kBits, 8>(panel, tokens, steps, sums);
    default: return tile_of<kBits, 12>(panel, tokens, steps, sums);
  }
}

inline void tile(int bits, int count, const std::uint8_t* panel, const std::int8_t* tokens, int64_t steps,
                 std::int32_t* sums) {
  const auto run = bits == 1 ? tile_for<1> : bits == 2 ? tile_for<2> : tile_for<4>;
  run(count, panel, tokens, steps, sums);
}

inline __m512i pair(const std::int8_t* two) {
  short word;
  std::memcpy(&word, two, 2);
  return _mm512_set1_epi16(word);
}

// For each five codes the 32 sums of those whose bit is set in the index.
inline void tables(int count, const std::int8_t* codes, int64_t stride, int64_t words, std::int16_t* tables) {
  alignas(64) std::uint8_t bits[3][64];
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 6; ++j) bits[j / 2][2 * i + j % 2] = static_cast<std::uint8_t>(j < 5 ? (i >> j) & 1 : 0);
  }
  const __m512i first = _mm512_load_si512(bits[0]), second = _mm512_load_si512(bits[1]);
  const __m512i third = _mm512_load_si512(bits[2]);
  for (int64_t five = 0; five < 3 * words; ++five) {
    for (int m = 0; m < count; ++m, tables += 32) {
      const std::int8_t* from = codes + m * stride + 5 * five;
      const __m512i sum = _mm512_add_epi16(_mm512_maddubs_epi16(first, pair(from)), _mm512_maddubs_epi16(second, pair(from + 2)));
      _mm512_storeu_si512(tables, _mm512_add_epi16(sum, _mm512_maddubs_epi16(third, pair(from + 4))));
    }
  }
}

inline void add_wide(std::int32_t* sums, __m512i narrow) {
  const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(narrow));
  const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(narrow, 1));
  _mm512_storeu_si512(sums, _mm512_add_epi32(_mm512_loadu_si512(sums), low));
  _mm512_storeu_si512(sums + 16, _mm512_add_epi32(_mm512_loadu_si512(sums + 16), high));
}

// At most kBlockWords words of each panel. An index is the lowest five bits of its lane; what is above them is not
// looked at.
template <int kCount>
void look_up_all(const std::uint16_t* panel, int64_t panels, const std::int16_t* tables, int64_t words,
                 std::int32_t* sums, int64_t stride) {
  for (int64_t p = 0; p < panels; ++p, sums += kWide) {
    __m512i total[kCount][2];
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) total[m][0] = total[m][1] = _mm512_setzero_si512();
    const std::int16_t* of_word = tables;
    for (int64_t w = 0; w < words; ++w, panel += kWide) {
      __m512i low = _mm512_loadu_si512(panel), high = _mm512_loadu_si512(panel + 32);
#pragma GCC unroll 3
      for (int five = 0; five < 3; ++five, of_word += 32 * kCount) {
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m) {
          __m512i table = _mm512_loadu_si512(of_word + 32 * m);
          keep(table);
          total[m][0] = _mm512_add_epi16(total[m][0], _mm512_permutexvar_epi16(low, table));
          total[m][1] = _mm512_add_epi16(total[m][1], _mm512_permutexvar_epi16(high, table));
          keep(total[m][0]), keep(total[m][1]);
        }
        if (five < 2) low = _mm512_srli_epi16(low, 5), high = _mm512_srli_epi16(high, 5);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
      add_wide(sums + m * stride, total[m][0]);
      add_wide(sums + m * stride + 32, total[m][1]);
    }
  }
}

inline void look_up(int count, const std::uint16_t* panel, int64_t panels, const std::int16_t* tables, int64_t words,
                    std::int32_t* sums, int64_t stride) {
  switch (count) {
    case 1: return look_up_all<1>(panel, panels, tables, words, sums, stride);
    case 2: return look_up_all<2>(panel, panels, tables, words, sums, stride);
    case 4: return look_up_all<4>(panel, panels, tables, words, sums, stride);
    default: return look_up_all<8>(panel, panels, tables, words, sums, stride);
  }
}

constexpr Kernels kKernels = {quantize, tile, scale, finish, tables, look_up};

}  // namespace megaforge::bitgemm::MF_ISA
