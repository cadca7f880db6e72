// Vectors, exponentials and products of small matrices, for the instruction set that MF_ISA names; included once by each
// of its files, which calls nothing of the standard library, so that no code for it can leak into another file's.
//
// Products have their left factor in rows of words and their right one in panels: kPanel words, one of each column, for
// every place along the depth. A word is an fp32 number, or two bf16 ones that follow each other along the depth.

namespace megaforge::attention::MF_ISA {

using Int = std::int64_t;
using Word = std::uint32_t;

constexpr Int kPanel = 64;  // columns of a panel
constexpr int kRows = 6;    // rows of a product that are in registers at once
#if defined(MEGAFORGE_AVX512)
constexpr int kWidth = 16, kVectors = 4;
#elif defined(MEGAFORGE_AVX2)
constexpr int kWidth = 8, kVectors = 2;
#else
constexpr int kWidth = 4, kVectors = 2;
#endif
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

// To the nearest bf16, halves to even; NaN stays NaN.
inline Half narrow(Vec x) {
#if defined(MEGAFORGE_AVX512_BF16)
  return (Half)_mm512_cvtneps_pbh(x);
#else
  const Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, Half);
#endif
}
inline void store_half(void* to, Half x) { *static_cast<LooseHalf*>(to) = x; }

inline float widen(std::uint16_t x) { return __builtin_bit_cast(float, static_cast<Word>(x) << 16); }
inline std::uint16_t narrow(float x) {
  const Word bits = __builtin_bit_cast(Word, x);
  return static_cast<std::uint16_t>(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

typedef std::uint64_t Words __attribute__((vector_size(kWidth * 4)));
typedef std::uint64_t LooseWords __attribute__((vector_size(kWidth * 4), aligned(8), may_alias));
typedef std::int16_t Shorts __attribute__((vector_size(kWidth * 2)));
typedef std::int16_t LooseShorts __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));
typedef std::int16_t FewShorts __attribute__((vector_size(kWidth)));
typedef std::int16_t LooseFewShorts __attribute__((vector_size(kWidth), aligned(2), may_alias));
constexpr int kLanes = kWidth / 2;  // of Words
constexpr std::uint64_t kStep = 0x9e3779b97f4a7c15u;

