// Vectors of fp32 numbers and the exponential, for the instruction set that MF_ISA names; included once by each of its
// files, which calls nothing of the standard library, so that no code for it can leak into another file's.

// Inlined for certain: what a body has in registers stays there, at any level of optimisation.
#define MF_INLINE __attribute__((always_inline))

namespace megaforge::pointwise::MF_ISA {

using Int = std::int64_t;
using Word = std::uint32_t;

#if defined(MEGAFORGE_AVX512)
constexpr int kWidth = 16;
#elif defined(MEGAFORGE_AVX2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

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

// To the nearest bf16, halves to even; NaN stays NaN.
MF_INLINE inline Half narrow(Vec x) {
#if defined(MEGAFORGE_AVX512_BF16)
  return (Half)_mm512_cvtneps_pbh(x);
#else
  const Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, Half);
#endif
}

MF_INLINE inline Vec load(const float* from, All) { return *reinterpret_cast<const LooseVec*>(from); }
MF_INLINE inline Vec load(const Bf16* from, All) { return widen(*reinterpret_cast<const LooseHalf*>(from)); }
MF_INLINE inline void store(float* to, Vec x, All) { *reinterpret_cast<LooseVec*>(to) = x; }
MF_INLINE inline void store(Bf16* to, Vec x, All) { *reinterpret_cast<LooseHalf*>(to) = narrow(x); }

// Zeros in the lanes that are not there, which are neither read nor written.
#if defined(MEGAFORGE_AVX512)
MF_INLINE inline __mmask16 mask(Some part) { return static_cast<__mmask16>((1u << part.count) - 1u); }
MF_INLINE inline Vec load(const float* from, Some part) { return _mm512_maskz_loadu_ps(mask(part), from); }
MF_INLINE inline Vec load(const Bf16* from, Some part) { return widen((Half)_mm256_maskz_loadu_epi16(mask(part), from)); }
MF_INLINE inline void store(float* to, Vec x, Some part) { _mm512_mask_storeu_ps(to, mask(part), x); }
MF_INLINE inline void store(Bf16* to, Vec x, Some part) { _mm256_mask_storeu_epi16(to, mask(part), (__m256i)narrow(x)); }
#else
MF_INLINE inline Vec load(const float* from, Some part) {
  Vec x{};
  for (Int i = 0; i < part.count; ++i) x[i] = from[i];
  return x;
}
MF_INLINE inline Vec load(const Bf16* from, Some part) {
  Half x{};
  for (Int i = 0; i < part.count; ++i) x[i] = from[i].bits;
  return widen(x);
}
MF_INLINE inline void store(float* to, Vec x, Some part) {
  for (Int i = 0; i < part.count; ++i) to[i] = x[i];
}
MF_INLINE inline void store(Bf16* to, Vec x, Some part) {
  const Half halves = narrow(x);
  for (Int i = 0; i < part.count; ++i) to[i].bits = halves[i];
}
#endif

// x, and `other` in the lanes that are not there.
MF_INLINE inline Vec keep(Vec x, All, float) { return x; }
MF_INLINE inline Vec keep(Vec x, Some part, float other) {
#if defined(MEGAFORGE_AVX512)
  return _mm512_mask_blend_ps(mask(part), all(other), x);
#else
  for (Int i = part.count; i < kWidth; ++i) x[i] = other;
  return x;
#endif
}

// What x is once it is stored as T.
template <class T>
MF_INLINE inline Vec rounded(Vec x) {
  if constexpr (sizeof(T) == 2) return widen(narrow(x));
  else return x;
}

MF_INLINE inline float as_float(float x) { return x; }
MF_INLINE inline float as_float(Bf16 x) { return __builtin_bit_cast(float, static_cast<Word>(x.bits) << 16); }

MF_INLINE inline float sum(Vec x) {
#if defined(MEGAFORGE_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  float total = x[0];
  for (int i = 1; i < kWidth; ++i) total += x[i];
  return total;
#endif
}

MF_INLINE inline Vec greater(Vec x, Vec y) { return x > y ? x : y; }

MF_INLINE inline float largest(Vec x) {
  float found = x[0];
  for (int i = 1; i < kWidth; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

// body(i, part) for every vector of `count` numbers.
template <class Body>
MF_INLINE inline void across(Int count, Body body) {
  Int i = 0;
  for (; i + kWidth <= count; i += kWidth) body(i, All{});
  if (i < count) body(i, Some{count - i});
}

// The sum of term(i, part) over `count` numbers, in four chains.
template <class Term>
MF_INLINE inline float total(Int count, Term term) {
  Vec sums[4] = {};
  Int i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sums[c] += term(i + c * kWidth, All{});
  }
  for (; i + kWidth <= count; i += kWidth) sums[0] += term(i, All{});
  if (i < count) sums[1] += term(i, Some{count - i});
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// e^x, exactly 1 for 0, 0 below the least normal number, infinite from the greatest on; a NaN stays one. To about 1e-7 of
// it, and to 4e-6 where T is bf16.
template <class T>
MF_INLINE inline Vec exponential(Vec x) {
  constexpr float kLeast = -88.0f, kMost = 89.0f, kPerLog2 = 1.44269504f;
#if defined(MEGAFORGE_AVX512)
  x = _mm512_min_ps(all(kMost), _mm512_max_ps(all(kLeast), x));
  const Vec n = _mm512_roundscale_ps(x * kPerLog2, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < kLeast ? all(kLeast) : x;
  x = x > kMost ? all(kMost) : x;
  const Vec n = (x * kPerLog2 + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
#endif
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p;
  if constexpr (sizeof(T) == 2) {  // fitted: the largest relative error is least
    p = r * 0.041513859f + 0.167874863f;
    p = p * r + 0.500030141f;
    p = p * r + 0.999966830f;
    p = p * r + 1.0f;
  } else {  // the polynomial of Cephes' expf (Moshier)
    p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
  }
#if defined(MEGAFORGE_AVX512)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, all(-126.0f), _CMP_NLT_UQ), p, n);
#else
  const Vec bounded = n < -126.0f ? all(-127.0f) : n;
  return p * (Vec)((__builtin_convertvector(bounded, Whole) + 127) << 23);
#endif
}

template <class T>
MF_INLINE inline Vec sigmoid(Vec x) {
  const Vec under = 1.0f + exponential<T>(-x);
#if defined(MEGAFORGE_AVX512)
  if constexpr (sizeof(T) == 2) return _mm512_rcp14_ps(under);  // to 6e-5, a thirtieth of a bf16's rounding
#endif
  return 1.0f / under;
}

}  // namespace megaforge::pointwise::MF_ISA
