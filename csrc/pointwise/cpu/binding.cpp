// The CPU implementations of megaforge::norm, squared_relu, gated, label_scores and of their gradients;
// megaforge/kernels/pointwise/native.py and megaforge/kernels/cross_entropy/native.py define the operators.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <Python.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "pointwise.h"

namespace megaforge::pointwise {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// body(T{}, kernels of T) for the type of x.
template <class Body>
auto for_type(const char* name, const Tensor& x, Body body) {
  if (x.scalar_type() == at::kFloat) return body(float{}, choose().f32);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "megaforge::", name, ": ", x.scalar_type(),
              " is not supported on CPUs; use float32 or bfloat16");
  return body(Bf16{}, choose().bf16);
}

template <class T>
const T* read(const Tensor& x) {
  return x.defined() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
}

template <class T>
T* write(const Tensor& x) {
  return x.numel() == 0 ? nullptr : static_cast<T*>(x.mutable_data_ptr());
}

// Undefined where there is none.
Tensor like(const char* name, const Maybe& other, const Tensor& x) {
  if (!other) return {};
  TORCH_CHECK(other->sizes() == x.sizes() && other->scalar_type() == x.scalar_type(), "megaforge::", name, ": ",
              other->scalar_type(), " ", other->sizes(), " beside ", x.scalar_type(), " ", x.sizes());
  return other->contiguous();
}

Tensor vector(const char* name, const Tensor& weight, int64_t width) {
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == width && weight.scalar_type() == at::kFloat, "megaforge::", name,
              ": expected float32 [", width, "], got ", weight.scalar_type(), " ", weight.sizes());
  return weight.contiguous();
}

int64_t width_of(const char* name, const Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "megaforge::", name, ": no last dimension in ", x.sizes());
  return x.size(-1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor& x_any, const Maybe& update_any, const Tensor& weight_any,
                                                        const Maybe& bias_any, double epsilon, bool centered) {
  const int64_t width = width_of("norm", x_any), rows = x_any.numel() / width;
  const Tensor x = x_any.contiguous(), weight = vector("norm", weight_any, width);
  const Tensor update = like("norm", update_any, x), bias = bias_any ? vector("norm", *bias_any, width) : Tensor();
  const auto numbers = x.options().dtype(at::kFloat);
  const Tensor out = at::empty(x.sizes(), x.options()), sum = at::empty(update.defined() ? x.sizes() : at::IntArrayRef({0}), x.options());
  const Tensor scale = at::empty({rows}, numbers), mean = at::empty({centered ? rows : 0}, numbers);
  for_type("norm", x, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    norm(kernels, Norm<T>{rows, width, read<T>(x), read<T>(update), read<float>(weight),
                          read<float>(bias), static_cast<float>(epsilon), centered, write<T>(out),
                          write<T>(sum), write<float>(mean), write<float>(scale)},
         at::get_num_threads());
  });
  return {out, sum, mean, scale};
}

std::tuple<Tensor, Tensor, Tensor> norm_gradients(const Tensor& grad_any, const Maybe& grad_sum_any, const Tensor& x_any,
                                                  const Tensor& weight_any, const Tensor& mean, const Tensor& scale,
                                                  bool centered) {
  const int64_t width = width_of("norm_backward", x_any), rows = x_any.numel() / width;
  const Tensor x = x_any.contiguous(), weight = vector("norm_backward", weight_any, width);
  const Tensor grad = like("norm_backward", grad_any, x), grad_sum = like("norm_backward", grad_sum_any, x);
  const Tensor scales = vector("norm_backward", scale, rows), means = vector("norm_backward", mean, centered ? rows : 0);
  const Tensor dx = at::empty(x.sizes(), x.options()), dweight = at::empty_like(weight);
  const Tensor dbias = at::empty({centered ? width : 0}, weight.options());
  for_type("norm_backward", x, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    norm_backward(kernels,
                  NormBackward<T>{rows, width, read<T>(grad), read<T>(grad_sum), read<T>(x),
                                  read<float>(weight), read<float>(means), read<float>(scales), centered, write<T>(dx)},
                  write<float>(dweight), write<float>(dbias), at::get_num_threads());
  });
  return {dx, dweight, dbias};
}

Tensor relu2(const Tensor& x_any) {
  const Tensor x = x_any.contiguous(), out = at::empty(x.sizes(), x.options());
  for_type("squared_relu", x, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    squared_relu(kernels, x.numel(), read<T>(x), write<T>(out), at::get_num_threads());
  });
  return out;
}

Tensor relu2_backward(const Tensor& grad_any, const Tensor& x_any) {
  const Tensor x = x_any.contiguous(), grad = like("squared_relu_backward", grad_any, x), out = at::empty(x.sizes(), x.options());
  for_type("squared_relu_backward", x, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    squared_relu_backward(kernels, x.numel(), read<T>(grad), read<T>(x), write<T>(out), at::get_num_threads());
  });
  return out;
}

Tensor run_gated(const char* name, const Tensor& x_any, const Maybe& grad_any, int64_t gate) {
  const int64_t whole = width_of(name, x_any), width = whole / 2, rows = x_any.numel() / whole;
  TORCH_CHECK(whole % 2 == 0 && (gate == 0 || gate == 1), "megaforge::", name, ": ", whole, " features, gate ", gate);
  const Tensor x = x_any.contiguous();
  std::vector<int64_t> half = x.sizes().vec();
  half.back() = width;
  Tensor grad, out;
  if (grad_any) {
    TORCH_CHECK(grad_any->sizes() == at::IntArrayRef(half) && grad_any->scalar_type() == x.scalar_type(), "megaforge::", name,
                ": a gradient ", grad_any->scalar_type(), " ", grad_any->sizes(), " for ", x.scalar_type(), " ", x.sizes());
    grad = grad_any->contiguous();
    out = at::empty(x.sizes(), x.options());
  } else {
    out = at::empty(half, x.options());
  }
  for_type(name, x, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    activation(kernels,
               Activation<T>{rows, width, static_cast<Gate>(gate), true, read<T>(x), nullptr, read<T>(grad), write<T>(out),
                             nullptr},
               at::get_num_threads());
  });
  return out;
}

