// Where the weight of a row and a depth lies in the panels that the kernels read: no CUDA in here.
//
// A panel has 16 rows. Its blocks have as many depths as fill 16 bytes for each of 32 lanes, and a lane's bytes are its
// fragments of the left operand of mma.m16n8k32 (and of a warp's rows in wgmma.m64nNk32), four registers of four codes
// for each step of 32 depths: register r of lane l holds row l / 4 + 8 (r & 1) at depths 16 (r >> 1) + 4 (l % 4) + 0..3.
// Registers are not stored one after the other but over each other: bits [b p, b p + b) of the four bytes of a word are
// a register, so that one mask, and for all but the first one shift, takes it out.
//
// A code is stored without sign, as code + 1 (ternary), code + 8 (int4), or 1 for +1 and 0 for -1 (binary).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MF_BOTH __host__ __device__ inline
#else
#define MF_BOTH inline
#endif

namespace megaforge::bitgemm {

constexpr int kPanelRows = 16;
constexpr int kLanes = 32;
constexpr int kStep = 32;         // depth of one instruction
constexpr int kStageDepth = 128;  // of a stage of activations; the depth is filled up to whole stages and blocks

MF_BOTH constexpr int block_depth(int bits) { return 256 / bits; }
// Registers that lie over each other in a word.
MF_BOTH constexpr int positions(int bits) { return 8 / bits; }

MF_BOTH constexpr int panels_of(int rows) { return (rows + kPanelRows - 1) / kPanelRows; }

MF_BOTH constexpr int padded_depth(int bits, int columns) {
  const int unit = block_depth(bits) > kStageDepth ? block_depth(bits) : kStageDepth;
  return (columns + unit - 1) / unit * unit;
}

// In words of four bytes.
MF_BOTH constexpr std::int64_t panel_words(int bits, int depth) {
  return std::int64_t{depth} / block_depth(bits) * kLanes * 4;
}

// A register of a step, and the row and the depth within the step of its byte 0.
struct Spot {
  int row, depth;
};

MF_BOTH constexpr Spot spot_of(int lane, int reg) {
  return {lane / 4 + 8 * (reg & 1), 16 * (reg >> 1) + 4 * (lane % 4)};
}

// The activations that gemv reads are in another order within each 64 depths: the four words that a lane needs for two
// steps are neighbours. The word of four depths that is the `word`-th of them is stored as this one.
MF_BOTH constexpr int gemv_word(int word) { return word % 4 * 4 + word / 4; }

// weight = slope * stored + offset, by which sums of stored codes become sums of weights.
MF_BOTH constexpr int slope(int bits) { return bits == 1 ? 2 : 1; }
MF_BOTH constexpr int offset(int bits) { return bits == 4 ? -8 : -1; }

}  // namespace megaforge::bitgemm
