// The CUDA implementations of megaforge::bitgemm_*; megaforge/kernels/bitgemm/native.py defines the operators, cuda.py
// beside it the one that takes a form.
#include <ATen/ops/empty.h>
#include <Python.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <limits>
#include <optional>
#include <string_view>

#include "launch.h"

namespace megaforge::bitgemm {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// Up to so many tokens each form is taken. Worked out, not measured yet.
constexpr int kGemvTokens = 4, kStreamTokens = 32, kMmaTokens = 64;
constexpr int kGroupUnit = 32;      // depth of one instruction: groups are multiples of it, or take the plain form
constexpr std::int64_t kMostTokens = 1 << 24, kMostRows = 1 << 24;

void* stream(const Tensor& x) { return c10::cuda::getCurrentCUDAStream(x.device().index()).stream(); }

void check(const char* error) { TORCH_CHECK(error == nullptr, "megaforge::bitgemm: ", error); }

Type type_of(at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "megaforge::bitgemm: float32, bfloat16 or float16, not ", type);
  return type == at::kFloat ? Type::kFloat : type == at::kBFloat16 ? Type::kBf16 : Type::kFp16;
}

void check_sizes(std::int64_t tokens, std::int64_t rows, std::int64_t columns, std::int64_t bits) {
  TORCH_CHECK(bits == 1 || bits == 2 || bits == 4, "megaforge::bitgemm: weights of 1, 2 or 4 bits, not ", bits);
  TORCH_CHECK(columns <= kMostColumns && rows <= kMostRows && tokens <= kMostTokens,
              "megaforge::bitgemm: at most 2^17 columns, 2^24 rows and tokens, got ", columns, ", ", rows, ", ", tokens);
}

bool wgmma_allowed() {
  const char* const asked = std::getenv("MEGAFORGE_WGMMA");
  return (asked == nullptr || std::string_view(asked) != "0") && has_wgmma();
}

Form best_form(const Product& p) {
  if (p.groups > 0) return p.columns / p.groups % kGroupUnit == 0 ? Form::kMma : Form::kPlain;
  if (p.tokens <= kGemvTokens) return Form::kGemv;
  if (p.tokens <= kStreamTokens) return Form::kStream;
  return p.tokens > kMmaTokens && wgmma_allowed() ? Form::kWgmma : Form::kMma;
}

Form named_form(std::string_view name, const Product& p) {
  if (name == "plain") return Form::kPlain;
  const bool groups = p.groups > 0;
  if (name == "gemv" && !groups) return Form::kGemv;
  if (name == "stream" && !groups) return Form::kStream;
  if (name == "mma" && (!groups || p.columns / p.groups % kGroupUnit == 0)) return Form::kMma;
  TORCH_CHECK(name == "wgmma" && !groups, "megaforge::bitgemm: no form '", name, "' for ", p.groups, " groups");
  TORCH_CHECK(has_wgmma(), "megaforge::bitgemm: no code with wgmma for this GPU (sm_90a)");
  return Form::kWgmma;
}

Tensor prepare_panels(const Tensor& packed_any, std::int64_t bits, std::int64_t columns, std::int64_t /*groups*/) {
  const c10::cuda::CUDAGuard guard(packed_any.device());
  const Tensor packed = packed_any.contiguous();
  check_sizes(0, packed.size(0), columns, bits);
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.dim() == 2 && packed.size(1) == (columns * bits + 7) / 8,
              "megaforge::bitgemm_prepare: takes uint8 [N, ceil(columns bits / 8)], not ", packed.scalar_type(),
              packed.sizes());
  const int depth = padded_depth(static_cast<int>(bits), static_cast<int>(columns));
  const int rows = static_cast<int>(packed.size(0));
  const Tensor panels = at::empty({panels_of(rows), panel_words(static_cast<int>(bits), depth)},
                                  packed.options().dtype(at::kInt));
  if (panels.numel() == 0) return panels;
  check(prepare({packed.const_data_ptr<std::uint8_t>(), static_cast<std::uint32_t*>(panels.mutable_data_ptr()),
                 static_cast<int>(bits), rows, static_cast<int>(columns), depth},
                stream(packed)));
  return panels;
}

// Tokens to multiply: values, or codes with what they are worth.
struct Tokens {
  const Tensor& x;
  Maybe worth;
  std::int64_t activation_bits;
};

