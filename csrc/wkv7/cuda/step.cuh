// A chunk of WKV-7, forward: what the forward pass does, and what the backward pass does again between kept states.
#pragma once

#include "chunk.cuh"

namespace megaforge::wkv7 {

// How many rows of left (a|r) a forward step needs: the state goes on without y.
template <bool kOutput>
constexpr int kStepRows = kOutput ? 2 * kChunk : kChunk;

// What a warp's rows of left give with the state, before they are masked: of a and, for y, of r.
template <class P, bool kOutput>
using FromState = Tiles<kStepRows<kOutput> / kChunk, P::kWide>;

// Takes the chunk in `shared.stage` into `state`, each warp's key channels of all value channels; with kOutput it also
// writes y. Every thread calls save() where the state before the chunk is at hand, fetch() when the stage is free for the
// next chunk's inputs, and arrive() at the end, after which they must be there.
template <class P, bool kOutput, class Scalar, class Shared, class Save, class Fetch, class Arrive>
MF_DEVICE void forward_chunk(const Block<P::kThreads>& block, Shared& shared, const Inputs<Scalar>& in, Scalar* y_data,
                             int chunk, int row, typename P::template Each<typename P::State>& state,
                             typename P::template Each<FromState<P, kOutput>>& from_state, Save save, Fetch fetch,
                             Arrive arrive) {
  constexpr Precision kPrecision = PrecisionOf<Scalar>::value;
  constexpr int kN = P::kN, kUvPitch = Shared::kUvPitch;
  [[maybe_unused]] const int batch = row / in.heads, head = row % in.heads, first = chunk * kChunk;

  block.phase([&](int thread) {
      number_documents(shared.documents, shared.stage, thread);
      prepare<P, kUvPitch>(shared.stage, shared.left, shared.right, shared.uv, shared.total, nullptr, thread);
      share_state<kPrecision, P>(shared.state, state(thread), thread);
      save(thread);
  });

  block.phase([&](int thread) {
      const int lane = thread % 32, first_column = P::first_column(thread);
      fetch(thread);
      masked_pairs<kPrecision, P, kStepRows<kOutput>>(shared.pairs, shared.left, shared.right, shared.documents,
                                                      thread);
      auto& sums = from_state(thread);
      sums.clear();
      multiply<kPrecision, kN>(
          sums, lane, [&](int i, int k) { return read<kPrecision>(shared.left[i * P::kPitch + k]); },
          [&](int k, int j) { return read<kPrecision>(shared.state[(first_column + j) * P::kPitch + k]); });
      sums.each(lane, [&](float& sum, int i, int) {
          if (!shared.documents.reads_state(i % kChunk)) sum = 0.0f;
      });
  });

  block.phase([&](int thread) {  // u before its equation is solved
      const int lane = thread % 32, first_column = P::first_column(thread);
      Tiles<1, P::kWide> sums;
      MF_UNROLL
      for (int h = 0; h < P::kWide; ++h) {
        MF_UNROLL
        for (int i = 0; i < 4; ++i) sums.at[h][0][i] = from_state(thread).at[h][0][i];
      }
      multiply<kPrecision, kChunk>(
          sums, lane, [&](int i, int k) { return shared.pairs[i * kPairsPitch + kChunk + k]; },
          [&](int k, int j) { return read<kPrecision>(shared.uv[(kChunk + k) * kUvPitch + first_column + j]); });
      sums.each(lane, [&](float sum, int i, int j) { shared.uv[i * kUvPitch + first_column + j] = sum; });
  });

  block.phase([&](int thread) {
      if (thread < kN) solve<kPrecision, kUvPitch>(shared.uv, shared.pairs, thread);
  });

  block.phase([&](int thread) {
      const int lane = thread % 32, first_column = P::first_column(thread);
      if constexpr (kOutput) {
        Tiles<1, P::kWide> y;
        MF_UNROLL
        for (int h = 0; h < P::kWide; ++h) {
          MF_UNROLL
          for (int i = 0; i < 4; ++i) y.at[h][0][i] = from_state(thread).at[h][1][i];
        }
        multiply<kPrecision, 2 * kChunk>(
            y, lane, [&](int i, int k) { return shared.pairs[(kChunk + i) * kPairsPitch + k]; },
            [&](int k, int j) { return read<kPrecision>(shared.uv[k * kUvPitch + first_column + j]); });
        y.each_pair(lane, [&](float value, float next, int i, int j) {
            const int token = first + i;
            if (token < in.tokens)
                store_pair(output_row<kN>(y_data, in, token, batch, head) + first_column + j, value, next);
        });
      }
      typename P::State added;
      added.clear();
      multiply<kPrecision, 2 * kChunk>(
          added, lane,
          [&](int i, int k) {
              return read<kPrecision>(shared.documents.writes_state(k % kChunk) ? shared.uv[k * kUvPitch + i] : 0.0f);
          },
          [&](int k, int j) { return read<kPrecision>(shared.right[k * P::kPitch + first_column + j]); });
      const bool survives = shared.documents.state_survives();
      MF_UNROLL
      for (int h = 0; h < P::kWide; ++h) {
        MF_UNROLL
        for (int m = 0; m < P::kHigh; ++m) {
          MF_UNROLL
          for (int i = 0; i < 4; ++i) {
            float& cell = state(thread).at[h][m][i];
            cell = ((survives ? cell : 0.0f) + added.at[h][m][i]) *
                   shared.total[first_column + 8 * h + tile_column(lane, i)];
          }
        }
      }
      arrive(thread);
  });
}

}  // namespace megaforge::wkv7
