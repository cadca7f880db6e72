// Backward pass of WKV-7: one block goes through the chunks of one head from the last to the first. It computes what the
// forward pass computed within the chunk again from the state before it; nothing is divided by a decay. Where the forward
// pass kept the state before every fourth chunk only, the block first goes forward through these four.
//
// With D = dS' e^(g_15), z = (du | dy) after the transposed equation of u, and the chunk's masks on everything:
//     du     = right_b D^T + pairs_rb^T dy                 dv     = right_k D^T + pairs_.k^T z
//     dpairs = z (u|v)^T                                   dS     = D + z^T left
//     dleft  = z S + dpairs right                          dright = (u|v) D + dpairs^T left
// and a token's log w collects left dleft - right dright of the tokens from it on (a only of those after it) and what
// e^(g_15) changes.
#pragma once

#include "step.cuh"

namespace megaforge::wkv7 {

template <class Scalar, bool kFew>
struct BackwardArguments {
  Inputs<Scalar> in;
  View<Scalar> dy;
  const typename Kept<Scalar, kFew>::State* states;  // as the forward pass kept them
  float* between;             // [b, H, kChunks - 2, N, N], where states are put that it did not keep; unless few are kept: null
  const float* dfinal_state;  // [b, H, N, N], or null for zero
  Scalar *dr, *dk, *dv, *da, *db;  // [s, b, H, N]
  float* dlog_w;
  float* dinitial_state;  // [b, H, N, N], or null when it is not wanted
};

template <class Scalar, class P>
struct BackwardShared {
  static constexpr int kUvPitch = P::kPitch;
  Stage<Scalar, P::kN> stage;
  alignas(16) Scalar stage_dy[kChunk * P::kN];
  float left[2 * kChunk * P::kPitch];
  float right[2 * kChunk * P::kPitch];
  float uv[2 * kChunk * P::kPitch];
  float z[2 * kChunk * P::kPitch];
  float through[kChunk * P::kPitch];
  float pairs[2 * kChunk * kPairsPitch];
  float dpairs[2 * kChunk * kPairsPitch];
  float state[P::kN * P::kPitch];
  float dstate[P::kN * P::kPitch];  // D, as products read it
  float survived[P::kParts * P::kN];  // sums of S D over a part of the value channels
  float total[P::kN];
  Documents documents;

  // Once z and u|v are used, their rows hold what the decays' gradient is summed from, [16, N] each.
  MF_DEVICE float* gained() { return z; }                                  // left dleft - right dright
  MF_DEVICE float* written() { return z + kChunk * P::kPitch; }     // the part of right dright through S'
  MF_DEVICE float* read_before() { return uv; }                            // left_a dleft_a
};

// A state [N, N] on its way from global to shared memory, in a block's registers.
template <class P>
struct StateRegisters {
  static constexpr int kCount = P::kN * P::kN / P::kThreads;
  float at[kCount];

  template <class From>
  MF_DEVICE void load(const From* from, int thread) {
    MF_UNROLL
    for (int i = 0; i < kCount; ++i) at[i] = to_float(from[thread + i * P::kThreads]);
  }

  template <Precision kPrecision>
  MF_DEVICE void share(float* to, int thread) const {
    MF_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int index = thread + i * P::kThreads;
      to[index / P::kN * P::kPitch + index % P::kN] = stored<kPrecision>(at[i]);
    }
  }
};

// sums rows where keep(token) is false become zero.
template <int kWide, class Keep>
MF_DEVICE void mask_rows(Tiles<2, kWide>& sums, int lane, Keep keep) {
  sums.each(lane, [&](float& sum, int i, int) {
      if (!keep(i % kChunk)) sum = 0.0f;
  });
}

