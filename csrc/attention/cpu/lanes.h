// What AVX-512 has an instruction for (lanes_avx512.h), for other instruction sets; included behind types.h.

namespace megaforge::attention::MF_ISA {

inline float sum(Vec x) {
  float total = x[0];
  for (int i = 1; i < kWidth; ++i) total += x[i];
  return total;
}

// For magnitudes below 2^22.
inline Vec nearest_whole(Vec x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23

// p 2^n for whole n, and 0 for n = -127.
inline Vec times_power_of_two(Vec p, Vec n) {
  const Vec bounded = n > 128.0f ? all(128.0f) : n;
  return p * (Vec)((__builtin_convertvector(bounded, Whole) + 127) << 23);
}

// to[j][i] = from[i][j] for 16 rows and `columns` columns, 16 at most; 16 words of each row are read.
inline void turn(const Word* from, Int from_stride, Word* to, Int to_stride, Int columns) {
  for (Int j = 0; j < columns; ++j) {
    for (Int i = 0; i < 16; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

}  // namespace megaforge::attention::MF_ISA
