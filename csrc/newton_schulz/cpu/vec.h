// The innermost loops, for the instruction set that MF_ISA names; included once by each of its files.
//
// Factors of a product are packed: 16 rows of the left one, or 16 columns of the right one, are a panel, in which the
// 16 words of one place along the depth lie together. A word is an fp32 number, or two bf16 ones that follow each other
// along the depth.

namespace megaforge::newton_schulz::MF_ISA {

using std::int64_t;
using Word = std::uint32_t;
constexpr int kPanel = 16;

struct F32 {};
struct Bf16 {};

inline float as_float(Word x) { return std::bit_cast<float>(x); }

#if defined(MEGAFORGE_AVX512)

constexpr int kRows = 8;

inline __m512 multiply_add(F32, Word a, __m512 b, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a))), b, sum);
}
#if defined(MEGAFORGE_AVX512_BF16)
inline __m512 multiply_add(Bf16, Word a, __m512 b, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}
#endif

// c [8, 16 kPanels] (+)= 8 rows of a left panel times kPanels right ones, over `depth` words.
template <class Type, int kPanels>
inline void multiply(const Word* a, const Word* b, int64_t panel_words, int64_t depth, float* c, int64_t stride,
                     bool first) {
  __m512 sums[kRows][kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      sums[r][p] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * stride + p * kPanel);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    __m512 right[kPanels];
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      right[p] = _mm512_load_ps(reinterpret_cast<const float*>(b + p * panel_words + k * kPanel));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) sums[r][p] = multiply_add(Type{}, a[k * kPanel + r], right[p], sums[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) _mm512_storeu_ps(c + r * stride + p * kPanel, sums[r][p]);
  }
}

// 16 rows of 16 words, `stride` words apart, turned.
inline void transpose(const Word* from, int64_t stride, Word* to) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(from + r * stride);
  transpose16(x, y);
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) _mm512_store_si512(to + k * 16, y[k]);
}

#else

#if defined(MEGAFORGE_AVX2)
constexpr int kRows = 4;

template <class Type, int kPanels>
inline void multiply(const Word* a, const Word* b, int64_t panel_words, int64_t depth, float* c, int64_t stride,
                     bool first) {
  for (int p = 0; p < kPanels; ++p, b += panel_words, c += kPanel) {
    __m256 sums[kRows][2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c + r * stride);
      sums[r][1] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(c + r * stride + 8);
    }
    for (int64_t k = 0; k < depth; ++k) {
      const float* row = reinterpret_cast<const float*>(b + k * kPanel);
      const __m256 low = _mm256_load_ps(row), high = _mm256_load_ps(row + 8);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m256 left = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(a[k * kPanel + r])));
        sums[r][0] = _mm256_fmadd_ps(left, low, sums[r][0]);
        sums[r][1] = _mm256_fmadd_ps(left, high, sums[r][1]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      _mm256_storeu_ps(c + r * stride, sums[r][0]);
      _mm256_storeu_ps(c + r * stride + 8, sums[r][1]);
    }
  }
}
#else
constexpr int kRows = 8;

template <class Type, int kPanels>
inline void multiply(const Word* a, const Word* b, int64_t panel_words, int64_t depth, float* c, int64_t stride,
                     bool first) {
  for (int p = 0; p < kPanels; ++p) {
    for (int r = 0; r < kRows; ++r) {
      float* sums = c + r * stride + p * kPanel;
      if (first) std::fill(sums, sums + kPanel, 0.0f);
      for (int64_t k = 0; k < depth; ++k) {
        for (int j = 0; j < kPanel; ++j) {
          sums[j] += as_float(a[k * kPanel + r]) * as_float(b[p * panel_words + k * kPanel + j]);
        }
      }
    }
  }
}
#endif

inline void transpose(const Word* from, int64_t stride, Word* to) {
  for (int r = 0; r < kPanel; ++r) {
    for (int k = 0; k < kPanel; ++k) to[k * kPanel + r] = from[r * stride + k];
  }
}

#endif

}  // namespace megaforge::newton_schulz::MF_ISA
