// The CUDA implementation of megaforge::wkv7 and megaforge::wkv7_backward; megaforge/kernels/wkv7/native.py defines them.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <Python.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "launch.h"

namespace megaforge::wkv7 {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// The tensors of a launch as the kernels want them: of the right type, rows aligned; held until the launch is made, after
// which the stream's order keeps their memory.
struct Arguments {
  std::vector<Tensor> held;
  at::ScalarType type;
  Problem problem{};

  const Tensor& hold(const Tensor& x, at::ScalarType as) { return held.emplace_back(x.to(as).contiguous()); }

  wkv7::Tensor rows(const Tensor& x, at::ScalarType as) {
    Tensor y = x.to(as);
    const std::int64_t unit = 16 / y.element_size();
    bool aligned = y.stride(3) == 1 && reinterpret_cast<std::uintptr_t>(y.const_data_ptr()) % 16 == 0;
    for (int i = 0; i < 3; ++i) aligned = aligned && y.stride(i) % unit == 0;
    if (!aligned) y = y.clone(at::MemoryFormat::Contiguous);
    const Tensor& kept = held.emplace_back(y);
    return {kept.const_data_ptr(), kept.stride(0), kept.stride(1), kept.stride(2)};
  }

  const float* state(const Optional& x) {
    if (!x) return nullptr;
    const std::int64_t n = problem.channels;
    TORCH_CHECK(x->sizes() == at::IntArrayRef({problem.batch, problem.heads, n, n}),
                "megaforge::wkv7: a state must be [b, H, N, N], got ", x->sizes());
    return hold(*x, at::kFloat).const_data_ptr<float>();
  }

  Arguments(const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
            const Optional& document_start) {
    TORCH_CHECK(v.dim() == 4, "megaforge::wkv7: expected [s, b, H, N], got ", v.sizes());
    for (const Tensor& x : {r, log_w, k, v, a, b}) {
      TORCH_CHECK(x.sizes() == v.sizes(), "megaforge::wkv7: shapes differ: ", x.sizes(), " and ", v.sizes());
      TORCH_CHECK(x.device() == v.device(), "megaforge::wkv7: devices differ: ", x.device(), " and ", v.device());
      TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "megaforge::wkv7: ",
                  x.scalar_type(), " is not supported on GPUs; use float32 or bfloat16");
    }
    TORCH_CHECK(v.size(0) <= std::numeric_limits<int>::max() - kTokensPerState &&
                    v.size(1) * v.size(2) <= std::numeric_limits<int>::max(),
                "megaforge::wkv7: too many tokens or heads: ", v.sizes());
    TORCH_CHECK(v.size(3) <= 64 && supports(static_cast<int>(v.size(3))), "megaforge::wkv7: heads of ", v.size(3),
                " channels are not supported on GPUs; use 32 or 64");
    bool bf16 = true;
    for (const Tensor& x : {r, k, v, a, b}) bf16 = bf16 && x.scalar_type() == at::kBFloat16;
    type = bf16 ? at::kBFloat16 : at::kFloat;
    problem.type = bf16 ? Type::kBf16 : Type::kFloat;
    problem.tokens = static_cast<int>(v.size(0)), problem.batch = static_cast<int>(v.size(1));
    problem.heads = static_cast<int>(v.size(2)), problem.channels = static_cast<int>(v.size(3));
    held.reserve(16);
    problem.r = rows(r, type), problem.log_w = rows(log_w, at::kFloat), problem.k = rows(k, type);
    problem.v = rows(v, type), problem.a = rows(a, type), problem.b = rows(b, type);
    if (!document_start) return;
    TORCH_CHECK(document_start->scalar_type() == at::kBool && document_start->dim() == 2 &&
                    document_start->size(0) == v.size(0) && document_start->size(1) == v.size(1),
                "megaforge::wkv7: document_start must be bool [s, b], got ", document_start->sizes());
    problem.document_start =
      reinterpret_cast<const std::uint8_t*>(hold(*document_start, at::kBool).const_data_ptr<bool>());
  }

  // Of the states that the forward pass keeps.
  at::ScalarType kept_type(std::int64_t state_interval) const { return state_interval == kFewTokens ? type : at::kFloat; }

  bool empty() const { return problem.tokens == 0 || problem.batch == 0 || problem.heads == 0; }
};

void* stream_of(const Tensor& x) { return c10::cuda::getCurrentCUDAStream(x.device().index()).stream(); }