// One chunk's gradients of a|r and b|k from those of left and right: stores them and what the decays' gradient needs.
template <class P, class Scalar, bool kFew>
MF_DEVICE void store_gradients(BackwardShared<Scalar, P>& shared, const BackwardArguments<Scalar, kFew>& args,
                               const Tiles<2, P::kWide>& dleft, const Tiles<2, P::kWide>& dright, int first, int batch,
                               int head, int thread) {
  constexpr int kN = P::kN;
  const int lane = thread % 32;
  MF_UNROLL
  for (int h = 0; h < P::kWide; ++h) {
    MF_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const int row = tile_row(lane, i), column = P::first_column(thread) + 8 * h + tile_column(lane, i);
      const auto &left = dleft.at[h], &right = dright.at[h];
      float da[2], dr[2], db[2], dk[2];
      MF_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int upper = row * P::kPitch + column + j, lower = upper + kChunk * P::kPitch;
        const float through = shared.through[upper];
        const float before = row == 0 ? 0.0f : shared.through[upper - P::kPitch];
        const float growth = expf(-through);
        da[j] = left[0][i + j] * expf(before);
        dr[j] = left[1][i + j] * expf(through);
        db[j] = right[0][i + j] * growth;
        dk[j] = right[1][i + j] * growth;
        const float from_a = shared.left[upper] * left[0][i + j];
        shared.read_before()[upper] = from_a;
        shared.gained()[upper] = (from_a + shared.left[lower] * left[1][i + j]) -
                                 (shared.right[upper] * right[0][i + j] + shared.right[lower] * right[1][i + j]);
      }
      const int token = first + row;
      if (token >= args.in.tokens) continue;
      store_pair(output_row<kN>(args.da, args.in, token, batch, head) + column, da[0], da[1]);
      store_pair(output_row<kN>(args.dr, args.in, token, batch, head) + column, dr[0], dr[1]);
      store_pair(output_row<kN>(args.db, args.in, token, batch, head) + column, db[0], db[1]);
      store_pair(output_row<kN>(args.dk, args.in, token, batch, head) + column, dk[0], dk[1]);
    }
  }
}

// The gradient of log w of this thread's channel and tokens.
template <class P, class Scalar, bool kFew>
MF_DEVICE void store_decay_gradient(BackwardShared<Scalar, P>& shared,
                                    const BackwardArguments<Scalar, kFew>& args,
                                    int first, int batch, int head, int thread) {
  constexpr int kN = P::kN;
  const int column = thread % kN, part = thread / kN;
  float to_end = 0.0f;
  MF_UNROLL
  for (int t = 0; t < kChunk; ++t) to_end += shared.written()[t * P::kPitch + column];
  if (shared.documents.state_survives()) {
    MF_UNROLL
    for (int p = 0; p < P::kParts; ++p) to_end += shared.survived[p * kN + column];
  }
  float later = 0.0f;
  MF_UNROLL
  for (int t = kChunk - 1; t >= 0; --t) {
    later += shared.gained()[t * P::kPitch + column];
    if (t / P::kPartTokens != part || first + t >= args.in.tokens) continue;
    output_row<kN>(args.dlog_w, args.in, first + t, batch, head)[column] =
      later - shared.read_before()[t * P::kPitch + column] + to_end;
  }
}

