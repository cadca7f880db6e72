// The innermost loops in the registers of AVX-512; included once by each of its files, behind words.h.

namespace megaforge::newton_schulz::MF_ISA {

constexpr int kRows = 8;

inline __m512 multiply_add(F32, Word a, __m512 b, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a))), b, sum);
}

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

}  // namespace megaforge::newton_schulz::MF_ISA
