// For files whose instruction set has no transposition of its own; included behind words.h.

namespace megaforge::newton_schulz::MF_ISA {

inline void transpose(const Word* from, int64_t stride, Word* to) {
  for (int r = 0; r < kPanel; ++r) {
    for (int k = 0; k < kPanel; ++k) to[k * kPanel + r] = from[r * stride + k];
  }
}

}  // namespace megaforge::newton_schulz::MF_ISA
