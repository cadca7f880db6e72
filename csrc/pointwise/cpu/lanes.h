// What AVX-512 has an instruction for (lanes_avx512.h), for other instruction sets; included behind narrow.h.

namespace megaforge::pointwise::MF_ISA {

// Zeros in the lanes that are not there, which are neither read nor written.
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

// x, and `other` in the lanes that are not there.
MF_INLINE inline Vec keep(Vec x, Some part, float other) {
  for (Int i = part.count; i < kWidth; ++i) x[i] = other;
  return x;
}

MF_INLINE inline float sum(Vec x) {
  float total = x[0];
  for (int i = 1; i < kWidth; ++i) total += x[i];
  return total;
}

MF_INLINE inline Vec within(Vec x, float least, float most) {
  x = x < least ? all(least) : x;  // a NaN stays one
  return x > most ? all(most) : x;
}

// For magnitudes below 2^22.
MF_INLINE inline Vec nearest_whole(Vec x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23

// p 2^n for whole n, and 0 for n below -126.
MF_INLINE inline Vec times_power_of_two(Vec p, Vec n) {
  const Vec bounded = n < -126.0f ? all(-127.0f) : n;
  return p * (Vec)((__builtin_convertvector(bounded, Whole) + 127) << 23);
}

template <class T>
MF_INLINE inline Vec one_over(Vec x) {
  return 1.0f / x;
}

}  // namespace megaforge::pointwise::MF_ISA
