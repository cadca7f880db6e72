// What the forward and the backward pass of WKV-7 do alike within a chunk of 16 tokens of one head.
//
// With g_t the sum of the logarithmic decays of the chunk's tokens up to t and S the state [value, key] before it:
//     left  = a_t e^(g_t - log w_t) | r_t e^(g_t)          right = b_t e^(-g_t) | k_t e^(-g_t)         [32, N]
//     pairs = left right^T, a row sees earlier tokens (a) or also its own (r), of its own document      [32, 32]
//     u     = (I - pairs_ab)^-1 (pairs_ak v + left_a S^T)        y  = left_r S^T + pairs_rb u + pairs_rk v
//     S'    = (S + (u|v)^T right) e^(g_15)
// The terms with S belong to tokens of the document that the chunk begins in, S is kept only if that document lasts
// to the chunk's end, and only tokens of the last document write into S'. Decays of 16 tokens span at most e^9.7 in
// RWKV-7, so no exponent needs a centre; fp32 overflows from log w = -5.5 a token on.
#pragma once

#include <type_traits>

#include "../../common/tile.h"

namespace megaforge::wkv7 {

constexpr int kChunk = 16;
constexpr int kPairsPitch = 2 * kChunk + 4;

// [s, b, H, N] with the channels next to each other, rows aligned to 16 bytes; strides in elements.
template <class Scalar>
struct View {
  const Scalar* data;
  std::int64_t token, batch, head;
};

// One block's work and how many warps share it: every warp owns 8 kWide_ columns of the [.., N] matrices.
template <int kN_, int kWide_>
struct Plan {
  static constexpr int kN = kN_, kWide = kWide_;
  static_assert(kN % 16 == 0 && kN >= 32);
  static constexpr int kHigh = kN / 16;  // tiles that hold all value channels
  static constexpr int kWarps = kN / (8 * kWide);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kParts = kThreads / kN;  // threads a column
  static constexpr int kPartTokens = kChunk / kParts;
  // Rows in shared memory. Lanes that read them as [row of results][depth] meet no bank twice; in the deep ones, those
  // that read them as [depth][row or column of results].
  static constexpr int kPitch = kN + 4, kDeepPitch = kN + 8;

  // A warp's columns of all value channels.
  using State = Tiles<kHigh, kWide>;
  template <class T>
  using Each = PerThread<T, kThreads>;

  MF_DEVICE static int first_column(int thread) { return thread / 32 * 8 * kWide; }
};

// How the blocks are cut: as many warps as there are columns of tiles, and every state kept; or half as many warps, each
// with twice the columns, for which it reads left operands once, and few states kept.
template <int kN, bool kFew>
using PlanOf = Plan<kN, kFew ? 2 : 1>;

// The states that the forward pass keeps for the backward pass, [.., b, H, N, N]: one before every kChunks chunks. The few
// are in bf16 where the inputs are; those between them are computed again.
template <class Scalar, bool kFew>
struct Kept {
  using State = std::conditional_t<kFew, Scalar, float>;
  static constexpr int kChunks = kFew ? 4 : 1;
};

template <class Scalar>
struct PrecisionOf {
  static constexpr Precision value = Precision::kTf32;
};
template <>
struct PrecisionOf<float> {
  static constexpr Precision value = Precision::kThreeTf32;
};

// The next chunk's inputs as they arrive from global memory.
template <class Scalar, int kN>
struct Stage {
  alignas(16) Scalar r[kChunk * kN];
  alignas(16) Scalar k[kChunk * kN];
  alignas(16) Scalar v[kChunk * kN];
  alignas(16) Scalar a[kChunk * kN];
  alignas(16) Scalar b[kChunk * kN];
  alignas(16) float log_w[kChunk * kN];
  int starts[kChunk];
};

template <class Scalar>
struct Inputs {
  int tokens, batch, heads;
  View<Scalar> r, k, v, a, b;
  View<float> log_w;
  const std::uint8_t* document_start;  // [s, b], nonzero where a document starts; or null

  MF_DEVICE int chunks() const { return (tokens + kChunk - 1) / kChunk; }
};

// Which documents the tokens of a chunk belong to: 0 is the one that the chunk begins in.
struct Documents {
  int number[kChunk];

