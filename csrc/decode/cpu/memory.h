// Where intermediate values lie: made the same way to count bytes (from address 0) and to use them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "decode.h"

namespace megaforge::decode {

class Take {
 public:
  explicit Take(char* start = nullptr) : at_(reinterpret_cast<std::uintptr_t>(start)) {}
  template <class U>
  U* many(std::int64_t count) {
    const std::uintptr_t here = at_;
    at_ += (static_cast<std::uintptr_t>(count) * sizeof(U) + 63) / 64 * 64;
    return reinterpret_cast<U*>(here);
  }
  std::int64_t bytes() const { return static_cast<std::int64_t>(at_); }

 private:
  std::uintptr_t at_;
};

template <class T>
struct TimeMixMemory {
  // Shared: products [tokens, ...].
  float *r, *k, *v, *inner[TimeMix<T>::kMaps], *outer[TimeMix<T>::kMaps], *out;
  T* gated;
  // Each thread's own.
  T *normed, *mixed[TimeMix<T>::kMixes], *maps[TimeMix<T>::kMaps];
  float* head;  // [8, size]

  TimeMixMemory(const Block<T>& block, const TimeMix<T>& layer, Take& shared, Take& own) {
    const std::int64_t tokens = block.tokens, wide = tokens * layer.channels(), whole = tokens * block.hidden;
    for (float** each : {&r, &k, &v}) *each = shared.many<float>(wide);
    for (int i = 0; i < layer.maps(); ++i) {
      inner[i] = shared.many<float>(tokens * layer.first[i].n);
      outer[i] = shared.many<float>(wide);
      maps[i] = own.many<T>(tokens * layer.first[i].n);
    }
    gated = shared.many<T>(wide);
    out = shared.many<float>(whole);
    normed = own.many<T>(whole);
    for (T*& each : mixed) each = own.many<T>(whole);
    head = own.many<float>(8 * layer.size);
  }
};

template <class T>
struct AttentionMemory {
  float *fused, *out;
  T *context, *normed;
  float *queries, *sums, *scores;  // own: [heads of a group, width] twice, [kept scores]

  AttentionMemory(const Block<T>& block, const Attention<T>& layer, Take& shared, Take& own) {
    const std::int64_t queries_wide = layer.heads * layer.width, group = layer.heads / layer.groups;
    fused = shared.many<float>(block.tokens * layer.qkv.n);
    context = shared.many<T>(block.tokens * queries_wide);
    out = shared.many<float>(block.tokens * block.hidden);
    normed = own.many<T>(block.tokens * std::max(block.hidden, queries_wide));
    queries = own.many<float>(group * layer.width);
    sums = own.many<float>(std::max(group, std::int64_t{2}) * layer.width);
    scores = own.many<float>(group * (layer.place + 1));
  }
};

template <class T>
struct FFNMemory {
  float *up, *out;
  T *inner, *normed, *mixed, *own_inner;

  FFNMemory(std::int64_t tokens, std::int64_t hidden, const Matrix<T>& first, const Matrix<T>& second, Take& shared,
            Take& own) {
    up = shared.many<float>(tokens * first.n);
    inner = shared.many<T>(tokens * second.k);
    out = shared.many<float>(tokens * hidden);
    normed = own.many<T>(tokens * hidden);
    mixed = own.many<T>(tokens * hidden);
    own_inner = own.many<T>(tokens * second.k);
  }
};

template <class T>
struct RouterMemory {
  T *normed, *mixed;
  float* wide;

  RouterMemory(const Block<T>& block, Take& own) {
    normed = own.many<T>(block.tokens * block.hidden);
    mixed = own.many<T>(block.tokens * block.hidden);
    wide = own.many<float>(block.tokens * block.hidden);
  }
};

struct Sizes {
  std::int64_t shared, own;
};

template <class T>
Sizes sizes(const Block<T>& block) {
  Take shared, own;
  if (block.time_mix != nullptr) TimeMixMemory<T>(block, *block.time_mix, shared, own);
  if (block.attention != nullptr) AttentionMemory<T>(block, *block.attention, shared, own);
  if (block.ffn != nullptr) FFNMemory<T>(block.tokens, block.hidden, block.ffn->up, block.ffn->down, shared, own);
  if (block.router != nullptr) RouterMemory<T>(block, own);
  return {shared.bytes(), own.bytes()};
}

template <class T>
Sizes sizes(const Experts<T>& experts) {
  Take shared, own;
  for (std::int64_t e = 0; e < experts.count; ++e) {
    const Expert<T>& expert = experts.experts[e];
    FFNMemory<T>(expert.count, experts.hidden, expert.up, expert.down, shared, own);
  }
  return {shared.bytes(), own.bytes()};
}

template <class T>
Sizes sizes(const Head<T>& head) {
  return {0, Take().bytes() + (head.tokens * head.hidden * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64};
}

}  // namespace megaforge::decode
