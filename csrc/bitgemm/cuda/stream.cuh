// Few tokens: a block has two panels, its warps share out the depth, and everything goes from global memory through
// registers into mma.sync.m16n8k32. Codes are in the order of gemv_word(): 16 bytes of a token are a lane's right operands
// of two steps.
#pragma once

#include "instruction.cuh"

namespace megaforge::bitgemm {

constexpr int kStreamThreads = 256;
constexpr int kStreamWarps = kStreamThreads / 32;
constexpr int kStreamPanels = 2;
constexpr int kStreamRows = kStreamPanels * kPanelRows;

template <int kTiles>  // of 8 tokens
struct StreamShared {
  std::int32_t sums[kStreamWarps][8 * kTiles][kStreamRows];
};

// Registers of the left operand of both steps of a pair, out of a lane's 16 bytes of a block.
template <int kBits>
MF_DEVICE void decode_pair(const Words& words, int pair, unsigned (&a)[2][4]) {
  constexpr int kPositions = positions(kBits);
  constexpr std::uint32_t kMask = 0x01010101u * ((1u << kBits) - 1);
  MF_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int index = 8 * pair + i;  // of the block's registers
    a[i / 4][i % 4] = words.at[index / kPositions] >> kBits * (index % kPositions) & kMask;
  }
}

template <int kBits, int kTiles>
struct StreamSums {
  int at[kStreamPanels][kTiles][4];

  MF_DEVICE void clear() {
    MF_UNROLL
    for (int m = 0; m < kStreamPanels; ++m) {
      MF_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        MF_UNROLL
        for (int i = 0; i < 4; ++i) at[m][j][i] = 0;
      }
    }
  }

  static MF_DEVICE int row(int lane, int m, int i) { return m * kPanelRows + lane / 4 + i / 2 * 8; }
  static MF_DEVICE int token(int lane, int j, int i) { return j * 8 + 2 * (lane % 4) + i % 2; }

  // A lane's codes of tile `j` in a pair of steps; the last token stands in for those beyond it.
  static MF_DEVICE Words codes_of(const Product& p, int first_token, int lane, int j, int depth) {
    const int token = first_token + 8 * j + lane / 4, read = token < p.tokens ? token : p.tokens - 1;
    return load_words(p.codes + static_cast<std::int64_t>(read) * p.depth + depth + lane % 4 * 16);
  }

#ifdef __CUDACC__
  MF_DEVICE void add(const Product& p, const Words (&weights)[kStreamPanels], int, int first_token, int block, int lane) {
    MF_UNROLL
    for (int pair = 0; pair < block_depth(kBits) / (2 * kStep); ++pair) {
      unsigned a[kStreamPanels][2][4];
      MF_UNROLL
      for (int m = 0; m < kStreamPanels; ++m) decode_pair<kBits>(weights[m], pair, a[m]);
      MF_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        const Words x = codes_of(p, first_token, lane, j, block * block_depth(kBits) + pair * 2 * kStep);
        MF_UNROLL
        for (int m = 0; m < kStreamPanels; ++m) {
          multiply_registers<false>(at[m][j], a[m][0], x.at[0], x.at[1]);
          multiply_registers<false>(at[m][j], a[m][1], x.at[2], x.at[3]);
        }
      }
    }
  }
#else
  // The operands' places in the lanes are those of mma.cuh.
  void add(const Product& p, const Words (&weights)[kStreamPanels], int first_panel, int first_token, int block,
           int lane) {
    for (int pair = 0; pair < block_depth(kBits) / (2 * kStep); ++pair) {
      for (int m = 0; m < kStreamPanels; ++m) {
        unsigned a[4][2][4];  // of the lanes that have this lane's rows
        for (int t = 0; t < 4; ++t) {
          const int other = lane / 4 * 4 + t;
          decode_pair<kBits>(other == lane ? weights[m] : weights_of(p, first_panel + m, block, other), pair, a[t]);
        }
        for (int j = 0; j < kTiles; ++j) {
          for (int i = 0; i < 4; ++i) {
            for (int k = 0; k < 2 * kStep; ++k) {
              const int step = k / kStep, half = k % kStep / 16, t = k % 16 / 4;
              const int giver = 4 * (2 * (lane & 3) + (i & 1)) + t;
              const Words x = codes_of(p, first_token, giver, j, block * block_depth(kBits) + pair * 2 * kStep);
              const auto code = static_cast<std::int8_t>(x.at[2 * step + half] >> 8 * (k % 4));
              at[m][j][i] += static_cast<int>(a[t][step][(i >> 1) + 2 * half] >> 8 * (k % 4) & 0xffu) * code;
            }
          }
        }
      }
    }
  }
#endif

  // A lane's 16 bytes of weights; panels beyond the last are read as the last.
  static MF_DEVICE Words weights_of(const Product& p, int panel, int block, int lane) {
    const int last = panels_of(p.rows) - 1, read = panel < last ? panel : last;
    return load_words(p.panels + read * panel_words(kBits, p.depth) + (block * kLanes + lane) * 4);
  }
};

template <int kBits, int kTiles>
MF_DEVICE void stream_block(const Block<kStreamThreads>& block, StreamShared<kTiles>& shared, const Product& p,
                            int index, int first_token) {
  using Sums = StreamSums<kBits, kTiles>;
  const int blocks = p.depth / block_depth(kBits), first_panel = index * kStreamPanels;
  block.phase([&](int thread) {
    const int lane = thread % 32, warp = thread / 32;
    Sums sums;
    sums.clear();
    Words next[kStreamPanels];
    const auto fetch = [&](int at) {
      MF_UNROLL
      for (int m = 0; m < kStreamPanels; ++m)
        next[m] = Sums::weights_of(p, first_panel + m, at < blocks ? at : blocks - 1, lane);
    };
    fetch(warp);
    for (int at = warp; at < blocks; at += kStreamWarps) {
      Words now[kStreamPanels];
      MF_UNROLL
      for (int m = 0; m < kStreamPanels; ++m) now[m] = next[m];
      fetch(at + kStreamWarps);
      sums.add(p, now, first_panel, first_token, at, lane);
    }
    MF_UNROLL
    for (int m = 0; m < kStreamPanels; ++m) {
      MF_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        MF_UNROLL
        for (int i = 0; i < 4; ++i) shared.sums[warp][Sums::token(lane, j, i)][Sums::row(lane, m, i)] = sums.at[m][j][i];
      }
    }
  });
  block.phase([&](int thread) {
    const int row = index * kStreamRows + thread % kStreamRows;
    if (row >= p.rows) return;
    for (int token = thread / kStreamRows; token < 8 * kTiles && first_token + token < p.tokens;
         token += kStreamThreads / kStreamRows) {
      int sum = 0;
      MF_UNROLL
      for (int warp = 0; warp < kStreamWarps; ++warp) sum += shared.sums[warp][token][thread % kStreamRows];
      finish_stored<kBits>(p, first_token + token, row, sum);
    }
  });
}

}  // namespace megaforge::bitgemm
