// Many tokens: one block's tile of 128 rows of weights x 32 or 128 tokens. Weights are the left operand, from global
// memory into registers, where they are decoded; codes of tokens are the right one, in shared memory as rows of 128 bytes,
// whose eight pieces of 16 bytes are permuted by the row, as wgmma's 128-byte swizzle does it.
#pragma once

#include "../../common/wgmma.cuh"
#include "values.cuh"

namespace megaforge::bitgemm {

constexpr int kThreads = 256;
constexpr int kPiece = 16;                     // bytes
constexpr int kPieces = kStageDepth / kPiece;  // of a token in a stage
constexpr int kSteps = kStageDepth / kStep;    // of a stage
constexpr int kStages = 3;
constexpr int kTilePitch = kTileRows + 4;    // of results in shared memory
constexpr int kRegisters = 4;                // of a lane's left operand in a step

// Where the piece lies in a stage, in bytes.
MF_DEVICE constexpr int place_in_stage(int token, int piece) {
  return token * kStageDepth + (piece ^ (token & 7)) * kPiece;
}

template <int kTokens>
struct Stage {
  std::int8_t codes[kTokens * kStageDepth];
};

template <int kTokens>
struct alignas(kSwizzleAlignment) Shared {
  union {
    Stage<kTokens> stage[kStages];
    std::uint32_t tile[kTokens * kTilePitch];
  };
};

// What a launch asks for: the runtime promises no more than 16 bytes of alignment.
template <int kTokens>
constexpr int kSharedBytes = sizeof(Shared<kTokens>) + kSwizzleAlignment;

// A lane's weights of one stage of a panel.
template <int kBits>
struct StageWords {
  static constexpr int kCount = kSteps * kRegisters / positions(kBits);
  std::uint32_t at[kCount];
};

// Register `reg` of step `step` out of the words of a stage: stored codes or, where `kSigned`, weights.
template <int kBits, bool kSigned>
MF_DEVICE std::uint32_t decoded(const StageWords<kBits>& words, int step, int reg) {
  constexpr int kPositions = positions(kBits);
  const int index = step * kRegisters + reg;
  const std::uint32_t mask = 0x01010101u * ((1u << kBits) - 1);
  const std::uint32_t stored = words.at[index / kPositions] >> kBits * (index % kPositions) & mask;
  if constexpr (!kSigned) return stored;
  // Byte by byte: the highest bit is set, so that no byte borrows from the next, and flipped afterwards.
  const std::uint32_t doubled = slope(kBits) == 2 ? stored + stored : stored;
  return ((doubled | 0x80808080u) - 0x01010101u * static_cast<std::uint32_t>(-offset(kBits))) ^ 0x80808080u;
}

// A lane's weights of kHigh panels: those of one stage, and the next, which are on their way.
template <int kBits, int kHigh>
class Weights {
 public:
  // 16 bytes of a lane are half a stage (int4), a stage, or two (binary).
  static constexpr int kLoads = block_depth(kBits) < kStageDepth ? kStageDepth / block_depth(kBits) : 1;
  static constexpr int kServes = block_depth(kBits) > kStageDepth ? block_depth(kBits) / kStageDepth : 1;

  // Panels beyond the last are read as the last; their results are not stored.
  MF_DEVICE void begin(const Product& p, int first_panel, int lane, int stage) {
    MF_UNROLL
    for (int m = 0; m < kHigh; ++m) {
      const int last = panels_of(p.rows) - 1, panel = first_panel + m < last ? first_panel + m : last;
      from_[m] = p.panels + panel * panel_words(kBits, p.depth) + lane * 4;
    }
    fetch(stage);
  }

  // Makes `stage` the present one and fetches the one after it.
  MF_DEVICE void advance(int stage, int stages) {
    if (stage % kServes == 0) {
      MF_UNROLL
      for (int m = 0; m < kHigh; ++m) {
        MF_UNROLL
        for (int i = 0; i < kLoads; ++i) now_[m][i] = next_[m][i];
      }
    }
    if ((stage + 1) % kServes == 0 && stage + 1 < stages) fetch(stage + 1);
  }

  MF_DEVICE StageWords<kBits> words(int m, int stage) const {
    StageWords<kBits> words;
    MF_UNROLL
    for (int i = 0; i < words.kCount; ++i) {
      if constexpr (kServes == 2) words.at[i] = stage % 2 == 0 ? now_[m][0].at[i] : now_[m][0].at[i + words.kCount];
      else words.at[i] = now_[m][i / 4].at[i % 4];
    }
    return words;
  }