Tensor linear(const Tokens& tokens, const Tensor& prepared, const Tensor& scale_any, const Maybe& bias_any,
              std::int64_t rows, std::int64_t bits, std::int64_t columns, at::ScalarType type, std::string_view form) {
  const c10::cuda::CUDAGuard guard(tokens.x.device());
  const Tensor x = tokens.x.contiguous();
  TORCH_CHECK(x.dim() == 2 && x.size(1) == columns, "megaforge::bitgemm: expected [M, ", columns, "], got ", x.sizes());
  check_sizes(x.size(0), rows, columns, bits);
  const int depth = padded_depth(static_cast<int>(bits), static_cast<int>(columns)), count = static_cast<int>(x.size(0));
  TORCH_CHECK(prepared.scalar_type() == at::kInt && prepared.is_contiguous() && prepared.device() == x.device() &&
                  prepared.dim() == 2 && prepared.size(0) == panels_of(static_cast<int>(rows)) &&
                  prepared.size(1) == panel_words(static_cast<int>(bits), depth),
              "megaforge::bitgemm: not what bitgemm_prepare makes of ", rows, " x ", columns, " on this device: ",
              prepared.scalar_type(), prepared.sizes(), " on ", prepared.device());
  const Tensor scale = scale_any.to(x.device(), at::kFloat).contiguous();
  const bool grouped = scale.dim() == 2 && scale.size(1) > 1;
  TORCH_CHECK(scale.numel() == 1 || (scale.dim() > 0 && scale.size(0) == rows &&
                                     (!grouped || (scale.size(1) <= columns && columns % scale.size(1) == 0))),
              "megaforge::bitgemm: scales ", scale.sizes(), " of ", rows, " x ", columns);
  const Maybe bias = bias_any ? Maybe(bias_any->to(x.device(), at::kFloat).contiguous()) : std::nullopt;
  TORCH_CHECK(!bias || bias->numel() == rows, "megaforge::bitgemm: a bias of ", rows, " values, not ",
              bias ? bias->numel() : 0);
  const Tensor out = at::empty({count, rows}, x.options().dtype(type));
  if (out.numel() == 0) return out;

  const bool given = tokens.worth.has_value();
  const auto ints = x.options().dtype(at::kInt);
  const Tensor codes = at::empty({count, depth}, x.options().dtype(at::kChar)), sums = at::empty({count}, ints);
  const Tensor worth = given ? tokens.worth->to(at::kFloat).contiguous() : at::empty({count}, ints.dtype(at::kFloat));
  TORCH_CHECK(worth.numel() == count, "megaforge::bitgemm: ", count, " tokens of ", worth.sizes());
  Product product{reinterpret_cast<const std::uint32_t*>(prepared.const_data_ptr<std::int32_t>()),
                        codes.const_data_ptr<std::int8_t>(), worth.const_data_ptr<float>(),
                        sums.const_data_ptr<std::int32_t>(), scale.const_data_ptr<float>(),
                        bias ? bias->const_data_ptr<float>() : nullptr, out.mutable_data_ptr(), type_of(type),
                        static_cast<int>(bits), count, static_cast<int>(rows), static_cast<int>(columns), depth,
                        scale.numel() > 1 && !grouped, grouped ? static_cast<int>(scale.size(1)) : 0, 1, nullptr};
  const Form chosen = form.empty() ? best_form(product) : named_form(form, product);
  product.parts = parts_for(chosen, count, product.rows, depth, product.groups, count_processors());
  Tensor partial;
  if (product.parts > 1) {
    partial = at::empty({product.parts, count, rows}, ints);
    product.partial = partial.mutable_data_ptr<std::int32_t>();
  }
  check(quantize({x.const_data_ptr(), codes.mutable_data_ptr<std::int8_t>(), worth.mutable_data_ptr<float>(),
                  sums.mutable_data_ptr<std::int32_t>(), given ? Type::kFloat : type_of(x.scalar_type()), given,
                  in_gemv_order(chosen), count, static_cast<int>(columns), depth,
                  tokens.activation_bits == 4 ? 7.0f : 127.0f},
                 stream(x)));
  check(multiply(product, chosen, stream(x)));
  return out;
}

Tensor bitgemm_linear(const Tensor& x, const Tensor& prepared, const Tensor& scale, const Maybe& bias, std::int64_t rows,
                      std::int64_t bits, std::int64_t columns, std::int64_t activation_bits) {
  return linear({x, std::nullopt, activation_bits}, prepared, scale, bias, rows, bits, columns, x.scalar_type(), "");
}

Tensor bitgemm_linear_by(const Tensor& x, const Tensor& prepared, const Tensor& scale, const Maybe& bias,
                         std::int64_t rows, std::int64_t bits, std::int64_t columns, std::int64_t activation_bits,
                         c10::string_view form) {
  TORCH_CHECK(!form.empty(), "megaforge::bitgemm_linear_by: which form?");
  return linear({x, std::nullopt, activation_bits}, prepared, scale, bias, rows, bits, columns, x.scalar_type(),
                std::string_view(form.data(), form.size()));
}

Tensor bitgemm_product(const Tensor& codes, const Tensor& worth, const Tensor& prepared, const Tensor& scale,
                       const Maybe& bias, std::int64_t rows, std::int64_t bits, std::int64_t columns,
                       at::ScalarType type) {
  TORCH_CHECK(codes.scalar_type() == at::kChar, "megaforge::bitgemm_product: int8 codes, not ", codes.scalar_type());
  return linear({codes, worth, 8}, prepared, scale, bias, rows, bits, columns, type, "");
}

TORCH_LIBRARY_IMPL(megaforge, CUDA, library) {
  library.impl("bitgemm_prepare", &prepare_panels);
  library.impl("bitgemm_linear", &bitgemm_linear);
  library.impl("bitgemm_linear_by", &bitgemm_linear_by);
  library.impl("bitgemm_product", &bitgemm_product);
}

PyObject* wgmma_here(PyObject* /*module*/, PyObject* /*none*/) { return PyBool_FromLong(has_wgmma() ? 1 : 0); }

}  // namespace
}  // namespace megaforge::bitgemm

// Importing the module registers the operators.
PyMODINIT_FUNC PyInit__bitgemm_cuda() {
  static PyMethodDef methods[] = {
    {"has_wgmma", &megaforge::bitgemm::wgmma_here, METH_NOARGS, "Whether the current GPU has code with wgmma."},
    {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_bitgemm_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