  MF_DEVICE bool reads_state(int token) const { return number[token] == 0; }
  MF_DEVICE bool writes_state(int token) const { return number[token] == number[kChunk - 1]; }
  MF_DEVICE bool state_survives() const { return number[kChunk - 1] == 0; }
  // Whether row (a|r) sees column (b|k) of the [32, 32] pairs.
  MF_DEVICE bool sees(int row, int column) const {
    const int i = row % kChunk, j = column % kChunk;
    return (row < kChunk ? j < i : j <= i) && number[i] == number[j];
  }
};

// Starts copying the chunk's 16 rows of one head; rows past the end become zeros, which leave the state alone.
template <class P, class Scalar>
MF_DEVICE void stage_rows(Scalar* to, const View<Scalar>& from, int first, int tokens, int batch, int head, int thread,
                          AsyncCopies& copies) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(Scalar)), kPieces = P::kN / kWidth;
  const Scalar* base = from.data + batch * from.batch + head * from.head;
  for (int piece = thread; piece < kChunk * kPieces; piece += P::kThreads) {
    const int row = piece / kPieces, column = piece % kPieces * kWidth;
    const bool valid = first + row < tokens;
    const std::int64_t token = valid ? first + row : 0;
    copies.copy16(to + row * P::kN + column, base + token * from.token + column, valid);
  }
}

template <class P, class Scalar>
MF_DEVICE void stage_inputs(Stage<Scalar, P::kN>& stage, const Inputs<Scalar>& in, int chunk, int batch, int head,
                            int thread, AsyncCopies& copies) {
  const int first = chunk * kChunk;
  stage_rows<P>(stage.r, in.r, first, in.tokens, batch, head, thread, copies);
  stage_rows<P>(stage.log_w, in.log_w, first, in.tokens, batch, head, thread, copies);
  stage_rows<P>(stage.k, in.k, first, in.tokens, batch, head, thread, copies);
  stage_rows<P>(stage.v, in.v, first, in.tokens, batch, head, thread, copies);
  stage_rows<P>(stage.a, in.a, first, in.tokens, batch, head, thread, copies);
  stage_rows<P>(stage.b, in.b, first, in.tokens, batch, head, thread, copies);
}

// Whether a document starts at the token of `thread` in the chunk; threads from 16 on have none.
template <class Scalar>
MF_DEVICE int document_starts(const Inputs<Scalar>& in, int chunk, int batch, int thread) {
  const int token = chunk * kChunk + thread;
  if (in.document_start == nullptr || thread >= kChunk || token >= in.tokens) return 0;
  return in.document_start[static_cast<std::int64_t>(token) * in.batch + batch] != 0;
}

template <class Scalar, int kN>
MF_DEVICE void number_documents(Documents& documents, const Stage<Scalar, kN>& stage, int thread) {
  if (thread >= kChunk) return;
  int number = 0;
  for (int i = 0; i <= thread; ++i) number += stage.starts[i];
  documents.number[thread] = number;
}

// left, right, u|v's lower half, as products read them, and the decay of the whole chunk; with `through` not null also g
// [16, pitch]. v in bf16 is as it must be.
template <class P, int kUvPitch, class Scalar>
MF_DEVICE void prepare(const Stage<Scalar, P::kN>& stage, float* left, float* right, float* uv, float* total,
                       float* through, int thread) {
  constexpr Precision kPrecision = PrecisionOf<Scalar>::value;
  constexpr int kN = P::kN;
  const int column = thread % kN, part = thread / kN;
  float sum = 0.0f;
  MF_UNROLL
  for (int t = 0; t < kChunk; ++t) {
    const float before = sum;
    const int at = t * kN + column;
    sum += stage.log_w[at];
    if (t / P::kPartTokens != part) continue;
    const float decay = expf(sum), growth = expf(-sum);
    const int upper = t * P::kPitch + column, lower = (kChunk + t) * P::kPitch + column;
    left[upper] = stored<kPrecision>(to_float(stage.a[at]) * expf(before));
    left[lower] = stored<kPrecision>(to_float(stage.r[at]) * decay);
    right[upper] = stored<kPrecision>(to_float(stage.b[at]) * growth);
    right[lower] = stored<kPrecision>(to_float(stage.k[at]) * growth);
    uv[(kChunk + t) * kUvPitch + column] = to_float(stage.v[at]);
    if (through != nullptr) through[upper] = sum;
  }
  if (part == 0) total[column] = expf(sum);
}