// The block of head `row` % H of sequence `row` / H.
template <class Scalar, int kN, bool kFew>
MF_DEVICE void backward_block(const Block<PlanOf<kN, kFew>::kThreads>& block,
                              BackwardShared<Scalar, PlanOf<kN, kFew>>& shared,
                              const BackwardArguments<Scalar, kFew>& args, int row) {
  using P = PlanOf<kN, kFew>;
  using K = Kept<Scalar, kFew>;
  constexpr Precision kPrecision = PrecisionOf<Scalar>::value;
  const Inputs<Scalar>& in = args.in;
  const int batch = row / in.heads, head = row % in.heads;
  const std::int64_t state_size = kN * kN, states_size = state_size * in.batch * in.heads;
  const std::int64_t own_state = state_size * row;

  typename P::template Each<AsyncCopies> copies;
  typename P::template Each<int> next_start;
  typename P::template Each<StateRegisters<P>> next_state;
  typename P::template Each<typename P::State> dstate, state;  // this warp's key channels of all value channels
  typename P::template Each<FromState<P, false>> removed;
  typename P::template Each<Tiles<2, P::kWide>> dwritten, dleft, dright;

  const auto fetch_inputs = [&](int chunk, int thread) {
    stage_inputs<P>(shared.stage, in, chunk, batch, head, thread, copies(thread));
    next_start(thread) = document_starts(in, chunk, batch, thread);
  };
  const auto fetch_dy = [&](int chunk, int thread) {
    stage_rows<P>(shared.stage_dy, args.dy, chunk * kChunk, in.tokens, batch, head, thread, copies(thread));
  };
  const auto kept = [&](int chunk) { return args.states + chunk / K::kChunks * states_size + own_state; };
  const auto between = [&](int chunk) {  // the state before a chunk that is neither the first nor the last of its group
    return args.between + (static_cast<std::int64_t>(row) * (K::kChunks - 2) + chunk % K::kChunks - 1) * state_size;
  };
  // What the block begins the group of chunks up to `last` with: its first chunk forward, or its only one.
  const auto fetch_group = [&](int last, int thread) {
    const int begin = last / K::kChunks * K::kChunks;
    fetch_inputs(begin, thread);
    if (kFew && begin < last) {
      load_state<P>(state(thread), kept(begin), thread);
    } else {
      fetch_dy(begin, thread);
      next_state(thread).load(kept(begin), thread);
    }
  };
  const auto fetch_before = [&](int chunk, int thread) {
    if (chunk % K::kChunks == 0) return fetch_group(chunk - 1, thread);
    fetch_inputs(chunk - 1, thread);
    fetch_dy(chunk - 1, thread);
    if ((chunk - 1) % K::kChunks == 0) next_state(thread).load(kept(chunk - 1), thread);
    else next_state(thread).load(between(chunk - 1), thread);
  };
  const auto arrive = [&](int thread) {
    if (thread < kChunk) shared.stage.starts[thread] = next_start(thread);
    copies(thread).wait();
  };

  block.phase([&](int thread) {
      fetch_group(in.chunks() - 1, thread);
      load_state<P>(dstate(thread), args.dfinal_state == nullptr ? nullptr : args.dfinal_state + own_state, thread);
      arrive(thread);
  });

  for (int chunk = in.chunks() - 1; chunk >= 0; --chunk) {
    const int first = chunk * kChunk, begin = chunk / K::kChunks * K::kChunks;
    const bool replayed = kFew && chunk > begin && (chunk + 1 == in.chunks() || (chunk + 1) % K::kChunks == 0);
    if constexpr (kFew) {
      if (replayed) {
        for (int earlier = begin; earlier < chunk; ++earlier) {
          forward_chunk<P, false>(
              block, shared, in, static_cast<Scalar*>(nullptr), earlier, row, state, removed,
              [&](int thread) {
                  if (earlier > begin) store_state<P>(between(earlier), kN, state(thread), thread);
              },
              [&](int thread) {
                  fetch_inputs(earlier + 1, thread);
                  if (earlier + 1 == chunk) fetch_dy(chunk, thread);
              },
              arrive);
        }
      }
    }

    block.phase([&](int thread) {
        const int lane = thread % 32, first_column = P::first_column(thread);
        number_documents(shared.documents, shared.stage, thread);
        prepare<P, P::kPitch>(shared.stage, shared.left, shared.right, shared.uv, shared.total, shared.through, thread);
        for (int i = thread; i < kChunk * kN; i += P::kThreads)
            shared.z[(kChunk + i / kN) * P::kPitch + i % kN] = to_float(shared.stage_dy[i]);
        if (replayed) share_state<kPrecision, P>(shared.state, state(thread), thread);
        else next_state(thread).template share<kPrecision>(shared.state, thread);
        MF_UNROLL
        for (int h = 0; h < P::kWide; ++h) {
            float total[2];
            MF_UNROLL
            for (int j = 0; j < 2; ++j) {
                float sum = 0.0f;
                for (int t = 0; t < kChunk; ++t)
                    sum += shared.stage.log_w[t * kN + first_column + 8 * h + tile_column(lane, j)];
                total[j] = expf(sum);
            }
            MF_UNROLL
            for (int m = 0; m < P::kHigh; ++m) {
                MF_UNROLL
                for (int i = 0; i < 4; i += 2) {
                    const int value = 16 * m + tile_row(lane, i), key = first_column + 8 * h + tile_column(lane, i);
                    float(&cells)[4] = dstate(thread).at[h][m];
                    cells[i] *= total[0], cells[i + 1] *= total[1];
                    store_pair(shared.dstate + value * P::kPitch + key, stored<kPrecision>(cells[i]),
                               stored<kPrecision>(cells[i + 1]));
                }
            }
        }
    });

    block.phase([&](int thread) {
        const int lane = thread % 32, first_column = P::first_column(thread);
        if (chunk > 0) fetch_before(chunk, thread);
        masked_pairs<kPrecision, P>(shared.pairs, shared.left, shared.right, shared.documents, thread);
        removed(thread).clear();
        multiply<kPrecision, kN>(
            removed(thread), lane, [&](int i, int k) { return read<kPrecision>(shared.left[i * P::kPitch + k]); },
            [&](int k, int j) { return read<kPrecision>(shared.state[(first_column + j) * P::kPitch + k]); });
        removed(thread).each(lane, [&](float& sum, int i, int) {
            if (!shared.documents.reads_state(i)) sum = 0.0f;
        });
        dwritten(thread).clear();
        multiply<kPrecision, kN>(
            dwritten(thread), lane, [&](int i, int k) { return read<kPrecision>(shared.right[i * P::kPitch + k]); },
            [&](int k, int j) { return read<kPrecision>(shared.dstate[(first_column + j) * P::kPitch + k]); });
        mask_rows(dwritten(thread), lane, [&](int t) { return shared.documents.writes_state(t); });
    });

    block.phase([&](int thread) {  // u and du before their equations are solved
        const int lane = thread % 32, first_column = P::first_column(thread);
        Tiles<1, P::kWide> u, du;
        u.clear();
        multiply<kPrecision, kChunk>(
            u, lane, [&](int i, int k) { return shared.pairs[i * kPairsPitch + kChunk + k]; },
            [&](int k, int j) { return read<kPrecision>(shared.uv[(kChunk + k) * P::kPitch + first_column + j]); });
        du.clear();
        multiply<kPrecision, kChunk>(
            du, lane, [&](int i, int k) { return shared.pairs[(kChunk + k) * kPairsPitch + i]; },
            [&](int k, int j) { return read<kPrecision>(shared.z[(kChunk + k) * P::kPitch + first_column + j]); });
        MF_UNROLL
        for (int h = 0; h < P::kWide; ++h) {
            MF_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int at = tile_row(lane, i) * P::kPitch + first_column + 8 * h + tile_column(lane, i);
                shared.uv[at] = u.at[h][0][i] + removed(thread).at[h][0][i];
                shared.z[at] = du.at[h][0][i] + dwritten(thread).at[h][0][i];
            }
        }
    });

    block.phase([&](int thread) {
        if (thread < kN) solve<kPrecision, P::kPitch>(shared.uv, shared.pairs, thread);
        else if (thread < 2 * kN) solve_transposed<kPrecision, P::kPitch>(shared.z, shared.pairs, thread - kN);
    });

    block.phase([&](int thread) {
        const int lane = thread % 32, first_column = P::first_column(thread);
        const Documents& documents = shared.documents;
        Tiles<1, P::kWide> dv;
        MF_UNROLL
        for (int h = 0; h < P::kWide; ++h) {
            MF_UNROLL
            for (int i = 0; i < 4; ++i) dv.at[h][0][i] = dwritten(thread).at[h][1][i];
        }
        multiply<kPrecision, 2 * kChunk>(
            dv, lane, [&](int i, int k) { return shared.pairs[k * kPairsPitch + kChunk + i]; },
            [&](int k, int j) { return read<kPrecision>(shared.z[k * P::kPitch + first_column + j]); });
        dv.each_pair(lane, [&](float value, float next, int i, int j) {
            const int token = first + i;
            if (token < in.tokens)
                store_pair(output_row<kN>(args.dv, in, token, batch, head) + first_column + j, value, next);
        });
        masked_pairs<kPrecision, P>(shared.dpairs, shared.z, shared.uv, documents, thread);

        dleft(thread).clear();
        multiply<kPrecision, kN>(
            dleft(thread), lane, [&](int i, int k) { return read<kPrecision>(shared.z[i * P::kPitch + k]); },
            [&](int k, int j) { return read<kPrecision>(shared.state[k * P::kPitch + first_column + j]); });
        mask_rows(dleft(thread), lane, [&](int t) { return documents.reads_state(t); });
        dright(thread).clear();
        multiply<kPrecision, kN>(
            dright(thread), lane, [&](int i, int k) { return read<kPrecision>(shared.uv[i * P::kPitch + k]); },
            [&](int k, int j) { return read<kPrecision>(shared.dstate[k * P::kPitch + first_column + j]); });
        mask_rows(dright(thread), lane, [&](int t) { return documents.writes_state(t); });

        typename P::State through_left;
        through_left.clear();
        multiply<kPrecision, 2 * kChunk>(
            through_left, lane,
            [&](int i, int k) {
                return read<kPrecision>(documents.reads_state(k % kChunk) ? shared.z[k * P::kPitch + i] : 0.0f);
            },
            [&](int k, int j) { return read<kPrecision>(shared.left[k * P::kPitch + first_column + j]); });
        const bool survives = documents.state_survives();
        MF_UNROLL
        for (int h = 0; h < P::kWide; ++h) {
            MF_UNROLL
            for (int m = 0; m < P::kHigh; ++m) {
                MF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    float& cell = dstate(thread).at[h][m][i];
                    cell = (survives ? cell : 0.0f) + through_left.at[h][m][i];
                }
            }
        }
        const int column = thread % kN, part = thread / kN;
        float survived = 0.0f;
        for (int i = part * kN / P::kParts; i < (part + 1) * kN / P::kParts; ++i)
            survived += shared.state[i * P::kPitch + column] * shared.dstate[i * P::kPitch + column];
        shared.survived[thread] = survived;
    });

    block.phase([&](int thread) {
        const int lane = thread % 32, first_column = P::first_column(thread);
        MF_UNROLL
        for (int h = 0; h < P::kWide; ++h) {
            MF_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int at = tile_row(lane, i) * P::kPitch + first_column + 8 * h + tile_column(lane, i);
                shared.written()[at] = shared.right[at] * dright(thread).at[h][0][i] +
                                       shared.right[at + kChunk * P::kPitch] * dright(thread).at[h][1][i];
            }
        }
        multiply<kPrecision, 2 * kChunk>(
            dleft(thread), lane, [&](int i, int k) { return shared.dpairs[i * kPairsPitch + k]; },
            [&](int k, int j) { return read<kPrecision>(shared.right[k * P::kPitch + first_column + j]); });
        multiply<kPrecision, 2 * kChunk>(
            dright(thread), lane, [&](int i, int k) { return shared.dpairs[k * kPairsPitch + i]; },
            [&](int k, int j) { return read<kPrecision>(shared.left[k * P::kPitch + first_column + j]); });
        store_gradients<P>(shared, args, dleft(thread), dright(thread), first, batch, head, thread);
    });

    block.phase([&](int thread) {
        store_decay_gradient<P>(shared, args, first, batch, head, thread);
        if (chunk > 0) arrive(thread);
    });
  }

  if (args.dinitial_state == nullptr) return;
  block.phase([&](int thread) { store_state<P>(args.dinitial_state + own_state, kN, dstate(thread), thread); });
}

}  // namespace megaforge::wkv7
