// The CPU implementation of megaforge::gemv; megaforge/kernels/gemv/native.py defines it.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <torch/library.h>

#include <optional>

#include "gemv.h"

namespace megaforge::gemv {
namespace {

using at::Tensor;

template <class T>
void compute(const Tensor& x, const Tensor& weight, const Tensor& bias, bool turned, Tensor& y) {
  run({x.size(0), weight.size(0), x.size(1), static_cast<const T*>(x.const_data_ptr()),
       static_cast<const T*>(weight.const_data_ptr()), weight.stride(turned ? 1 : 0), turned,
       bias.defined() ? static_cast<const T*>(bias.const_data_ptr()) : nullptr, static_cast<T*>(y.mutable_data_ptr())},
      at::get_num_threads());
}

Tensor product(const Tensor& x_any, const Tensor& weight_any, const std::optional<Tensor>& bias_any) {
  const auto type = x_any.scalar_type();
  TORCH_CHECK(x_any.dim() == 2 && weight_any.dim() == 2 && x_any.size(1) == weight_any.size(1),
              "megaforge::gemv: takes [m, k] and [n, k], not ", x_any.sizes(), " and ", weight_any.sizes());
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && weight_any.scalar_type() == type,
              "megaforge::gemv: takes float32 or bfloat16, both alike, not ", type, " and ", weight_any.scalar_type());
  const Tensor x = x_any.contiguous();
  const bool turned = weight_any.stride(0) == 1 && weight_any.stride(1) != 1;
  const Tensor weight = turned || weight_any.stride(1) == 1 ? weight_any : weight_any.contiguous();
  Tensor bias;
  if (bias_any.has_value()) {
    TORCH_CHECK(bias_any->dim() == 1 && bias_any->size(0) == weight.size(0) && bias_any->scalar_type() == type,
                "megaforge::gemv: the bias is [n] of the same type, not ", bias_any->scalar_type(), " ",
                bias_any->sizes());
    bias = bias_any->contiguous();
  }
  Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  if (y.numel() == 0) return y;
  if (type == at::kFloat) compute<float>(x, weight, bias, turned, y);
  else compute<Bf16>(x, weight, bias, turned, y);
  return y;
}

TORCH_LIBRARY_IMPL(megaforge, CPU, library) { library.impl("gemv", &product); }

}  // namespace
}  // namespace megaforge::gemv

// Importing the module registers the operator; it has no functions of its own.
PyMODINIT_FUNC PyInit__gemv_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_gemv_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
