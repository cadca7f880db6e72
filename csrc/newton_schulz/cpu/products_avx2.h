// The innermost loops in the registers of AVX2; included once by its file, behind words.h.

namespace megaforge::newton_schulz::MF_ISA {

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

}  // namespace megaforge::newton_schulz::MF_ISA
