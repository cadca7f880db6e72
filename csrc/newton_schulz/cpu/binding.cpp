// The CPU implementation of megaforge::newton_schulz; megaforge/kernels/newton_schulz/native.py defines it.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <Python.h>
#include <torch/library.h>

#include <vector>

#include "newton_schulz.h"

namespace megaforge::newton_schulz {
namespace {

using at::Tensor;

std::vector<Step> steps_of(at::ArrayRef<double> coefficients) {
  TORCH_CHECK(!coefficients.empty() && coefficients.size() % 3 == 0,
              "megaforge::newton_schulz: three coefficients a step, not ", coefficients.size());
  std::vector<Step> steps;
  for (std::size_t i = 0; i < coefficients.size(); i += 3) {
    steps.push_back({static_cast<float>(coefficients[i]), static_cast<float>(coefficients[i + 1]),
                     static_cast<float>(coefficients[i + 2])});
  }
  return steps;
}

Tensor orthogonalize(const Tensor& x_any, at::ArrayRef<double> coefficients, bool gram, bool narrow, double eps) {
  TORCH_CHECK(x_any.dim() == 3 && x_any.scalar_type() == at::kFloat && x_any.size(1) <= x_any.size(2),
              "megaforge::newton_schulz: takes float32 [b, m, n] with m <= n, not ", x_any.scalar_type(), " ",
              x_any.sizes());
  const std::vector<Step> steps = steps_of(coefficients);
  const Tensor x = x_any.contiguous();
  Tensor out = at::empty_like(x);
  if (x.numel() == 0) return out;
  const Way way = gram ? (narrow ? Way::gram_split : Way::gram_f32) : narrow ? Way::standard_bf16 : Way::standard_f32;
  newton_schulz({x.size(0), x.size(1), x.size(2), steps, way, eps}, x.const_data_ptr<float>(),
                out.mutable_data_ptr<float>(), at::get_num_threads());
  return out;
}

Tensor polynomial(const Tensor& gram_any, at::ArrayRef<double> coefficients) {
  TORCH_CHECK(gram_any.dim() == 3 && gram_any.scalar_type() == at::kFloat && gram_any.size(1) == gram_any.size(2),
              "megaforge::newton_schulz_gram: takes float32 [b, m, m], not ", gram_any.scalar_type(), " ",
              gram_any.sizes());
  const std::vector<Step> steps = steps_of(coefficients);
  const Tensor gram = gram_any.contiguous();
  Tensor out = at::empty_like(gram);
  if (gram.numel() == 0) return out;
  gram_polynomial(gram.size(0), gram.size(1), steps, gram.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
                  at::get_num_threads());
  return out;
}

TORCH_LIBRARY_IMPL(megaforge, CPU, library) {
  library.impl("newton_schulz", &orthogonalize);
  library.impl("newton_schulz_gram", &polynomial);
}

}  // namespace
}  // namespace megaforge::newton_schulz

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__newton_schulz_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_newton_schulz_cpu", nullptr, -1, nullptr, nullptr, nullptr,
                               nullptr, nullptr};
  return PyModule_Create(&module);
}
