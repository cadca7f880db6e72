// A chunk of WKV-7, forward: what the forward pass does, and what the backward pass does again between kept states.
#pragma once

#include "chunk.cuh"

namespace megaforge::wkv7 {

// How many rows of left (a|r) a forward step needs: the state goes on without y.
template <bool kOutput>
constexpr int kStepRows = kOutput ? 2 * kChunk : kChunk;

// Takes the chunk in `shared.stage` into `state`, each warp's eight key channels of all value channels; with kOutput it
// also writes y. Every thread calls save() where the state before the chunk is at hand, fetch() when the stage is free for
// the next chunk's inputs, and arrive() at the end, after which they must be there.
template <bool kOutput, int kN, class Scalar, class Shared, class Save, class Fetch, class Arrive>
MF_DEVICE void forward_chunk(const Block<Plan<kN>::kThreads>& block, Shared& shared, const Inputs<Scalar>& in,
                             Scalar* y_data, int chunk, int row,
                             PerThread<Tiles<kN / 16>, Plan<kN>::kThreads>& state,
                             PerThread<Tiles<kStepRows<kOutput> / kChunk>, Plan<kN>::kThreads>& from_state, Save save,
                             Fetch fetch, Arrive arrive) {
  using P = Plan<kN>;
  constexpr Precision kPrecision = PrecisionOf<Scalar>::value;
  constexpr int kHigh = kN / 16, kRows = kStepRows<kOutput>;
  [[maybe_unused]] const int batch = row / in.heads, head = row % in.heads, first = chunk * kChunk;

  block.phase([&](int thread) {
      number_documents(shared.documents, shared.stage, thread);
      prepare(shared.stage, shared.left, shared.right, shared.uv, shared.total, nullptr, thread);
      store_state<kN>(shared.state, P::kPitch, state(thread), thread);
      save(thread);
  });

  block.phase([&](int thread) {
      const int lane = thread % 32, first_column = thread / 32 * 8;
      fetch(thread);
      masked_pairs<kPrecision, kN, kRows>(shared.pairs, shared.left, shared.right, shared.documents, thread);
      Tiles<kRows / kChunk>& sums = from_state(thread);
      sums.clear();
      multiply<kPrecision, kN>(
          sums, lane, [&](int i, int k) { return shared.left[i * P::kPitch + k]; },
          [&](int k, int j) { return shared.state[(first_column + j) * P::kPitch + k]; });
      MF_UNROLL
      for (int m = 0; m < kRows / kChunk; ++m) {
          MF_UNROLL
          for (int i = 0; i < 4; ++i)
              if (!shared.documents.reads_state(tile_row(lane, i))) sums.at[m][i] = 0.0f;
      }
  });

  block.phase([&](int thread) {  // u before its equation is solved
      const int lane = thread % 32, first_column = thread / 32 * 8;
      Tiles<1> sums;
      sums.clear();
      multiply<kPrecision, kChunk>(
          sums, lane, [&](int i, int k) { return shared.pairs[i * kPairsPitch + kChunk + k]; },
          [&](int k, int j) { return shared.uv[(kChunk + k) * P::kPitch + first_column + j]; });
      MF_UNROLL
      for (int i = 0; i < 4; ++i)
          shared.uv[tile_row(lane, i) * P::kPitch + first_column + tile_column(lane, i)] =
              sums.at[0][i] + from_state(thread).at[0][i];
  });

  block.phase([&](int thread) {
      if (thread < kN) solve<P::kPitch>(shared.uv, shared.pairs, thread);
  });

  block.phase([&](int thread) {
      const int lane = thread % 32, first_column = thread / 32 * 8;
      if constexpr (kOutput) {
          Tiles<1> y;
          y.clear();
          multiply<kPrecision, 2 * kChunk>(
              y, lane, [&](int i, int k) { return shared.pairs[(kChunk + i) * kPairsPitch + k]; },
              [&](int k, int j) { return shared.uv[k * P::kPitch + first_column + j]; });
          MF_UNROLL
          for (int i = 0; i < 4; i += 2) {
              const int token = first + tile_row(lane, i), column = first_column + tile_column(lane, i);
              if (token >= in.tokens) continue;
              const float(&carried)[4] = from_state(thread).at[1];
              store_pair(output_row<kN>(y_data, in, token, batch, head) + column, y.at[0][i] + carried[i],
                         y.at[0][i + 1] + carried[i + 1]);
          }
      }
      Tiles<kHigh> added;
      added.clear();
      multiply<kPrecision, 2 * kChunk>(
          added, lane,
          [&](int i, int k) {
              return shared.documents.writes_state(k % kChunk) ? shared.uv[k * P::kPitch + i] : 0.0f;
          },
          [&](int k, int j) { return shared.right[k * P::kPitch + first_column + j]; });
      const bool survives = shared.documents.state_survives();
      MF_UNROLL
      for (int m = 0; m < kHigh; ++m) {
          MF_UNROLL
          for (int i = 0; i < 4; ++i) {
              float& cell = state(thread).at[m][i];
              cell = ((survives ? cell : 0.0f) + added.at[m][i]) *
                     shared.total[first_column + tile_column(lane, i)];
          }
      }
      arrive(thread);
  });
}

}  // namespace megaforge::wkv7
