// One block's tile of a product. Both forms of the inner product read the same shared memory: rows of 64 values (128
// bytes) of each factor, whose eight pieces of 16 bytes are permuted by the row, as wgmma's 128-byte swizzle does it, so
// that ldmatrix finds no two of its eight rows in the same banks.
#pragma once

#include "../../common/block.h"
#include "../../common/wgmma.cuh"
#include "launch.h"
#include "tiles.h"

namespace megaforge::newton_schulz {

constexpr int kThreads = 256;
constexpr int kDepth = 64;                // of a stage
constexpr int kPiece = 8;                 // values in 16 bytes
constexpr int kPieces = kDepth / kPiece;  // in a row
constexpr int kStages = 3;
constexpr int kSums = kTile * kTile / kThreads;  // that a thread holds
constexpr int kTilePitch = kTile + kPiece;       // of the result in shared memory

// Where the piece lies in a factor's stage, in values.
MF_DEVICE constexpr int place_in_stage(int row, int piece) {
  return row * kDepth + (piece ^ (row & 7)) * kPiece;
}

struct Stage {
  Bf16 left[kTile * kDepth];
  Bf16 right[kTile * kDepth];
};

struct alignas(kSwizzleAlignment) Shared {
  union {
    Stage stage[kStages];
    Bf16 tile[kTile * kTilePitch];
  };
};

// What a launch asks for: the runtime promises no more than 16 bytes of alignment.
constexpr int kSharedBytes = sizeof(Shared) + kSwizzleAlignment;

MF_DEVICE void move16(void* to, const void* from) {
#ifdef __CUDACC__
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#else
  std::memcpy(to, from, 16);
#endif
}

// The block's matrix of the batch and the first row and column of its tile.
struct Corner {
  std::int64_t matrix;
  int row, column;
};

MF_DEVICE Corner corner_of(const Product& p, std::int64_t block) {
  const int high = tiles_along(p.rows), wide = tiles_along(p.columns);
  const std::int64_t tiles = p.symmetric ? lower_tiles(high) : static_cast<std::int64_t>(high) * wide;
  const int index = static_cast<int>(block % tiles);
  const Place place = p.symmetric ? lower_place(index, high) : grid_place(index, high, wide);
  return {block / tiles, place.row * kTile, place.column * kTile};
}

// Rows [first, first + 128) of a factor [length, depth], at depths [from, from + 64): zeros beyond its ends.
MF_DEVICE void fetch_rows(Bf16* to, const Bf16* factor, int first, int length, int from, int depth, int thread,
                          AsyncCopies& copies) {
  const int piece = thread % kPieces, at = from + piece * kPiece;
  MF_UNROLL
  for (int row = thread / kPieces; row < kTile; row += kThreads / kPieces) {
    const bool valid = first + row < length && at < depth;
    const Bf16* source = valid ? factor + static_cast<std::int64_t>(first + row) * depth + at : factor;
    copies.copy16(to + place_in_stage(row, piece), source, valid);
  }
}

// Sums: a form of the inner product. A thread's kSums of the tile are at (row(thread, i), column(thread, i)), where i and
// i + 1 are neighbours in a row for even i.
template <class Sums>
MF_DEVICE void product_block(const Block<kThreads>& block, Shared& shared, const Product& p, std::int64_t index) {
  const Corner corner = corner_of(p, index);
  const Bf16* left = p.left + corner.matrix * p.rows * p.depth;
  const Bf16* right = p.right + corner.matrix * p.columns * p.depth;
  const int steps = (p.depth + kDepth - 1) / kDepth;
  PerThread<AsyncCopies, kThreads> copies;
  PerThread<Sums, kThreads> sums;

  // A group of copies a step, even where there is nothing left to copy, so that waiting counts steps.
  const auto fetch = [&](int step, int thread) {
    if (step < steps) {
      Stage& stage = shared.stage[step % kStages];
      fetch_rows(stage.left, left, corner.row, p.rows, step * kDepth, p.depth, thread, copies(thread));
      fetch_rows(stage.right, right, corner.column, p.columns, step * kDepth, p.depth, thread, copies(thread));
    }
    copies(thread).close();
  };

  block.phase([&](int thread) {
    sums(thread).clear();
    fetch(0, thread);
    fetch(1, thread);
    copies(thread).template wait_for_all_but<1>();
    Sums::copied();
  });
  for (int step = 0; step < steps; ++step) {
    block.phase([&](int thread) {
      fetch(step + 2, thread);  // over what all threads multiplied before the barrier
      sums(thread).multiply(shared.stage[step % kStages], thread);
      copies(thread).template wait_for_all_but<1>();
      Sums::copied();
      sums(thread).finish();
    });
  }

  const std::int64_t result = corner.matrix * p.rows * p.columns;
  block.phase([&](int thread) {
    MF_UNROLL
    for (int i = 0; i < kSums; i += 2) {
      const int row = Sums::row(thread, i), column = Sums::column(thread, i);
      if (corner.row + row >= p.rows || corner.column + column >= p.columns) continue;
      float first = p.scale * sums(thread).at[i], second = p.scale * sums(thread).at[i + 1];
      if (p.add != nullptr) {
        float add_first, add_second;
        load_pair(p.add + result + static_cast<std::int64_t>(corner.row + row) * p.columns + corner.column + column,
                  add_first, add_second);
        first += p.add_scale * add_first, second += p.add_scale * add_second;
      }
      store_pair(shared.tile + row * kTilePitch + column, first, second);
    }
  });
  block.phase([&](int thread) {
    if (p.out != nullptr) {
      const int column = thread % (kTile / kPiece) * kPiece;
      MF_UNROLL
      for (int row = thread / (kTile / kPiece); row < kTile; row += kThreads * kPiece / kTile) {
        if (corner.row + row >= p.rows || corner.column + column >= p.columns) continue;
        move16(p.out + result + static_cast<std::int64_t>(corner.row + row) * p.columns + corner.column + column,
               shared.tile + row * kTilePitch + column);
      }
    }
    Bf16* mirror = p.symmetric && corner.row != corner.column ? p.out : p.mirror;
    if (mirror != nullptr) {
      // Two lanes write 32 bytes of a row, as much as memory moves at least.
      const int column = thread / 2;
      MF_UNROLL
      for (int row = thread % 2 * kPiece; row < kTile; row += 2 * kPiece) {
        if (corner.row + row >= p.rows || corner.column + column >= p.columns) continue;
        alignas(16) Bf16 piece[kPiece];
        MF_UNROLL
        for (int i = 0; i < kPiece; ++i) piece[i] = shared.tile[(row + i) * kTilePitch + column];
        move16(mirror + result + static_cast<std::int64_t>(corner.column + column) * p.rows + corner.row + row, piece);
      }
    }
  });
}

}  // namespace megaforge::newton_schulz
