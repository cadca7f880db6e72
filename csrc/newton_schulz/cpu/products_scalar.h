// The innermost loops for any CPU; included once by its file, behind words.h.

namespace megaforge::newton_schulz::MF_ISA {

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

}  // namespace megaforge::newton_schulz::MF_ISA
