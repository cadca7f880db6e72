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

}  // namespace megaforge::newton_schulz::MF_ISA
