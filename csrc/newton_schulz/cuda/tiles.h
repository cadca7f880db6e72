// Which tile of a result a block computes: no CUDA in here.
#pragma once

#include <cstdint>
#include <math.h>

#if defined(__CUDACC__)
#define MF_BOTH __host__ __device__ inline
#else
#define MF_BOTH inline
#endif

namespace megaforge::newton_schulz {

constexpr int kTile = 128;
// Blocks that run together take tiles of so many rows of tiles, column after column: they share most of what they read,
// which the L2 cache then holds.
constexpr int kBand = 8;

struct Place {
  int row, column;
};

MF_BOTH constexpr int tiles_along(int length) { return (length + kTile - 1) / kTile; }

// The tiles on and below the diagonal of `count` x `count` tiles, or all of rows x columns.
MF_BOTH constexpr std::int64_t lower_tiles(int count) { return static_cast<std::int64_t>(count) * (count + 1) / 2; }

// Tile `index` of the lower ones: band after band; in a band column after column, from the top.
MF_BOTH Place lower_place(int index, int count) {
  // Row after row, without bands, tile `index` would be in this row; bands begin at the same indices.
  int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while (lower_tiles(row) > index) --row;
  while (lower_tiles(row + 1) <= index) ++row;
  const int first = row / kBand * kBand, rows = first + kBand < count ? kBand : count - first;
  int rest = index - static_cast<int>(lower_tiles(first));
  if (rest < first * rows) return {first + rest % rows, rest / rows};
  rest -= first * rows;
  int column = 0;
  while (rest >= rows - column) rest -= rows - column, ++column;
  return {first + column + rest, first + column};
}

// Tile `index` of rows x columns tiles, in bands likewise.
MF_BOTH Place grid_place(int index, int rows, int columns) {
  const int first = index / (kBand * columns) * kBand, here = first + kBand < rows ? kBand : rows - first;
  const int rest = index % (kBand * columns);
  return {first + rest % here, rest / here};
}

}  // namespace megaforge::newton_schulz