void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "megaforge::wkv7: ", error); }

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv7_cuda(const Tensor& r, const Tensor& log_w, const Tensor& k,
                                                     const Tensor& v, const Tensor& a, const Tensor& b,
                                                     const Optional& initial_state, const Optional& document_start,
                                                     std::int64_t state_interval, bool save_removed) {
  const c10::cuda::CUDAGuard guard(v.device());
  TORCH_CHECK(
      (state_interval == 0 || state_interval == kTokensPerState || state_interval == kFewTokens) && !save_removed,
      "megaforge::wkv7: on GPUs the state is kept every ", kTokensPerState, " or ", kFewTokens, " tokens or not at all");
  Arguments args(r, log_w, k, v, a, b, document_start);
  args.problem.tokens_per_state = state_interval == kTokensPerState ? kTokensPerState : kFewTokens;
  const auto [tokens, batch, heads, n] = std::make_tuple(v.size(0), v.size(1), v.size(2), v.size(3));
  const auto options = v.options().dtype(at::kFloat);
  const std::int64_t saved = state_interval == 0 ? 0 : (tokens + state_interval - 1) / state_interval;
  Tensor y = at::empty(v.sizes(), v.options().dtype(args.type));
  Tensor final_state = at::empty({batch, heads, n, n}, options);
  Tensor states = at::empty({saved, batch, heads, n, n}, options.dtype(args.kept_type(state_interval)));
  Tensor removed = at::empty({0, batch, heads, n}, options);
  const float* initial = args.state(initial_state);
  if (args.empty()) {
    if (initial_state) final_state.copy_(*initial_state);
    else final_state.zero_();
  } else {
    check_launch(forward(args.problem, initial,
                         {y.mutable_data_ptr(), saved > 0 ? states.mutable_data_ptr() : nullptr,
                          final_state.mutable_data_ptr<float>()},
                         stream_of(v)));
  }
  return {y.to(v.scalar_type()), final_state, states, removed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_backward_cuda(
    const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
    const Optional& document_start, const Tensor& states, const Tensor& /*removed*/, const Optional& dy,
    const Optional& dfinal_state, std::int64_t state_interval) {
  const c10::cuda::CUDAGuard guard(v.device());
  Arguments args(r, log_w, k, v, a, b, document_start);
  TORCH_CHECK(state_interval == kTokensPerState || state_interval == kFewTokens,
              "megaforge::wkv7_backward: on GPUs the forward pass must keep the state every ", kTokensPerState, " or ",
              kFewTokens, " tokens");
  args.problem.tokens_per_state = static_cast<int>(state_interval);
  const std::int64_t kept = (v.size(0) + state_interval - 1) / state_interval;
  const auto options = v.options().dtype(args.type);
  Tensor dinitial = at::empty({v.size(1), v.size(2), v.size(3), v.size(3)}, v.options().dtype(at::kFloat));
  TORCH_CHECK(states.dim() == 5 && states.size(0) == kept && states.sizes().slice(1) == dinitial.sizes(),
              "megaforge::wkv7_backward: ", states.sizes(), " are not the states of every ", state_interval, " tokens");
  const float* dfinal = args.state(dfinal_state);
  std::vector<Tensor> grads;
  for (int i = 0; i < 6; ++i) grads.push_back(at::empty(v.sizes(), i == 1 ? options.dtype(at::kFloat) : options));
  if (args.empty()) {
    if (dfinal_state) dinitial.copy_(*dfinal_state);
    else dinitial.zero_();
  } else {
    const wkv7::Tensor dy_rows = args.rows(dy ? *dy : at::zeros_like(v), args.type);
    const bool few = state_interval == kFewTokens;
    Tensor between = at::empty({few ? kStatesBetween : 0, v.size(1), v.size(2), v.size(3), v.size(3)},
                               v.options().dtype(at::kFloat));
    check_launch(backward(args.problem, dy_rows, args.hold(states, args.kept_type(state_interval)).const_data_ptr(),
                          between.mutable_data_ptr<float>(), dfinal,
                          {grads[0].mutable_data_ptr(), grads[2].mutable_data_ptr(), grads[3].mutable_data_ptr(),
                           grads[4].mutable_data_ptr(), grads[5].mutable_data_ptr(),
                           grads[1].mutable_data_ptr<float>(), dinitial.mutable_data_ptr<float>()},
                          stream_of(v)));
  }
  return {grads[0].to(r.scalar_type()), grads[1].to(log_w.scalar_type()), grads[2].to(k.scalar_type()),
      grads[3].to(v.scalar_type()), grads[4].to(a.scalar_type()),     grads[5].to(b.scalar_type()),
      dinitial};
}

TORCH_LIBRARY_IMPL(megaforge, CUDA, library) {
  library.impl("wkv7", &wkv7_cuda);
  library.impl("wkv7_backward", &wkv7_backward_cuda);
}

}  // namespace
}  // namespace megaforge::wkv7

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__wkv7_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_wkv7_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