// The first kRows rows of to [32, 32] = left right^T over all channels where a row sees a column, else zero. left,
// right: [32, N].
template <Precision kPrecision, class P, int kRows = 2 * kChunk>
MF_DEVICE void masked_pairs(float* to, const float* left, const float* right, const Documents& documents, int thread) {
  const int lane = thread % 32;
  for (int tile = thread / 32; tile < kRows / 4; tile += P::kWarps) {
    const int row = 16 * (tile / 4), column = 8 * (tile % 4);
    Tiles<1> sums;
    sums.clear();
    multiply<kPrecision, P::kN>(
        sums, lane, [&](int i, int k) { return read<kPrecision>(left[(row + i) * P::kPitch + k]); },
        [&](int k, int j) { return read<kPrecision>(right[(column + j) * P::kPitch + k]); });
    sums.each(lane, [&](float sum, int i, int j) {
        to[(row + i) * kPairsPitch + column + j] = documents.sees(row + i, column + j) ? sum : 0.0f;
    });
  }
}

// x = (I - pairs_ab)^-1 x for one column of x [16, pitch], in place, as products read it.
template <Precision kPrecision, int kPitch>
MF_DEVICE void solve(float* x, const float* pairs, int column) {
  float value[kChunk];
  MF_UNROLL
  for (int t = 0; t < kChunk; ++t) value[t] = x[t * kPitch + column];
  MF_UNROLL
  for (int s = 0; s < kChunk; ++s) {
    MF_UNROLL
    for (int t = s + 1; t < kChunk; ++t) value[t] += pairs[t * kPairsPitch + s] * value[s];
  }
  MF_UNROLL
  for (int t = 0; t < kChunk; ++t) x[t * kPitch + column] = stored<kPrecision>(value[t]);
}

// x = (I - pairs_ab^T)^-1 x for one column.
template <Precision kPrecision, int kPitch>
MF_DEVICE void solve_transposed(float* x, const float* pairs, int column) {
  float value[kChunk];
  MF_UNROLL
  for (int t = 0; t < kChunk; ++t) value[t] = x[t * kPitch + column];
  MF_UNROLL
  for (int s = kChunk - 1; s >= 0; --s) {
    MF_UNROLL
    for (int t = 0; t < s; ++t) value[t] += pairs[s * kPairsPitch + t] * value[s];
  }
  MF_UNROLL
  for (int t = 0; t < kChunk; ++t) x[t * kPitch + column] = stored<kPrecision>(value[t]);
}

// Reads the key channels of a thread's warp, of all value channels, from a state [N, N]; zero where it is null.
template <class P, class From>
MF_DEVICE void load_state(typename P::State& state, const From* from, int thread) {
  state.clear();
  if (from == nullptr) return;
  const int first_column = P::first_column(thread);
  state.each(thread % 32, [&](float& cell, int value, int key) {
      cell = to_float(from[value * P::kN + first_column + key]);
  });
}

// Writes them to shared memory, as products of a precision read them.
template <Precision kPrecision, class P>
MF_DEVICE void share_state(float* to, const typename P::State& state, int thread) {
  const int first_column = P::first_column(thread);
  state.each_pair(thread % 32, [&](float cell, float next, int value, int key) {
      store_pair(to + value * P::kPitch + first_column + key, stored<kPrecision>(cell), stored<kPrecision>(next));
  });
}

// Writes them to rows of `pitch` numbers.
template <class P, class To>
MF_DEVICE void store_state(To* to, int pitch, const typename P::State& state, int thread) {
  const int first_column = P::first_column(thread);
  state.each_pair(thread % 32, [&](float cell, float next, int value, int key) {
      store_pair(to + value * pitch + first_column + key, cell, next);
  });
}

// Where token `token` of a contiguous [s, b, H, N] output has its channels of this head.
template <int kN, class Scalar, class In>
MF_DEVICE Scalar* output_row(Scalar* data, const In& in, int token, int batch, int head) {
  return data + ((static_cast<std::int64_t>(token) * in.batch + batch) * in.heads + head) * kN;
}

}  // namespace megaforge::wkv7
