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

template <class Scalar, class P>
struct ForwardShared {
  static constexpr int kUvPitch = P::kDeepPitch;
  Stage<Scalar, P::kN> stage;
  float left[2 * kChunk * P::kPitch];
  float right[2 * kChunk * P::kPitch];
  float uv[2 * kChunk * kUvPitch];
  float pairs[2 * kChunk * kPairsPitch];
  float state[P::kN * P::kPitch];
  float total[P::kN];
  Documents documents;
};

// The block of head `row` % H of sequence `row` / H.
template <class Scalar, int kN, bool kFew>
MF_DEVICE void forward_block(const Block<PlanOf<kN, kFew>::kThreads>& block,
                             ForwardShared<Scalar, PlanOf<kN, kFew>>& shared,
                             const ForwardArguments<Scalar, kFew>& args, int row) {
  using P = PlanOf<kN, kFew>;
  using K = Kept<Scalar, kFew>;
  const Inputs<Scalar>& in = args.in;
  const int batch = row / in.heads, head = row % in.heads;
  const std::int64_t state_size = kN * kN, states_size = state_size * in.batch * in.heads;
  const std::int64_t own_state = state_size * row;

  typename P::template Each<AsyncCopies> copies;
  typename P::template Each<int> next_start;
  typename P::template Each<typename P::State> state;  // this warp's key channels of all value channels
  typename P::template Each<FromState<P, true>> from_state;

  block.phase([&](int thread) {
      stage_inputs<P>(shared.stage, in, 0, batch, head, thread, copies(thread));
      if (thread < kChunk) shared.stage.starts[thread] = document_starts(in, 0, batch, thread);
      load_state<P>(state(thread), args.initial_state == nullptr ? nullptr : args.initial_state + own_state, thread);
      copies(thread).wait();
  });

  for (int chunk = 0; chunk < in.chunks(); ++chunk) {
    forward_chunk<P, true>(
        block, shared, in, args.y, chunk, row, state, from_state,
        [&](int thread) {
            if (args.states == nullptr || chunk % K::kChunks != 0) return;
            store_state<P>(args.states + chunk / K::kChunks * states_size + own_state, kN, state(thread), thread);
        },
        [&](int thread) {
            if (chunk + 1 == in.chunks()) return;
            stage_inputs<P>(shared.stage, in, chunk + 1, batch, head, thread, copies(thread));
            next_start(thread) = document_starts(in, chunk + 1, batch, thread);
        },
        [&](int thread) {
            if (chunk + 1 == in.chunks()) return;
            if (thread < kChunk) shared.stage.starts[thread] = next_start(thread);
            copies(thread).wait();
        });
  }

  block.phase([&](int thread) { store_state<P>(args.final_state + own_state, kN, state(thread), thread); });
}

}  // namespace megaforge::wkv7
