// The CPU implementation of megaforge::bitgemm_*; megaforge/kernels/bitgemm/native.py defines them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <torch/library.h>

#include <optional>

#include "bitgemm.h"

namespace megaforge::bitgemm {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

Tensor prepare_rows(const Tensor& packed_any, int64_t bits, int64_t columns, int64_t groups) {
  TORCH_CHECK((bits == 1 || bits == 2 || bits == 4) && groups >= 1 && columns % groups == 0,
              "megaforge::bitgemm_prepare: ", bits, " bits, ", columns, " columns in ", groups, " groups");
  TORCH_CHECK(columns < 1 << 17, "megaforge::bitgemm_prepare: sums of ", columns, " products may not fit 32 bits");
  const Tensor packed = packed_any.contiguous();
  TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kByte && packed.size(1) == (columns * bits + 7) / 8,
              "megaforge::bitgemm_prepare: rows of ", columns, " codes of ", bits, " bits are not ",
              packed.scalar_type(), " ", packed.sizes());
  const Shape shape{static_cast<int>(bits), packed.size(0), columns, groups, prefers_words(static_cast<int>(bits))};
  Tensor panels = shape.words ? at::empty({groups, shape.group_words(), shape.panels(), kWide}, packed.options().dtype(at::kShort))
                              : at::empty({shape.panels(), groups, shape.steps(), kPanel, 4}, packed.options());
  TORCH_INTERNAL_ASSERT(static_cast<int64_t>(panels.nbytes()) == shape.bytes());
  prepare(shape, packed.const_data_ptr<std::uint8_t>(), panels.mutable_data_ptr(), at::get_num_threads());
  return panels;
}

Shape shape_of(const Tensor& panels, const Tensor& scale, int64_t rows, int64_t bits, int64_t columns) {
  const Shape shape{static_cast<int>(bits), rows, columns, scale.dim() == 2 ? scale.size(1) : 1,
                    panels.scalar_type() == at::kShort};
  TORCH_CHECK(bits == 1 || bits == 2 || bits == 4, "megaforge::bitgemm: weights of ", bits, " bits");
  TORCH_CHECK(shape.groups >= 1 && columns % shape.groups == 0 && panels.is_contiguous() &&
                  panels.dim() == (shape.words ? 4 : 5) && static_cast<int64_t>(panels.nbytes()) == shape.bytes() &&
                  (!shape.words || bits == 1),
              "megaforge::bitgemm: ", panels.scalar_type(), " ", panels.sizes(), " is not what bitgemm_prepare makes of ",
              rows, " rows of ", columns, " codes of ", bits, " bits on a CPU");
  TORCH_CHECK(scale.scalar_type() == at::kFloat &&
                  (scale.dim() == 0 || (scale.dim() <= 2 && scale.size(0) == rows)),
              "megaforge::bitgemm: scales ", scale.scalar_type(), " ", scale.sizes());
  return shape;
}

// Half goes by way of float, which holds all of it: the result is rounded once all the same.
at::ScalarType computed(at::ScalarType type) { return type == at::kBFloat16 ? type : at::kFloat; }

Type type_of(const Tensor& x) { return x.scalar_type() == at::kBFloat16 ? Type::bf16 : Type::f32; }

Tensor run(const Tensor& panels, const Tensor& scale_any, const Maybe& bias_any, const Shape& shape,
           const Tokens& tokens, at::ScalarType type) {
  const Tensor scale = scale_any.contiguous();
  const Maybe bias = bias_any ? Maybe(bias_any->to(at::kFloat).contiguous()) : std::nullopt;
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == shape.rows), "megaforge::bitgemm: a bias is [N]");
  Tensor y = at::empty({tokens.count, shape.rows}, panels.options().dtype(computed(type)));
  const Matrix matrix{shape, panels.const_data_ptr(), scale.const_data_ptr<float>(),
                      scale.dim() == 0 ? 0 : shape.groups};
  multiply(matrix, tokens, {type_of(y), y.mutable_data_ptr(), bias ? bias->const_data_ptr<float>() : nullptr},
           at::get_num_threads());
  return y.to(type);
}

Tensor linear(const Tensor& x_any, const Tensor& panels, const Tensor& scale, const Maybe& bias, int64_t rows,
              int64_t bits, int64_t columns, int64_t activation_bits) {
  const auto type = x_any.scalar_type();
  TORCH_CHECK(x_any.dim() == 2 && x_any.size(1) == columns &&
                  (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf),
              "megaforge::bitgemm_linear: expected [M, ", columns, "] in fp32, bf16 or fp16, not ", type, " ",
              x_any.sizes());
  TORCH_CHECK(activation_bits >= 2 && activation_bits <= 8, "megaforge::bitgemm_linear: activations of ",
              activation_bits, " bits");
  const Shape shape = shape_of(panels, scale, rows, bits, columns);
  const Tensor x = x_any.to(computed(type)).contiguous();
  return run(panels, scale, bias, shape,
             {x.size(0), type_of(x), x.const_data_ptr(), static_cast<int>(activation_bits), nullptr, nullptr}, type);
}

Tensor product(const Tensor& codes_any, const Tensor& worth_any, const Tensor& panels, const Tensor& scale,
               const Maybe& bias, int64_t rows, int64_t bits, int64_t columns, at::ScalarType type) {
  const Tensor codes = codes_any.contiguous(), worth = worth_any.contiguous();
  TORCH_CHECK(codes.dim() == 2 && codes.size(1) == columns && codes.scalar_type() == at::kChar &&
                  worth.scalar_type() == at::kFloat && worth.numel() == codes.size(0),
              "megaforge::bitgemm_product: expected int8 [M, ", columns, "] and fp32 [M, 1], not ", codes.scalar_type(),
              " ", codes.sizes(), " and ", worth.scalar_type(), " ", worth.sizes());
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "megaforge::bitgemm_product: results in ", type);
  const Shape shape = shape_of(panels, scale, rows, bits, columns);
  return run(panels, scale, bias, shape,
             {codes.size(0), Type::f32, nullptr, 8, codes.const_data_ptr<std::int8_t>(), worth.const_data_ptr<float>()},
             type);
}

TORCH_LIBRARY_IMPL(megaforge, CPU, library) {
  library.impl("bitgemm_prepare", &prepare_rows);
  library.impl("bitgemm_linear", &linear);
  library.impl("bitgemm_product", &product);
}

}  // namespace
}  // namespace megaforge::bitgemm

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__bitgemm_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_bitgemm_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
