// What a layer does with each token between its products, on CPUs: what its implementations take and do. No torch here.
//
// All arrays are contiguous rows; T is float or Bf16, and arithmetic is fp32.
#pragma once

#include <cstdint>

#include "common/bf16.h"

namespace megaforge::pointwise {

// out = norm(x) weight + bias; of x + update, which `sum` takes in rounded, where there is an update. Centered is layer
// norm, otherwise it is the root-mean-square norm.
template <class T>
struct Norm {
  std::int64_t rows, width;
  const T* x;
  const T* update;      // or null
  const float* weight;  // [width]
  const float* bias;    // [width] or null
  float epsilon;
  bool centered;
  T* out;
  T* sum;        // null without an update
  float* mean;   // [rows], null unless centered
  float* scale;  // [rows]: one over the deviation
};

template <class T>
struct NormBackward {
  std::int64_t rows, width;
  const T* grad;
  const T* grad_sum;  // of what was normed, by other ways; or null
  const T* x;         // what was normed
  const float* weight;
  const float* mean;
  const float* scale;
  bool centered;
  T* dx;
};

enum class Gate : std::int64_t { silu, squared_relu };

// out [rows, width] = gate(x), gated times the other half of x [rows, 2 width], times the row's weight where rows have
// one; and its gradients.
template <class T>
struct Activation {
  std::int64_t rows, width;
  Gate gate;
  bool gated;
  const T* x;
  const float* weights;  // [rows] or null
  const T* grad;         // null in the forward pass
  T* out;                // like x in the backward pass
  float* dweights;       // [rows], null in the forward pass and without weights
};

// Rows of logits of which the first `columns` take part; a target that is not among them is held elsewhere.
struct Labels {
  std::int64_t rows, width, columns;
  const std::int64_t* target;
};

template <class T>
struct Kernels {
  void (*norm)(const Norm<T>&, std::int64_t begin, std::int64_t end);
  // Adds to dweight and dbias [width]; dbias may be null unless centered.
  void (*norm_backward)(const NormBackward<T>&, std::int64_t begin, std::int64_t end, float* dweight, float* dbias);
  void (*squared_relu)(std::int64_t count, const T* x, T* out);
  void (*squared_relu_backward)(std::int64_t count, const T* grad, const T* x, T* out);
  // Of squared ReLU, or gated.
  void (*activation)(const Activation<T>&, std::int64_t begin, std::int64_t end);
  void (*activation_backward)(const Activation<T>&, std::int64_t begin, std::int64_t end);
  // peak, total [rows]: of each row the largest logit and the sum of exp(logit - peak); picked: the target's logit, or 0.
  void (*label_scores)(const Labels&, const T* logits, std::int64_t begin, std::int64_t end, float* peak, float* total,
                       float* picked);
  // logits become exp(logit - base) share, less weight in the target's column, and 0 where they take no part.
  void (*label_gradients)(const Labels&, T* logits, std::int64_t begin, std::int64_t end, const float* base,
                          const float* share, const float* weight);
};

struct AllKernels {
  Kernels<float> f32;
  Kernels<Bf16> bf16;
};

extern const AllKernels scalar_kernels;
extern const AllKernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;

// What this CPU, or MEGAFORGE_CPU_ISA, has.
const AllKernels& choose();

// On at most `threads` threads; no result depends on their number.
template <class T>
void norm(const Kernels<T>& kernels, const Norm<T>& args, int threads);
// dweight and dbias [width]; dbias null unless centered.
template <class T>
void norm_backward(const Kernels<T>& kernels, const NormBackward<T>& args, float* dweight, float* dbias, int threads);
template <class T>
void squared_relu(const Kernels<T>& kernels, std::int64_t count, const T* x, T* out, int threads);
template <class T>
void squared_relu_backward(const Kernels<T>& kernels, std::int64_t count, const T* grad, const T* x, T* out, int threads);
template <class T>
void activation(const Kernels<T>& kernels, const Activation<T>& args, int threads);
template <class T>
void label_scores(const Kernels<T>& kernels, const Labels& args, const T* logits, float* peak, float* total,
                  float* picked, int threads);
template <class T>
void label_gradients(const Kernels<T>& kernels, const Labels& args, T* logits, const float* base, const float* share,
                     const float* weight, int threads);

}  // namespace megaforge::pointwise