Tensor gated_forward(const Tensor& x, int64_t gate) { return run_gated("gated", x, std::nullopt, gate); }

Tensor gated_gradient(const Tensor& grad, const Tensor& x, int64_t gate) { return run_gated("gated_backward", x, grad, gate); }

// What a weighted activation of x has: rows, the width of its result, and whether it is one that there is.
Activation<char> weighted_shape(const char* name, const Tensor& x, int64_t gate, bool gated) {
  const int64_t whole = width_of(name, x);
  TORCH_CHECK(x.dim() == 2 && (gate == 1 || (gate == 0 && gated)) && !(gated && whole % 2), "megaforge::", name,
              ": x ", x.sizes(), ", gate ", gate, gated ? ", gated" : "");
  return {x.size(0), gated ? whole / 2 : whole, static_cast<Gate>(gate), gated, nullptr, nullptr, nullptr, nullptr, nullptr};
}

Tensor weighted_forward(const Tensor& x_any, const Tensor& weights_any, int64_t gate, bool is_gated) {
  const auto shape = weighted_shape("weighted", x_any, gate, is_gated);
  const Tensor x = x_any.contiguous(), weights = vector("weighted", weights_any, shape.rows);
  const Tensor out = at::empty({shape.rows, shape.width}, x.options());
  for_type("weighted", x, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    activation(kernels,
               Activation<T>{shape.rows, shape.width, shape.gate, is_gated, read<T>(x), read<float>(weights), nullptr,
                             write<T>(out), nullptr},
               at::get_num_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> weighted_gradients(const Tensor& grad_any, const Tensor& x_any, const Tensor& weights_any,
                                              int64_t gate, bool is_gated) {
  const auto shape = weighted_shape("weighted_backward", x_any, gate, is_gated);
  TORCH_CHECK(grad_any.dim() == 2 && grad_any.size(0) == shape.rows && grad_any.size(1) == shape.width &&
                  grad_any.scalar_type() == x_any.scalar_type(),
              "megaforge::weighted_backward: a gradient ", grad_any.scalar_type(), " ", grad_any.sizes(), " for ",
              x_any.scalar_type(), " ", x_any.sizes());
  const Tensor x = x_any.contiguous(), grad = grad_any.contiguous();
  const Tensor weights = vector("weighted_backward", weights_any, shape.rows);
  const Tensor dx = at::empty(x.sizes(), x.options()), dweights = at::empty_like(weights);
  for_type("weighted_backward", x, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    activation(kernels,
               Activation<T>{shape.rows, shape.width, shape.gate, is_gated, read<T>(x), read<float>(weights), read<T>(grad),
                             write<T>(dx), write<float>(dweights)},
               at::get_num_threads());
  });
  return {dx, dweights};
}

Labels labels_of(const char* name, const Tensor& logits, const Tensor& target, int64_t columns) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && target.is_contiguous() && target.scalar_type() == at::kLong &&
                  target.dim() == 1 && target.size(0) == logits.size(0) && columns >= 0 && columns <= logits.size(1),
              "megaforge::", name, ": expected contiguous logits [n, v] and int64 targets [n], got ", logits.sizes(), ", ",
              target.scalar_type(), " ", target.sizes(), ", ", columns, " columns");
  return {logits.size(0), logits.size(1), columns, read<int64_t>(target)};
}

Tensor scores(const Tensor& logits, const Tensor& target, int64_t columns) {
  const Labels labels = labels_of("label_scores", logits, target, columns);
  const Tensor out = at::empty({3, labels.rows}, logits.options().dtype(at::kFloat));
  for_type("label_scores", logits, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    float* to = write<float>(out);
    label_scores(kernels, labels, read<T>(logits), to, to + labels.rows, to + 2 * labels.rows, at::get_num_threads());
  });
  return out;
}

void gradients(const Tensor& logits, const Tensor& target, const Tensor& base_any, const Tensor& share_any,
               const Tensor& weight_any, int64_t columns) {
  const Labels labels = labels_of("label_gradients_", logits, target, columns);
  const Tensor base = vector("label_gradients_", base_any, labels.rows), share = vector("label_gradients_", share_any, labels.rows);
  const Tensor weight = vector("label_gradients_", weight_any, labels.rows);
  for_type("label_gradients_", logits, [&](auto type, const auto& kernels) {
    using T = decltype(type);
    label_gradients(kernels, labels, write<T>(logits), read<float>(base), read<float>(share), read<float>(weight),
                    at::get_num_threads());
  });
}

TORCH_LIBRARY_IMPL(megaforge, CPU, library) {
  library.impl("norm", &norm_forward);
  library.impl("norm_backward", &norm_gradients);
  library.impl("squared_relu", &relu2);
  library.impl("squared_relu_backward", &relu2_backward);
  library.impl("gated", &gated_forward);
  library.impl("gated_backward", &gated_gradient);
  library.impl("weighted", &weighted_forward);
  library.impl("weighted_backward", &weighted_gradients);
  library.impl("label_scores", &scores);
  library.impl("label_gradients_", &gradients);
}

}  // namespace
}  // namespace megaforge::pointwise

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__pointwise_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pointwise_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
