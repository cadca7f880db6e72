// 16 x 16 words transposed in registers of AVX-512; included behind a begin_avx512*.h.
#pragma once

namespace megaforge {

// Of its own in each file, as every instruction set compiles it otherwise.
// y[j] = the words j of all x; x is overwritten.
static inline void transpose16(__m512i (&x)[16], __m512i (&y)[16]) {
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    y[r] = _mm512_unpacklo_epi32(x[r], x[r + 1]);
    y[r + 1] = _mm512_unpackhi_epi32(x[r], x[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    x[r] = _mm512_unpacklo_epi64(y[r], y[r + 2]);
    x[r + 1] = _mm512_unpackhi_epi64(y[r], y[r + 2]);
    x[r + 2] = _mm512_unpacklo_epi64(y[r + 1], y[r + 3]);
    x[r + 3] = _mm512_unpackhi_epi64(y[r + 1], y[r + 3]);
  }
  // x[4 g + i] holds, in lane l, rows 4 g .. 4 g + 3 of column 4 l + i.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low0 = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88), low1 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    const __m512i high0 = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd), high1 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    y[i] = _mm512_shuffle_i32x4(low0, low1, 0x88);
    y[8 + i] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
    y[4 + i] = _mm512_shuffle_i32x4(high0, high1, 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
  }
}

}  // namespace megaforge
