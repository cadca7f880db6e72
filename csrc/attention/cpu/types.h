// Vectors of MF_WIDTH fp32 numbers, for the instruction set that MF_ISA names; this and vec.h are included once by each
// of its files, which calls nothing of the standard library, so that no code for it can leak into another file's.
//
// Products have their left factor in rows of words and their right one in panels: kPanel words, one of each column, for
// every place along the depth. A word is an fp32 number, or two bf16 ones that follow each other along the depth.

namespace megaforge::attention::MF_ISA {

using Int = std::int64_t;
using Word = std::uint32_t;

constexpr Int kPanel = 64;  // columns of a panel
constexpr int kRows = 6;    // rows of a product that are in registers at once
constexpr int kWidth = MF_WIDTH;
constexpr int kVectors = kWidth == 16 ? 4 : 2;  // of a row of a product that are in registers at once
constexpr Int kLine = 16;  // what widths are padded to

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef float LooseVec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef Word Bits __attribute__((vector_size(kWidth * 4)));
typedef Word LooseBits __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef std::int32_t Whole __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t Half __attribute__((vector_size(kWidth * 2)));
typedef std::uint16_t LooseHalf __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

// What a word holds.
struct F32 {
  static constexpr Int kPer = 1;
  static constexpr Type kType = Type::f32;
};
struct Bf16 {
  static constexpr Int kPer = 2;
  static constexpr Type kType = Type::bf16;
};

inline Int least(Int x, Int y) { return x < y ? x : y; }
inline Int most(Int x, Int y) { return x > y ? x : y; }
inline Int round_up(Int x, Int to) { return (x + to - 1) / to * to; }
inline Int between(Int x, Int low, Int high) { return most(low, least(x, high)); }

inline Vec load(const void* from) { return *static_cast<const LooseVec*>(from); }
inline void store(void* to, Vec x) { *static_cast<LooseVec*>(to) = x; }
inline Vec all(float x) { return Vec{} + x; }
inline Bits load_half(const void* from) { return __builtin_convertvector(*static_cast<const LooseHalf*>(from), Bits); }

}  // namespace megaforge::attention::MF_ISA
