// For files whose instruction set has no bf16; included behind types.h.

namespace megaforge::pointwise::MF_ISA {

// To the nearest bf16, halves to even; NaN stays NaN.
MF_INLINE inline Half narrow(Vec x) {
  const Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, Half);
}

}  // namespace megaforge::pointwise::MF_ISA
