// Vectors of MF_WIDTH fp32 numbers, for the instruction set that MF_ISA names; included once by each of its
// files, which calls nothing of the standard library, so that no code for it can leak into another file's.

// Inlined for certain: what a body has in registers stays there, at any level of optimisation.
#define MF_INLINE __attribute__((always_inline))

namespace megaforge::pointwise::MF_ISA {

using Int = std::int64_t;
using Word = std::uint32_t;

constexpr int kWidth = MF_WIDTH;

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef float LooseVec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef Word Bits __attribute__((vector_size(kWidth * 4)));
typedef std::int32_t Whole __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t Half __attribute__((vector_size(kWidth * 2)));
typedef std::uint16_t LooseHalf __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

// How much of a vector there is: all of it, or its first lanes.
struct All {};
struct Some {
  Int count;
};

MF_INLINE inline Vec all(float x) { return Vec{} + x; }

MF_INLINE inline Vec widen(Half x) { return (Vec)(__builtin_convertvector(x, Bits) << 16); }

}  // namespace megaforge::pointwise::MF_ISA
