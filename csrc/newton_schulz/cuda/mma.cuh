// The inner product by mma.sync.m16n8k16: every warp has 64 rows x 32 columns of the tile.
#pragma once

#include "product.cuh"

namespace megaforge::newton_schulz {

constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kHigh = kWarpRows / 16, kWide = kWarpColumns / 8;  // a warp's results of 16 x 8
constexpr int kStep = 16;                                        // the depth of one instruction

MF_DEVICE int warp_row(int thread) { return thread / 32 / (kTile / kWarpColumns) * kWarpRows; }
MF_DEVICE int warp_column(int thread) { return thread / 32 % (kTile / kWarpColumns) * kWarpColumns; }

// The eight values whose place a lane gives to ldmatrix.x4, for 16 rows from `row` on of a factor at depths from 16 `step`
// on. Of the four 8 x 8 matrices that it loads, the left factor's are: rows 0-7 and rows 8-15 at the first eight depths,
// and both at the last; the right factor's: both depths of rows 0-7, and both of rows 8-15.
MF_DEVICE int left_piece(int lane, int row, int step) { return place_in_stage(row + lane % 16, 2 * step + lane / 16); }

MF_DEVICE int right_piece(int lane, int row, int step) {
  return place_in_stage(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2);
}

struct MmaSums {
  float at[kSums];  // [kHigh][kWide][4]

  static MF_DEVICE int row(int thread, int i) {
    return warp_row(thread) + i / (4 * kWide) * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
  }

  static MF_DEVICE int column(int thread, int i) {
    return warp_column(thread) + i / 4 % kWide * 8 + 2 * (thread % 4) + i % 2;
  }

  static MF_DEVICE void copied() {}
  MF_DEVICE void finish() {}

  MF_DEVICE void clear() {
    MF_UNROLL
    for (int i = 0; i < kSums; ++i) at[i] = 0.0f;
  }

#ifdef __CUDACC__
  static MF_DEVICE void load(unsigned (&to)[4], const Bf16* from) {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(from));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared)
                 : "memory");
  }

  MF_DEVICE void multiply(const Stage& stage, int thread) {
    const int lane = thread % 32;
    MF_UNROLL
    for (int step = 0; step < kDepth / kStep; ++step) {
      unsigned b[kWide / 2][4];
      MF_UNROLL
      for (int j = 0; j < kWide / 2; ++j)
        load(b[j], stage.right + right_piece(lane, warp_column(thread) + 16 * j, step));
      MF_UNROLL
      for (int m = 0; m < kHigh; ++m) {
        unsigned a[4];
        load(a, stage.left + left_piece(lane, warp_row(thread) + 16 * m, step));
        MF_UNROLL
        for (int j = 0; j < kWide; ++j) {
          float* d = at + (m * kWide + j) * 4;
          asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
              "{%0,%1,%2,%3};"
              : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[j / 2][j % 2 * 2]), "r"(b[j / 2][j % 2 * 2 + 1]));
        }
      }
    }
  }
#else
  MF_DEVICE void multiply(const Stage& stage, int thread) {
    for (int i = 0; i < kSums; ++i) {
      const Bf16 *left = stage.left, *right = stage.right;
      for (int k = 0; k < kDepth; ++k) {
        at[i] += to_float(left[place_in_stage(row(thread, i), k / kPiece) + k % kPiece]) *
                 to_float(right[place_in_stage(column(thread, i), k / kPiece) + k % kPiece]);
      }
    }
  }
#endif
};

}  // namespace megaforge::newton_schulz
