// Forward pass of WKV-7: one block goes through the chunks of one head, the state in its registers.
#pragma once

#include "chunk.cuh"

namespace megaforge::wkv7 {

template <class Scalar>
struct ForwardArguments {
  Inputs<Scalar> in;
  const float* initial_state;  // [b, H, N (value), N (key)], or null for zero
  Scalar* y;                   // [s, b, H, N]
  float* states;               // [chunks, b, H, N, N]: the state before each chunk; or null
  float* final_state;          // [b, H, N, N]
};

template <class Scalar, int kN>
struct ForwardShared {
  Stage<Scalar, kN> stage;
  float left[2 * kChunk * Plan<kN>::kPitch];
  float right[2 * kChunk * Plan<kN>::kPitch];
  float uv[2 * kChunk * Plan<kN>::kPitch];
  float pairs[2 * kChunk * kPairsPitch];
  float state[kN * Plan<kN>::kPitch];
  float total[kN];
  Documents documents;
};

// The block of head `row` % H of sequence `row` / H.
template <class Scalar, int kN>
MF_DEVICE void forward_block(const Block<Plan<kN>::kThreads>& block, ForwardShared<Scalar, kN>& shared,
                             const ForwardArguments<Scalar>& args, int row) {
  using P = Plan<kN>;
  constexpr Precision kPrecision = PrecisionOf<Scalar>::value;
  constexpr int kHigh = kN / 16;
  const Inputs<Scalar>& in = args.in;
  const int batch = row / in.heads, head = row % in.heads;
  const std::int64_t state_size = kN * kN, states_size = state_size * in.batch * in.heads;
  const std::int64_t own_state = state_size * row;

  PerThread<AsyncCopies, P::kThreads> copies;
  PerThread<int, P::kThreads> next_start;
  PerThread<Tiles<kHigh>, P::kThreads> state;  // this warp's eight key channels of all value channels
  PerThread<Tiles<2>, P::kThreads> from_state;

  block.phase([&](int thread) {
      stage_inputs(shared.stage, in, 0, batch, head, thread, copies(thread));
      if (thread < kChunk) shared.stage.starts[thread] = document_starts(in, 0, batch, thread);
      load_state<kN>(state(thread), args.initial_state == nullptr ? nullptr : args.initial_state + own_state, thread);
      copies(thread).wait();
  });

  for (int chunk = 0; chunk < in.chunks(); ++chunk) {
    const int first = chunk * kChunk;

    block.phase([&](int thread) {
        number_documents(shared.documents, shared.stage, thread);
        prepare(shared.stage, shared.left, shared.right, shared.uv, shared.total, nullptr, thread);
        store_state<kN>(shared.state, P::kPitch, state(thread), thread);
        if (args.states != nullptr)
            store_state<kN>(args.states + chunk * states_size + own_state, kN, state(thread), thread);
    });

    block.phase([&](int thread) {
        const int lane = thread % 32, first_column = thread / 32 * 8;
        if (chunk + 1 < in.chunks()) {
            stage_inputs(shared.stage, in, chunk + 1, batch, head, thread, copies(thread));
            next_start(thread) = document_starts(in, chunk + 1, batch, thread);
        }
        masked_pairs<kPrecision, kN>(shared.pairs, shared.left, shared.right, shared.documents, thread);
        Tiles<2>& sums = from_state(thread);
        sums.clear();
        multiply<kPrecision, kN>(
            sums, lane, [&](int i, int k) { return shared.left[i * P::kPitch + k]; },
            [&](int k, int j) { return shared.state[(first_column + j) * P::kPitch + k]; });
        MF_UNROLL
        for (int m = 0; m < 2; ++m) {
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
            store_pair(output_row<kN>(args.y, in, token, batch, head) + column, y.at[0][i] + carried[i],
                       y.at[0][i + 1] + carried[i + 1]);
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
        if (chunk + 1 < in.chunks()) {
            if (thread < kChunk) shared.stage.starts[thread] = next_start(thread);
            copies(thread).wait();
        }
    });
  }

  block.phase([&](int thread) { store_state<kN>(args.final_state + own_state, kN, state(thread), thread); });
}

}  // namespace megaforge::wkv7
