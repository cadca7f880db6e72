// Forward pass of WKV-7: one block goes through the chunks of one head, the state in its registers.
#pragma once

#include "step.cuh"

namespace megaforge::wkv7 {

template <class Scalar, bool kFew>
struct ForwardArguments {
  Inputs<Scalar> in;
  const float* initial_state;  // [b, H, N (value), N (key)], or null for zero
  Scalar* y;                   // [s, b, H, N]
  typename Kept<Scalar, kFew>::State* states;  // see Kept; or null
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
template <class Scalar, int kN, bool kFew>
MF_DEVICE void forward_block(const Block<Plan<kN>::kThreads>& block, ForwardShared<Scalar, kN>& shared,
                             const ForwardArguments<Scalar, kFew>& args, int row) {
  using P = Plan<kN>;
  using K = Kept<Scalar, kFew>;
  const Inputs<Scalar>& in = args.in;
  const int batch = row / in.heads, head = row % in.heads;
  const std::int64_t state_size = kN * kN, states_size = state_size * in.batch * in.heads;
  const std::int64_t own_state = state_size * row;

  PerThread<AsyncCopies, P::kThreads> copies;
  PerThread<int, P::kThreads> next_start;
  PerThread<Tiles<kN / 16>, P::kThreads> state;  // this warp's eight key channels of all value channels
  PerThread<Tiles<2>, P::kThreads> from_state;

  block.phase([&](int thread) {
      stage_inputs(shared.stage, in, 0, batch, head, thread, copies(thread));
      if (thread < kChunk) shared.stage.starts[thread] = document_starts(in, 0, batch, thread);
      load_state<kN>(state(thread), args.initial_state == nullptr ? nullptr : args.initial_state + own_state, thread);
      copies(thread).wait();
  });

  for (int chunk = 0; chunk < in.chunks(); ++chunk) {
    forward_chunk<true, kN>(
        block, shared, in, args.y, chunk, row, state, from_state,
        [&](int thread) {
            if (args.states == nullptr || chunk % K::kChunks != 0) return;
            store_state<kN>(args.states + chunk / K::kChunks * states_size + own_state, kN, state(thread), thread);
        },
        [&](int thread) {
            if (chunk + 1 == in.chunks()) return;
            stage_inputs(shared.stage, in, chunk + 1, batch, head, thread, copies(thread));
            next_start(thread) = document_starts(in, chunk + 1, batch, thread);
        },
        [&](int thread) {
            if (chunk + 1 == in.chunks()) return;
            if (thread < kChunk) shared.stage.starts[thread] = next_start(thread);
            copies(thread).wait();
        });
  }

  block.phase([&](int thread) { store_state<kN>(args.final_state + own_state, kN, state(thread), thread); });
}

}  // namespace megaforge::wkv7