// SplitMix64's finalizer: four elements' bits.
inline Words mixed(Words x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// x where the bits stay, else 0.
inline Vec where_kept(const std::int16_t* bits, std::int32_t least_kept, Vec x) {
  return __builtin_convertvector(*reinterpret_cast<const LooseShorts*>(bits), Whole) >= least_kept ? x : Vec{};
}

// The places 0, 1, ... of a vector's lanes, and `first` added to them.
inline Whole places(Int first) {
  Whole lane{};
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane + static_cast<std::int32_t>(first);
}

inline Vec greater(Vec x, Vec y) { return x > y ? x : y; }

inline float largest(Vec x) {
  float found = x[0];
  for (int i = 1; i < kWidth; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

inline float sum(Vec x) {
#if defined(MEGAFORGE_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  float total = x[0];
  for (int i = 1; i < kWidth; ++i) total += x[i];
  return total;
#endif
}

// 2^x, exactly 1 for 0 and exactly 0 below -127: to 2e-9 for fp32 words, and to 3e-6 for what is then rounded to bf16.
template <class T>
inline Vec power_of_two(Vec x) {
  constexpr float kLowest = -127.0f;
  x = x < kLowest ? all(kLowest) : x;  // a NaN stays one
#if defined(MEGAFORGE_AVX512)
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec n = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
#endif
  const Vec r = x - n;
  Vec p;
  if constexpr (T::kPer == 2) {
    p = r * 0.00958285294f + 0.0559064262f;
    p = p * r + 0.240240991f;
    p = p * r + 0.693124175f;
  } else {
    p = r * 0.00015353362f + 0.0013398875f;
    p = p * r + 0.00961843692f;
    p = p * r + 0.0555033237f;
    p = p * r + 0.240226477f;
    p = p * r + 0.693147182f;
  }
  p = p * r + 1.0f;
#if defined(MEGAFORGE_AVX512)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, all(kLowest), _CMP_NEQ_UQ), p, n);
#else
  const Vec bounded = n > 128.0f ? all(128.0f) : n;
  return p * (Vec)((__builtin_convertvector(bounded, Whole) + 127) << 23);
#endif
}

inline Vec multiply_add(F32, Word left, Vec right, Vec sums) {
  return __builtin_bit_cast(float, left) * right + sums;
}
#if defined(MEGAFORGE_AVX512_BF16)
inline Vec multiply_add(Bf16, Word left, Vec right, Vec sums) {
  return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(static_cast<int>(left)), (__m512bh)right);
}
#endif

// The same pointer, in a register of its own: compilers would make one for every vector of a tile, and spill them.
template <class X>
inline X* own(X* pointer) {
  __asm__("" : "+r"(pointer));
  return pointer;
}

// c [kM, kN vectors] (+)= a b.
template <class T, int kM, int kN>
[[gnu::noinline]] void tile(const Word* a, Int a_stride, const Word* b, Int depth, float* c, Int c_stride, bool add) {
  Vec sums[kM][kN];
#pragma GCC unroll 6
  for (int r = 0; r < kM; ++r) {
    const float* row = own(c + r * c_stride);
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) sums[r][n] = add ? load(row + n * kWidth) : Vec{};
  }
  for (Int k = 0; k < depth; ++k, b += kPanel) {
    Vec right[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) right[n] = load(b + n * kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < kM; ++r) {
      const Word left = a[r * a_stride + k];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) sums[r][n] = multiply_add(T{}, left, right[n], sums[r][n]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kM; ++r) {
    float* row = own(c + r * c_stride);
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) store(row + n * kWidth, sums[r][n]);
  }
}

template <class T, int kM>
inline void few_rows(const Word* a, Int a_stride, const Word* b, Int depth, float* c, Int c_stride, Int columns, bool add) {
#if defined(MEGAFORGE_AVX512)
  switch (columns / kWidth) {
    case 1: return tile<T, kM, 1>(a, a_stride, b, depth, c, c_stride, add);
    case 2: return tile<T, kM, 2>(a, a_stride, b, depth, c, c_stride, add);
    case 3: return tile<T, kM, 3>(a, a_stride, b, depth, c, c_stride, add);
    default: return tile<T, kM, 4>(a, a_stride, b, depth, c, c_stride, add);
  }
#else
  for (Int j = 0; j < columns; j += kVectors * kWidth) tile<T, kM, kVectors>(a, a_stride, b + j, depth, c + j, c_stride, add);
#endif
}

// c [rows, columns] (+)= a [rows, depth] b, whose panel is [depth, kPanel]; columns: a multiple of 16, 64 at most.
template <class T>
inline void product(Int rows, const Word* a, Int a_stride, const Word* b, Int depth, float* c, Int c_stride, Int columns,
                    bool add) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_stride, c += kRows * c_stride) {
    few_rows<T, kRows>(a, a_stride, b, depth, c, c_stride, columns, add);
  }
  switch (rows) {
    case 1: return few_rows<T, 1>(a, a_stride, b, depth, c, c_stride, columns, add);
    case 2: return few_rows<T, 2>(a, a_stride, b, depth, c, c_stride, columns, add);
    case 3: return few_rows<T, 3>(a, a_stride, b, depth, c, c_stride, columns, add);
    case 4: return few_rows<T, 4>(a, a_stride, b, depth, c, c_stride, columns, add);
    case 5: return few_rows<T, 5>(a, a_stride, b, depth, c, c_stride, columns, add);
    default: return;
  }
}

// to[j][i] = from[i][j] for 16 rows and `columns` columns, 16 at most; 16 words of each row are read.
inline void turn(const Word* from, Int from_stride, Word* to, Int to_stride, Int columns) {
#if defined(MEGAFORGE_AVX512)
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(from + r * from_stride);
  transpose16(x, y);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    if (r < columns) _mm512_storeu_si512(to + r * to_stride, y[r]);
  }
#else
  for (Int j = 0; j < columns; ++j) {
    for (Int i = 0; i < 16; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

}  // namespace megaforge::attention::MF_ISA
