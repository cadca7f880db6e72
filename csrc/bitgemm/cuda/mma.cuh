// The product by mma.sync.m16n8k32: a warp has kHigh panels and 8 kWide tokens of the tile.
#pragma once

#include "instruction.cuh"
#include "product.cuh"

namespace megaforge::bitgemm {

// The piece whose place a lane gives to ldmatrix.x4, for 16 tokens from `token` on at step `step` of a stage. Of the four
// matrices of 8 tokens x 16 bytes that it loads, the first two are both halves of the depth of tokens 0-7, the last two
// of tokens 8-15: the right operands of two instructions.
MF_DEVICE int right_piece(int lane, int token, int step) {
  return place_in_stage(token + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2);
}

template <int kBitsOf, int kTokensOf, bool kGroupedOf>
struct MmaSums {
  static constexpr int kBits = kBitsOf, kTokens = kTokensOf;
  static constexpr bool kGrouped = kGroupedOf;
  static constexpr int kHigh = kTokens >= 128 ? 2 : 1;
  static constexpr int kWarpsHigh = kTileRows / (kPanelRows * kHigh);
  static constexpr int kWarpTokens = kTokens * kWarpsHigh / (kThreads / 32);
  static constexpr int kWide = kWarpTokens / 8;
  static constexpr int kCount = kHigh * kWide * 4;

  int at[kCount];                        // [kHigh][kWide][4]
  float scaled[kGrouped ? kCount : 1];   // of the groups that are complete

  static MF_DEVICE int first_row(int thread) { return thread / 32 % kWarpsHigh * kPanelRows * kHigh; }
  static MF_DEVICE int first_token(int thread) { return thread / 32 / kWarpsHigh * kWarpTokens; }

  static MF_DEVICE int row(int thread, int i) {
    return first_row(thread) + i / (4 * kWide) * kPanelRows + thread % 32 / 4 + i % 4 / 2 * 8;
  }

  static MF_DEVICE int token(int thread, int i) {
    return first_token(thread) + i / 4 % kWide * 8 + 2 * (thread % 4) + i % 2;
  }

  static MF_DEVICE void copied() {}
  MF_DEVICE void finish() {}

  MF_DEVICE void clear() {
    MF_UNROLL
    for (int i = 0; i < kCount; ++i) at[i] = 0;
    if constexpr (kGrouped) {
      MF_UNROLL
      for (int i = 0; i < kCount; ++i) scaled[i] = 0.0f;
    }
  }

  MF_DEVICE std::uint32_t result(int i) const {
    if constexpr (kGrouped) return bits_of(scaled[i]);
    return static_cast<std::uint32_t>(at[i]);
  }

  MF_DEVICE void multiply(const Stage<kTokens>& stage, const Weights<kBits, kHigh>& weights, const Product& p,
                          int tile_row, int index, int thread) {
    StageWords<kBits> words[kHigh];
    MF_UNROLL
    for (int m = 0; m < kHigh; ++m) words[m] = weights.words(m, index);
    MF_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      add_step(stage, words, p, tile_row, index, step, thread);
      if constexpr (kGrouped) end_group(p, tile_row, index * kStageDepth + (step + 1) * kStep, thread);
    }
  }

  // Where a group ends at this depth, its sums are scaled and added.
  MF_DEVICE void end_group(const Product& p, int tile_row, int depth, int thread) {
    const int size = p.columns / p.groups;
    if (depth % size != 0 || depth > p.columns) return;
    MF_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int row = tile_row + this->row(thread, i);
      const std::int64_t of = static_cast<std::int64_t>(row < p.rows ? row : 0) * p.groups + (depth / size - 1);
      scaled[i] = plus(scaled[i], times(static_cast<float>(at[i]), p.scale[of]));
      at[i] = 0;
    }
  }

#ifdef __CUDACC__
  static MF_DEVICE void load(unsigned (&to)[4], const std::int8_t* from) {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(from));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared)
                 : "memory");
  }

  MF_DEVICE void add_step(const Stage<kTokens>& stage, const StageWords<kBits> (&words)[kHigh], const Product&, int, int,
                          int step, int thread) {
    unsigned a[kHigh][4];
    MF_UNROLL
    for (int m = 0; m < kHigh; ++m) {
      MF_UNROLL
      for (int reg = 0; reg < 4; ++reg) a[m][reg] = decoded<kBits, kGrouped>(words[m], step, reg);
    }
    MF_UNROLL
    for (int j = 0; j < kWide; j += 2) {
      unsigned b[4];
      load(b, stage.codes + right_piece(thread % 32, first_token(thread) + 8 * j, step));
      MF_UNROLL
      for (int m = 0; m < kHigh; ++m) {
        multiply_registers<kGrouped>(at + (m * kWide + j) * 4, a[m], b[0], b[1]);
        multiply_registers<kGrouped>(at + (m * kWide + j + 1) * 4, a[m], b[2], b[3]);
      }
    }
  }
#else
  // As ldmatrix and mma.m16n8k32 do it by the PTX manual: lane 8 q + r gives the address of row r of matrix q, of which
  // lane 4 r + t gets bytes 4 t to 4 t + 3. In the product a lane's register i holds, of the left operand, row (l >> 2) +
  // 8 (i & 1) at depths 4 (l & 3) + 16 (i >> 1) and the next three, of the right one, column l >> 2 at depths 4 (l & 3) +
  // 16 i; its result i is at row (l >> 2) + 8 (i >> 1), column 2 (l & 3) + (i & 1).
  void add_step(const Stage<kTokens>& stage, const StageWords<kBits> (&words)[kHigh], const Product& p, int tile_row,
                int index, int step, int thread) {
    const int lane = thread % 32;
    for (int m = 0; m < kHigh; ++m) {
      std::uint32_t left[4][4];  // of the lanes that have this lane's rows
      for (int t = 0; t < 4; ++t) {
        const int other = lane / 4 * 4 + t;
        const StageWords<kBits> theirs = other == lane ? words[m] : words_of_lane<kBits>(
          p, (tile_row + first_row(thread)) / kPanelRows + m, other, index);
        for (int reg = 0; reg < 4; ++reg) left[t][reg] = decoded<kBits, kGrouped>(theirs, step, reg);
      }
      for (int j = 0; j < kWide; ++j) {
        for (int i = 0; i < 4; ++i) {
          int& sum = at[(m * kWide + j) * 4 + i];
          const int column = 2 * (lane & 3) + (i & 1);
          for (int half = 0; half < 2; ++half) {
            const int giver = 8 * (j % 2 * 2 + half) + column;
            const std::int8_t* codes = stage.codes + right_piece(giver, first_token(thread) + j / 2 * 16, step);
            for (int k = 0; k < 16; ++k) {
              const auto byte = static_cast<std::uint8_t>(left[k / 4][(i >> 1) + 2 * half] >> 8 * (k % 4));
              sum += (kGrouped ? static_cast<std::int8_t>(byte) : byte) * codes[k];
            }
          }
        }
      }
    }
  }
#endif
};

}  // namespace megaforge::bitgemm
