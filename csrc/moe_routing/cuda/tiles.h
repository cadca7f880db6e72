// How routing is cut into blocks and lanes: no CUDA in here, so that a test on a CPU can walk through it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MEGAFORGE_BOTH __host__ __device__
#else
#define MEGAFORGE_BOTH
#endif

namespace megaforge::moe::cuda {

constexpr int kThreads = 128;                 // of a block
constexpr int kRows = 128;                    // of one sequence, that one block routes: fixed, so that sums are
constexpr int kAssignments = 1024;            // that one block counts and places when nothing else cuts them
constexpr std::int64_t kMostExperts = 1024;
constexpr std::int64_t kMostGroups = 32;

MEGAFORGE_BOTH constexpr std::int64_t pieces(std::int64_t whole, std::int64_t each) { return (whole + each - 1) / each; }

// Lanes that share a token: a power of two, a warp at most.
MEGAFORGE_BOTH constexpr int lanes_for(std::int64_t experts, std::int64_t groups) {
  return groups > 0 || experts > 16 ? 32 : experts > 8 ? 16 : 8;
}

// Experts that a lane holds, rounded up to a power of two: expert lane + i * lanes for i below it.
MEGAFORGE_BOTH constexpr int held_by_lane(std::int64_t experts, int lanes) {
  int held = 1;
  while (static_cast<std::int64_t>(held) * lanes < experts) held *= 2;
  return held;
}

// A routing block's share: rows [first, last) of one sequence. Blocks of the same rows are neighbours.
struct Share {
  std::int64_t sequence, first, last;
};

MEGAFORGE_BOTH constexpr Share share_of(std::int64_t block, std::int64_t rows, std::int64_t sequences) {
  const std::int64_t first = block / sequences * kRows;
  return {block % sequences, first, first + kRows < rows ? first + kRows : rows};
}

MEGAFORGE_BOTH constexpr std::int64_t routing_blocks(std::int64_t rows, std::int64_t sequences) {
  return pieces(rows, kRows) * sequences;
}

}  // namespace megaforge::moe::cuda
