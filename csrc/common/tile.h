// Products of small matrices by one warp with tensor cores (mma.sync m16n8k8, TF32 operands, fp32 sums), and the same
// products by a host compiler with the same rounding of the operands.
#pragma once

#include "block.h"

namespace megaforge {

// How an fp32 operand reaches the tensor cores: rounded to TF32 (10 bits of mantissa, as bf16 inputs deserve), or as the
// sum of two TF32 numbers, whose three larger products make fp32's precision.
enum class Precision { kTf32, kThreeTf32 };

// A tile of 16 x 8 results is spread over a warp: every lane has four, at these rows and columns.
MF_DEVICE int tile_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
MF_DEVICE int tile_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// Rows and columns of a lane's four entries of the 16 x 8 left operand and two of the 8 x 8 right one.
MF_DEVICE int left_row(int lane, int i) { return lane / 4 + 8 * (i % 2); }
MF_DEVICE int left_column(int lane, int i) { return lane % 4 + 4 * (i / 2); }
MF_DEVICE int right_row(int lane, int i) { return lane % 4 + 4 * i; }
MF_DEVICE int right_column(int lane) { return lane / 4; }

// `x` with ten bits of mantissa, to nearest, halves away from zero.
MF_DEVICE float to_tf32(float x) {
#ifdef __CUDACC__
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// An operand: the TF32 number nearest to it, and the one nearest to what that leaves.
struct Split {
  float high, low;
};

// An operand that was rounded when it was stored.
struct Rounded {
  float value;
};

// `x` as it is stored for products of a precision, and what they read there.
template <Precision kPrecision>
MF_DEVICE float stored(float x) {
  return kPrecision == Precision::kTf32 ? to_tf32(x) : x;
}
template <Precision kPrecision>
MF_DEVICE auto read(float x) {
  if constexpr (kPrecision == Precision::kTf32) return Rounded{x};
  else return x;
}

template <Precision>
MF_DEVICE Split split(Rounded x) {
#ifndef __CUDACC__
  if (to_tf32(x.value) != x.value) return {NAN, NAN};  // somebody forgot; a GPU would cut it off
#endif
  return {x.value, 0.0f};
}

template <Precision kPrecision>
MF_DEVICE Split split(float x) {
  const float high = to_tf32(x);
  if constexpr (kPrecision == Precision::kTf32) return {high, 0.0f};
  return {high, to_tf32(x - high)};
}

// A lane's share of kTiles tiles, one above the other, and kWide such columns of tiles side by side.
template <int kTiles, int kWide = 1>
struct Tiles {
  float at[kWide][kTiles][4];

  // Calls body(an entry, its row, its column).
  template <class Body>
  MF_DEVICE void each(int lane, Body body) {
    MF_UNROLL
    for (int h = 0; h < kWide; ++h) {
      MF_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        MF_UNROLL
        for (int i = 0; i < 4; ++i) body(at[h][m][i], 16 * m + tile_row(lane, i), 8 * h + tile_column(lane, i));
      }
    }
  }

  // Calls body(an entry, the next one, the row of both, the column of the first).
  template <class Body>
  MF_DEVICE void each_pair(int lane, Body body) const {
    MF_UNROLL
    for (int h = 0; h < kWide; ++h) {
      MF_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        MF_UNROLL
        for (int i = 0; i < 4; i += 2)
          body(at[h][m][i], at[h][m][i + 1], 16 * m + tile_row(lane, i), 8 * h + tile_column(lane, i));
      }
    }
  }

  MF_DEVICE void clear() {
    each(0, [](float& entry, int, int) { entry = 0.0f; });
  }
};

#ifdef __CUDACC__
MF_DEVICE void mma_tf32(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
#endif

// sums += left right, where left(row, depth) has 16 kTiles rows and right(depth, column) 8 kWide columns, both functions of
// shared memory that no thread writes during the phase. All lanes of the warp take part. What is read of the left operand
// serves all kWide columns of tiles.
template <Precision kPrecision, int kDepth, int kTiles, int kWide, class Left, class Right>
MF_DEVICE void multiply(Tiles<kTiles, kWide>& sums, int lane, Left left, Right right) {
  static_assert(kDepth % 8 == 0);
#ifdef __CUDACC__
  MF_UNROLL
  for (int k = 0; k < kDepth; k += 8) {
    float b_high[kWide][2], b_low[kWide][2];
    MF_UNROLL
    for (int h = 0; h < kWide; ++h) {
      MF_UNROLL
      for (int i = 0; i < 2; ++i) {
        const Split b = split<kPrecision>(right(k + right_row(lane, i), 8 * h + right_column(lane)));
        b_high[h][i] = b.high, b_low[h][i] = b.low;
      }
    }
    MF_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      float a_high[4], a_low[4];
      MF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Split a = split<kPrecision>(left(16 * m + left_row(lane, i), k + left_column(lane, i)));
        a_high[i] = a.high, a_low[i] = a.low;
      }
      MF_UNROLL
      for (int h = 0; h < kWide; ++h) {
        if constexpr (kPrecision == Precision::kThreeTf32) {
          mma_tf32(sums.at[h][m], a_low, b_high[h]);
          mma_tf32(sums.at[h][m], a_high, b_low[h]);
        }
        mma_tf32(sums.at[h][m], a_high, b_high[h]);
      }
    }
  }
#else
  sums.each(lane, [&](float& entry, int row, int column) {
      for (int k = 0; k < kDepth; ++k) {
        const Split a = split<kPrecision>(left(row, k)), b = split<kPrecision>(right(k, column));
        if constexpr (kPrecision == Precision::kThreeTf32) entry += a.low * b.high + a.high * b.low;
        entry += a.high * b.high;
      }
  });
#endif
}

}  // namespace megaforge
