// One more token of each of a few sequences through a block of the model: a mixer, then an FFN, each behind its norm.
#pragma once

#include <cstdint>

#include "bitgemm/cpu/bitgemm.h"
#include "common/bf16.h"

namespace megaforge::decode {

constexpr int kMostTokens = 8;  // one of each sequence

// [n, k]: n rows of k, `stride` elements apart, or, turned, k rows of n; or packed codes, which take tokens of 8 bits.
template <class T>
struct Matrix {
  std::int64_t n = 0, k = 0, stride = 0;
  const T* data = nullptr;
  bool turned = false;
  const T* bias = nullptr;  // [n]
  const bitgemm::Matrix* packed = nullptr;
};

// Root-mean-square norm, or with a bias layer norm; without a weight there is none.
struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  float epsilon = 0;
};

// The time mix of RWKV-7. Low-rank maps are in the order decay, rate, gate, value; in the model's first block, which
// makes v_first for the others, the last is missing.
template <class T>
struct TimeMix {
  static constexpr int kMixes = 6, kMaps = 4;
  Norm norm;
  const float* mix[kMixes];  // r, w, k, v, a, g: each [hidden]
  Matrix<T> receptance, key, value, output, first[kMaps], second[kMaps];
  const float *w0, *a0, *v0, *k_k, *k_a, *r_k;  // each [heads * size]
  Norm head_norm;                               // layer norm of each head; its vectors are over all heads
  std::int64_t heads, size;
  bool makes_v_first;
  float* v_first;  // [tokens, heads * size]
  T* shift;        // [tokens, hidden]
  float* wkv;      // [tokens, heads, size (value), size (key)]

  std::int64_t channels() const { return heads * size; }
  int maps() const { return makes_v_first ? kMaps - 1 : kMaps; }
};

// Causal attention to a cache, which takes the tokens in at `place`.
template <class T>
struct Attention {
  Norm norm;
  Matrix<T> qkv, output;
  Norm query_norm, key_norm, sub_norm;
  std::int64_t heads, groups, width;
  std::int64_t pairs;            // channels that rotate, by two
  bool interleaved;              // pairs lie together, and come out apart
  const float *cosine, *sine;    // [tokens, pairs]
  T *keys, *values;              // [tokens, groups, capacity, width]
  std::int64_t capacity, place;
  const std::int64_t* unused;    // [tokens], places at the beginning that hold no token; null: none
};

enum class Activation { squared_relu, gated_squared_relu, swiglu, gelu, gelu_exact };

constexpr bool is_gated(Activation kind) { return kind == Activation::gated_squared_relu || kind == Activation::swiglu; }

// A norm and the mix with the token before, where there is one: what goes in front of an FFN.
template <class T>
struct Entry {
  Norm norm;
  const float* mix = nullptr;  // [hidden]; null: none
  T* shift = nullptr;          // [tokens, hidden]
};

template <class T>
struct FFN {
  Entry<T> entry;
  Matrix<T> up, down;
  Norm sub_norm;
  Activation activation;
};

// What a router is asked: its scores, and the experts' input.
template <class T>
struct Router {
  Entry<T> entry;
  Matrix<float> scores;
  T* inside;      // [tokens, hidden]
  float* logits;  // [tokens, experts]
};

template <class T>
struct Block {
  std::int64_t tokens, hidden;
  float* x;  // [tokens, hidden], the residual stream
  const TimeMix<T>* time_mix = nullptr;
  const Attention<T>* attention = nullptr;
  const FFN<T>* ffn = nullptr;
  const Router<T>* router = nullptr;
};

// An expert and the tokens that come to it.
template <class T>
struct Expert {
  Matrix<T> up, down;
  Norm sub_norm;
  std::int64_t count;
  std::int64_t token[kMostTokens];
  float weight[kMostTokens];
};

template <class T>
struct Experts {
  std::int64_t tokens, hidden;
  float* x;         // [tokens, hidden], the residual stream
  const T* inside;  // [tokens, hidden]
  Activation activation;
  const Expert<T>* experts;
  std::int64_t count;
};

template <class T>
struct Head {
  std::int64_t tokens, hidden;
  const float* x;  // [tokens, hidden]
  Norm norm;
  Matrix<T> matrix;
  T* logits;  // [tokens, n]
};

// Sums are fp32. On at most `threads` threads; no result depends on their number.
void run(const Block<float>& block, int threads);
void run(const Block<Bf16>& block, int threads);
void run(const Experts<float>& experts, int threads);
void run(const Experts<Bf16>& experts, int threads);
void run(const Head<float>& head, int threads);
void run(const Head<Bf16>& head, int threads);

// Of the threads that work together: which one this is, its own memory, and what all see.
struct Team {
  int thread, threads;
  char *own, *shared;
};

// What each thread does; what an instruction set implements.
template <class T>
struct KernelsOf {
  void (*block)(const Block<T>&, Team);
  void (*experts)(const Experts<T>&, Team);
  void (*head)(const Head<T>&, Team);
};

struct Kernels {
  KernelsOf<float> f32;
  KernelsOf<Bf16> bf16;
};

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;

}  // namespace megaforge::decode
