// Launches of the WKV-7 kernels, without CUDA's or torch's headers.
#pragma once

#include <cstdint>

namespace megaforge::wkv7 {

enum class Type { kFloat, kBf16 };

// [s, b, H, N] on the device: channels next to each other, data and strides (in elements) multiples of 16 bytes.
struct Tensor {
  const void* data;
  std::int64_t token, batch, head;
};

struct Problem {
  Type type;  // of r, k, v, a, b, dy and of y, dr, dk, dv, da, db; all else is fp32
  int tokens, batch, heads, channels;
  Tensor r, log_w, k, v, a, b;
  const std::uint8_t* document_start;  // [s, b] or null
  int tokens_per_state;  // kTokensPerState, or kFewTokens for fewer states, of the inputs' type
};

struct ForwardOutputs {
  void* y;
  void* states;  // fp32, or of the inputs' type; null when no backward pass will follow
  float* final_state;
};

struct BackwardOutputs {
  void *dr, *dk, *dv, *da, *db;
  float* dlog_w;
  float* dinitial_state;  // or null
};

constexpr int kTokensPerState = 16;  // a state is kept before every so many tokens, in fp32
constexpr int kFewTokens = 64;       // or before every so many, in the inputs' type; those between are computed again
constexpr int kStatesBetween = kFewTokens / kTokensPerState - 2;  // of each head, at a time

bool supports(int channels);

// Both return null, or what the CUDA runtime says of the launch. `stream` is a cudaStream_t. No tokens is an error.
const char* forward(const Problem& problem, const float* initial_state, const ForwardOutputs& to, void* stream);
// between: room for kStatesBetween states of every head where few are kept.
const char* backward(const Problem& problem, const Tensor& dy, const void* states, float* between,
                     const float* dfinal_state, const BackwardOutputs& to, void* stream);

}  // namespace megaforge::wkv7
