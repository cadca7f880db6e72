// Numbers rounded to bf16 are kept and multiplied in fp32; included behind words.h.

namespace megaforge::newton_schulz::MF_ISA {

using Half = float;

}  // namespace megaforge::newton_schulz::MF_ISA
