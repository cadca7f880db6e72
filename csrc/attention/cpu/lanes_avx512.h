// What AVX-512 has an instruction for; included behind types.h. lanes.h has the same for others.

namespace megaforge::attention::MF_ISA {

inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }

inline Vec nearest_whole(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// p 2^n for whole n, and 0 for n = -127.
inline Vec times_power_of_two(Vec p, Vec n) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, all(-127.0f), _CMP_NEQ_UQ), p, n);
}

// to[j][i] = from[i][j] for 16 rows and `columns` columns, 16 at most; 16 words of each row are read.
inline void turn(const Word* from, Int from_stride, Word* to, Int to_stride, Int columns) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) x[r] = _mm512_loadu_si512(from + r * from_stride);
  transpose16(x, y);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    if (r < columns) _mm512_storeu_si512(to + r * to_stride, y[r]);
  }
}

}  // namespace megaforge::attention::MF_ISA