 private:
  MF_DEVICE void fetch(int stage) {
    const int block = stage / kServes * kLoads;
    MF_UNROLL
    for (int m = 0; m < kHigh; ++m) {
      MF_UNROLL
      for (int i = 0; i < kLoads; ++i) next_[m][i] = load_words(from_[m] + (block + i) * kLanes * 4);
    }
  }

  const std::uint32_t* from_[kHigh];
  Words now_[kHigh][kLoads], next_[kHigh][kLoads];
};

#ifndef __CUDACC__
// The words that another lane has at this time, for what a warp does together.
template <int kBits>
StageWords<kBits> words_of_lane(const Product& p, int panel, int lane, int stage) {
  Weights<kBits, 1> weights{};
  const int first = stage - stage % Weights<kBits, 1>::kServes;
  weights.begin(p, panel, lane, first);
  weights.advance(first, first + 1);
  return weights.words(0, stage);
}
#endif

// Tokens [first, first + kTokens) of a stage: zeros beyond the last.
template <int kTokens>
MF_DEVICE void fetch_codes(Stage<kTokens>& to, const Product& p, int first, int stage, int thread, AsyncCopies& copies) {
  const int piece = thread % kPieces;
  MF_UNROLL
  for (int token = thread / kPieces; token < kTokens; token += kThreads / kPieces) {
    const bool valid = first + token < p.tokens;
    const std::int64_t at = valid ? static_cast<std::int64_t>(first + token) * p.depth + stage * kStageDepth : 0;
    copies.copy16(to.codes + place_in_stage(token, piece), p.codes + at + piece * kPiece, valid);
  }
}

// Sums: a form of the product. A thread's Sums::kCount of the tile are at (row(thread, i), token(thread, i)).
template <class Sums>
MF_DEVICE void product_block(const Block<kThreads>& block, Shared<Sums::kTokens>& shared, const Product& p,
                             std::int64_t index, int part) {
  constexpr int kTokens = Sums::kTokens, kBits = Sums::kBits;
  const int tiles_high = (p.rows + kTileRows - 1) / kTileRows;
  const int first_row = static_cast<int>(index % tiles_high) * kTileRows;
  const int first_token = static_cast<int>(index / tiles_high) * kTokens;
  // Of whole loads of weights.
  constexpr int kServes = Weights<kBits, Sums::kHigh>::kServes;
  const int loads = p.depth / (kStageDepth * kServes);
  const int from = loads * part / p.parts * kServes, stages = loads * (part + 1) / p.parts * kServes;
  PerThread<AsyncCopies, kThreads> copies;
  PerThread<Weights<kBits, Sums::kHigh>, kThreads> weights;
  PerThread<Sums, kThreads> sums;

  // A group of copies a stage, even where there is nothing left to copy, so that waiting counts stages.
  const auto fetch = [&](int stage, int thread) {
    if (stage < stages) fetch_codes(shared.stage[stage % kStages], p, first_token, stage, thread, copies(thread));
    copies(thread).close();
  };

  block.phase([&](int thread) {
    sums(thread).clear();
    fetch(from, thread);
    fetch(from + 1, thread);
    weights(thread).begin(p, (first_row + Sums::first_row(thread)) / kPanelRows, thread % kLanes, from);
    copies(thread).template wait_for_all_but<1>();
    Sums::copied();
  });
  for (int stage = from; stage < stages; ++stage) {
    block.phase([&](int thread) {
      fetch(stage + 2, thread);  // over what all threads multiplied before the barrier
      weights(thread).advance(stage, stages);
      sums(thread).multiply(shared.stage[stage % kStages], weights(thread), p, first_row, stage, thread);
      copies(thread).template wait_for_all_but<1>();
      Sums::copied();
      sums(thread).finish();
    });
  }

  block.phase([&](int thread) {
    MF_UNROLL
    for (int i = 0; i < Sums::kCount; ++i)
      shared.tile[Sums::token(thread, i) * kTilePitch + Sums::row(thread, i)] = sums(thread).result(i);
  });
  block.phase([&](int thread) {
    const int row = first_row + thread % kTileRows;
    if (row >= p.rows) return;
    for (int token = thread / kTileRows; token < kTokens && first_token + token < p.tokens; token += kThreads / kTileRows) {
      const std::uint32_t value = shared.tile[token * kTilePitch + thread % kTileRows];
      if (p.parts > 1) {
        const std::int64_t place = (static_cast<std::int64_t>(part) * p.tokens + first_token + token) * p.rows + row;
        p.partial[place] = static_cast<std::int32_t>(value);
      } else if constexpr (Sums::kGrouped) finish(p, first_token + token, row, from_bits(value));
      else finish_stored<kBits>(p, first_token + token, row, static_cast<int>(value));
    }
  });
}

}  // namespace megaforge::bitgemm
