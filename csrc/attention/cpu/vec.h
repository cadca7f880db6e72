// Exponentials and products of small matrices, for the instruction set that MF_ISA names; included behind its lanes.

namespace megaforge::attention::MF_ISA {

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

// 2^x, exactly 1 for 0 and exactly 0 below -127: to 2e-9 for fp32 words, and to 3e-6 for what is then rounded to bf16.
template <class T>
inline Vec power_of_two(Vec x) {
  x = x < -127.0f ? all(-127.0f) : x;  // a NaN stays one
  const Vec n = nearest_whole(x);
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
  return times_power_of_two(p, n);
}

inline Vec multiply_add(F32, Word left, Vec right, Vec sums) {
  return __builtin_bit_cast(float, left) * right + sums;
}

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
  if constexpr (kVectors == 4) {
    switch (columns / kWidth) {
      case 1: return tile<T, kM, 1>(a, a_stride, b, depth, c, c_stride, add);
      case 2: return tile<T, kM, 2>(a, a_stride, b, depth, c, c_stride, add);
      case 3: return tile<T, kM, 3>(a, a_stride, b, depth, c, c_stride, add);
      default: return tile<T, kM, 4>(a, a_stride, b, depth, c, c_stride, add);
    }
  } else {
    for (Int j = 0; j < columns; j += kVectors * kWidth) tile<T, kM, kVectors>(a, a_stride, b + j, depth, c + j, c_stride, add);
  }
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

}  // namespace megaforge::attention::MF_ISA
