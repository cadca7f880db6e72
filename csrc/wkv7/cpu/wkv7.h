// WKV-7 on CPUs: what its implementations take and do. No torch here.
//
// Per head, with a state S [value, key]:
//   S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t,   w_t = exp(log_w_t)
// The state is zero before a token where a document starts.
#pragma once

#include <cstdint>

namespace megaforge::wkv7 {

enum class Type : std::uint8_t { f32, bf16, f64 };

// [s, b, H, N] with contiguous channels; strides in elements.
struct View {
  const void* data;
  Type type;
  std::int64_t stride_s, stride_b, stride_h;
};

struct Shape {
  std::int64_t s, b, h, n;
};

struct Inputs {
  Shape shape;
  View r, log_w, k, v, a, b;
  const bool* document_start;  // [s, b] or null
  std::int64_t interval;       // tokens from one saved state to the next
};

// All tensors but the inputs are contiguous. States, `removed` and arithmetic are float, or double for f64 inputs.
struct Forward {
  Inputs in;
  const void* initial_state;  // [b, H, N, N] or null
  void* y;                    // [s, b, H, N] of y_type
  Type y_type;
  void* final_state;  // [b, H, N, N]
  void* states;       // [ceil(s / interval), b, H, N, N] before tokens 0, interval, ... and before a reset there; or null
  void* removed;      // [s, b, H, N]: S_{t-1} a_t, what the token reads from the (reset) state; or null
};

struct Gradient {
  void* data;  // [s, b, H, N]
  Type type;
};

struct Backward {
  Inputs in;
  const void* states;
  const void* removed;
  View dy;                   // data null: zero
  const void* dfinal_state;  // [b, H, N, N] or null: zero
  Gradient dr, dlog_w, dk, dv, da, db;
  void* dinitial_state;  // [b, H, N, N]
};

// One instruction set's code for the heads [first, last), counted as batch * H + head. Scratch is 64-byte aligned.
struct Kernels {
  std::int64_t (*forward_scratch)(const Forward&);  // bytes
  void (*forward)(const Forward&, std::int64_t first, std::int64_t last, void* scratch);
  std::int64_t (*backward_scratch)(const Backward&);
  void (*backward)(const Backward&, std::int64_t first, std::int64_t last, void* scratch);
};

extern const Kernels scalar_f32, scalar_f64;
extern const Kernels avx2_f32, avx512_f32;

// All heads, on at most `threads` threads; a head is one thread's, so results do not depend on their number.
void forward(const Forward& args, int threads);
void backward(const Backward& args, int threads);

}  // namespace megaforge::wkv7
