// The CUDA implementation of megaforge::newton_schulz_steps; megaforge/kernels/newton_schulz/cuda.py defines it.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <Python.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "launch.h"
#include "steps.h"

namespace megaforge::newton_schulz {
namespace {

using at::Tensor;

constexpr std::int64_t kLongest = 1 << 20;  // rows or columns: tiles are counted in 32 bits

Bf16* data(const Tensor& x) { return static_cast<Bf16*>(x.mutable_data_ptr()); }

Tensor newton_schulz_steps(const Tensor& x_any, at::ArrayRef<double> coefficients, bool wgmma) {
  const c10::cuda::CUDAGuard guard(x_any.device());
  TORCH_CHECK(x_any.dim() == 3 && x_any.scalar_type() == at::kBFloat16,
              "megaforge::newton_schulz_steps: takes bfloat16 [b, m, n], not ", x_any.scalar_type(), x_any.sizes());
  TORCH_CHECK(coefficients.size() % 3 == 0, "megaforge::newton_schulz_steps: three coefficients a step, not ",
              coefficients.size());
  const std::int64_t batch = x_any.size(0), rows = x_any.size(1), columns = x_any.size(2);
  TORCH_CHECK(rows % 8 == 0 && columns % 8 == 0 && rows < kLongest && columns < kLongest,
              "megaforge::newton_schulz_steps: sides must be multiples of 8 below 2^20, got ", x_any.sizes());
  std::vector<Step> steps;
  for (std::size_t i = 0; i < coefficients.size(); i += 3) {
    steps.push_back({static_cast<float>(coefficients[i]), static_cast<float>(coefficients[i + 1]),
                     static_cast<float>(coefficients[i + 2])});
  }
  if (steps.empty() || x_any.numel() == 0) return x_any.clone(at::MemoryFormat::Contiguous);
  TORCH_CHECK(!wgmma || has_wgmma(), "megaforge::newton_schulz_steps: no code with wgmma for this GPU (sm_90a)");

  // Tall matrices are iterated as their transposes; both are needed in any case, and one of them may be there already.
  const bool tall = rows > columns;
  const auto rows_aligned = [](const Tensor& any) {
    const Tensor whole = any.contiguous();
    return reinterpret_cast<std::uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : whole.clone();
  };
  const Tensor x = rows_aligned(x_any), turned = rows_aligned(x_any.transpose(1, 2));
  const Matrices from = tall ? Matrices{data(turned), data(x)} : Matrices{data(x), data(turned)};
  const std::int64_t m = tall ? columns : rows, n = tall ? rows : columns;
  TORCH_CHECK(batch * ((m + 127) / 128) * ((n + 127) / 128) <= std::numeric_limits<int>::max(),
              "megaforge::newton_schulz_steps: too many matrices: ", x_any.sizes());
  std::vector<Tensor> straight, transposed;
  Workspace work{};
  for (std::size_t i = 0; i < 2 && i < steps.size(); ++i) {
    straight.push_back(at::empty({batch, m, n}, x.options()));
    transposed.push_back(at::empty({batch, n, m}, x.options()));
    work.results[i] = {data(straight[i]), data(transposed[i])};
  }
  const Tensor gram = at::empty({batch, m, m}, x.options()), polynomial = at::empty_like(gram);
  work.gram = data(gram), work.polynomial = data(polynomial);
  void* const stream = c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
  iterate(static_cast<int>(batch), static_cast<int>(m), static_cast<int>(n), from, work, steps, tall,
          [&](const Product& product) {
            const char* const error = multiply(product, wgmma, stream);
            TORCH_CHECK(error == nullptr, "megaforge::newton_schulz_steps: ", error);
          });
  const std::size_t last = (steps.size() - 1) % 2;
  return tall ? transposed[last] : straight[last];
}

TORCH_LIBRARY_IMPL(megaforge, CUDA, library) { library.impl("newton_schulz_steps", &newton_schulz_steps); }

PyObject* wgmma_here(PyObject* /*module*/, PyObject* /*none*/) { return PyBool_FromLong(has_wgmma() ? 1 : 0); }

}  // namespace
}  // namespace megaforge::newton_schulz

// Importing the module registers the operator.
PyMODINIT_FUNC PyInit__newton_schulz_cuda() {
  static PyMethodDef methods[] = {
    {"has_wgmma", &megaforge::newton_schulz::wgmma_here, METH_NOARGS, "Whether the current GPU has code with wgmma."},
    {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_newton_schulz_cuda", nullptr, -1, methods, nullptr, nullptr,
                               nullptr, nullptr};
  return PyModule_Create(&module);
}
