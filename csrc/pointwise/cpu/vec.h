// Vectors of fp32 numbers and the exponential, for the instruction set that MF_ISA names; included behind its lanes.

namespace megaforge::pointwise::MF_ISA {

MF_INLINE inline Vec load(const float* from, All) { return *reinterpret_cast<const LooseVec*>(from); }
MF_INLINE inline Vec load(const Bf16* from, All) { return widen(*reinterpret_cast<const LooseHalf*>(from)); }
MF_INLINE inline void store(float* to, Vec x, All) { *reinterpret_cast<LooseVec*>(to) = x; }
MF_INLINE inline void store(Bf16* to, Vec x, All) { *reinterpret_cast<LooseHalf*>(to) = narrow(x); }

MF_INLINE inline Vec keep(Vec x, All, float) { return x; }

// What x is once it is stored as T.
template <class T>
MF_INLINE inline Vec rounded(Vec x) {
  if constexpr (sizeof(T) == 2) return widen(narrow(x));
  else return x;
}

MF_INLINE inline float as_float(float x) { return x; }
MF_INLINE inline float as_float(Bf16 x) { return __builtin_bit_cast(float, static_cast<Word>(x.bits) << 16); }

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
  x = within(x, kLeast, kMost);
  const Vec n = nearest_whole(x * kPerLog2);
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
  return times_power_of_two(p, n);
}

template <class T>
MF_INLINE inline Vec sigmoid(Vec x) {
  return one_over<T>(1.0f + exponential<T>(-x));
}

}  // namespace megaforge::pointwise::MF_ISA
