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
};

struct ForwardOutputs {
  void* y;
  float* states;  // null when no backward pass will follow
  float* final_state;
};

struct BackwardOutputs {
  void *dr, *dk, *dv, *da, *db;
  float* dlog_w;
  float* dinitial_state;  // or null
};

constexpr int kTokensPerState = 16;  // a state is saved before every so many tokens

bool supports(int channels);

// Both return null, or what the CUDA runtime says of the launch. `stream` is a cudaStream_t. No tokens is an error.
const char* forward(const Problem& problem, const float* initial_state, const ForwardOutputs& to, void* stream);
const char* backward(const Problem& problem, const Tensor& dy, const float* states, const float* dfinal_state,
                     const BackwardOutputs& to, void* stream);

}  // namespace megaforge::wkv7
