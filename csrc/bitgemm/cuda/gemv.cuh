// Few tokens: a block has one panel, its warps share out the depth. Codes are multiplied where they lie in their bytes: a
// mask takes a register out of a word, and what it holds is 2^(bits * position) as large as the codes; sums of each
// position are kept apart and shifted at the end.
#pragma once

#include "values.cuh"

namespace megaforge::bitgemm {

constexpr int kGemvThreads = 256;
constexpr int kGemvWarps = kGemvThreads / 32;
constexpr int kPair = 2 * kStep;  // depths of a lane's 16 bytes of codes

// A block's tokens; more of them take more blocks.
constexpr int kMostTokens = 4;

// Loads of weights that a lane has on their way.
constexpr int ahead(int tokens) { return tokens <= 2 ? 4 : 2; }

template <int kTokens>
struct GemvShared {
  std::int32_t sums[4 * kGemvWarps][kTokens][kPanelRows];  // of each warp and each quarter of its lanes
};

// Four products of stored codes and activations, added to `sum`.
MF_DEVICE int dot(std::uint32_t stored, std::uint32_t codes, int sum) {
#ifdef __CUDACC__
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(stored), "r"(codes));
#else
  for (int i = 0; i < 4; ++i)
    sum += static_cast<int>(stored >> 8 * i & 0xffu) * static_cast<std::int8_t>(codes >> 8 * i & 0xffu);
#endif
  return sum;
}

template <int kBits, int kTokens>
struct GemvSums {
  static constexpr int kPositions = positions(kBits);
  int at[kTokens][kPositions];

  MF_DEVICE void clear() {
    MF_UNROLL
    for (int token = 0; token < kTokens; ++token) {
      MF_UNROLL
      for (int i = 0; i < kPositions; ++i) at[token][i] = 0;
    }
  }

  // A lane's 16 bytes of weights of one block; `codes` of the token are at the lane's part of the block.
  MF_DEVICE void add(const Words& weights, const std::int8_t* codes, int token) {
    constexpr int kPairs = block_depth(kBits) / kPair, kWords = 4 / kPairs;
    constexpr std::uint32_t kMask = 0x01010101u * ((1u << kBits) - 1);
    MF_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const Words x = load_words(codes + pair * kPair);
      MF_UNROLL
      for (int word = 0; word < kWords; ++word) {
        MF_UNROLL
        for (int i = 0; i < kPositions; ++i) {
          const int reg = word * kPositions + i;  // of the pair of steps
          const std::uint32_t stored = weights.at[pair * kWords + word] & kMask << kBits * i;
          at[token][i] = dot(stored, x.at[reg / 4 * 2 + reg % 4 / 2], at[token][i]);
        }
      }
    }
  }

  // Of the lane's first row (0) or second (1): registers take turns.
  MF_DEVICE int row(int token, int which) const {
    int sum = 0;
    MF_UNROLL
    for (int i = 0; i < kPositions; i += 2) sum += at[token][i + which] >> kBits * (i + which);
    return sum;
  }
};

template <int kBits, int kTokens>
MF_DEVICE void gemv_block(const Block<kGemvThreads>& block, GemvShared<kTokens>& shared, const Product& p, int panel,
                          int first_token) {
  constexpr int kDepth = block_depth(kBits), kAhead = ahead(kTokens);
  const std::uint32_t* weights = p.panels + panel * panel_words(kBits, p.depth);
  const int blocks = p.depth / kDepth;
  block.phase([&](int thread) {
    const int lane = thread % 32, warp = thread / 32;
    GemvSums<kBits, kTokens> sums;
    sums.clear();
    for (int first = warp; first < blocks; first += kGemvWarps * kAhead) {
      Words loaded[kAhead];
      MF_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int at = first + i * kGemvWarps;
        if (at < blocks) loaded[i] = load_words(weights + (at * kLanes + lane) * 4);
      }
      MF_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int at = first + i * kGemvWarps;
        if (at >= blocks) break;
        MF_UNROLL
        for (int token = 0; token < kTokens; ++token) {
          // The last token stands in for those beyond it.
          const int read = first_token + token < p.tokens ? first_token + token : p.tokens - 1;
          sums.add(loaded[i], p.codes + static_cast<std::int64_t>(read) * p.depth + at * kDepth + lane % 4 * 16, token);
        }
      }
    }
    MF_UNROLL
    for (int token = 0; token < kTokens; ++token) {
      MF_UNROLL
      for (int which = 0; which < 2; ++which)
        shared.sums[warp * 4 + lane % 4][token][lane / 4 + 8 * which] = sums.row(token, which);
    }
  });
  block.phase([&](int thread) {
    const int token = first_token + thread / kPanelRows, row = panel * kPanelRows + thread % kPanelRows;
    if (thread >= kTokens * kPanelRows || token >= p.tokens || row >= p.rows) return;
    int sum = 0;
    MF_UNROLL
    for (int i = 0; i < 4 * kGemvWarps; ++i) sum += shared.sums[i][thread / kPanelRows][thread % kPanelRows];
    finish_stored<kBits>(p, token, row, sum);
  });
}

}  // namespace megaforge::bitgemm
