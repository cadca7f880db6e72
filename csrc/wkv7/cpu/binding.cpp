// The CPU implementation of megaforge::wkv7 and megaforge::wkv7_backward; megaforge/kernels/wkv7/native.py defines them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <torch/library.h>

#include "wkv7.h"

namespace megaforge::wkv7 {
namespace {

using at::Tensor;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kDouble: return Type::f64;
    default: TORCH_CHECK(false, "megaforge::wkv7: ", x.scalar_type(), " is not supported on CPUs; use float32, bfloat16 or float64");
  }
}

at::ScalarType state_type(const Tensor& v) { return v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Owns the tensors that the views point into.
struct Held {
  std::vector<Tensor> tensors;

  const Tensor& contiguous(const Tensor& x) { return tensors.emplace_back(x.contiguous()); }

  View view(const Tensor& x) {
    const Tensor& held = tensors.emplace_back(x.size(3) == 1 || x.stride(3) == 1 ? x : x.contiguous());
    return {held.const_data_ptr(), type_of(held), held.stride(0), held.stride(1), held.stride(2)};
  }
};

Inputs inputs(Held& held, const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& a,
              const Tensor& b, const std::optional<Tensor>& document_start, int64_t interval) {
  TORCH_CHECK(v.dim() == 4, "megaforge::wkv7: expected [s, b, H, N], got ", v.sizes());
  for (const Tensor& x : {r, log_w, k, a, b}) {
    TORCH_CHECK(x.sizes() == v.sizes(), "megaforge::wkv7: shapes differ: ", x.sizes(), " and ", v.sizes());
    TORCH_CHECK((x.scalar_type() == at::kDouble) == (v.scalar_type() == at::kDouble),
                "megaforge::wkv7: float64 goes with float64 only");
  }
  const bool* start = nullptr;
  if (document_start) {
    TORCH_CHECK(document_start->scalar_type() == at::kBool && document_start->dim() == 2 &&
                    document_start->size(0) == v.size(0) && document_start->size(1) == v.size(1),
                "megaforge::wkv7: document_start must be bool [s, b], got ", document_start->sizes());
    start = held.contiguous(*document_start).const_data_ptr<bool>();
  }
  return {{v.size(0), v.size(1), v.size(2), v.size(3)}, held.view(r), held.view(log_w), held.view(k), held.view(v),
          held.view(a), held.view(b), start, interval > 0 ? interval : std::max<int64_t>(v.size(0), 1)};
}

const void* state(Held& held, const std::optional<Tensor>& x, const Tensor& v) {
  if (!x) return nullptr;
  TORCH_CHECK(x->sizes() == at::IntArrayRef({v.size(1), v.size(2), v.size(3), v.size(3)}),
              "megaforge::wkv7: a state must be [b, H, N, N], got ", x->sizes());
  return held.contiguous(x->to(state_type(v))).const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv7(
    const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& document_start, int64_t state_interval,
    bool save_removed) {
  Held held;
  Forward args{};
  args.in = inputs(held, r, log_w, k, v, a, b, document_start, state_interval);
  args.initial_state = state(held, initial_state, v);
  const auto [s, batches, heads, n] = args.in.shape;
  const auto options = v.options().dtype(state_type(v));
  const int64_t saved = state_interval > 0 ? (s + state_interval - 1) / state_interval : 0;
  Tensor y = at::empty({s, batches, heads, n}, v.options());
  Tensor final_state = at::empty({batches, heads, n, n}, options);
  Tensor states = at::empty({saved, batches, heads, n, n}, options);
  Tensor removed = at::empty({save_removed ? s : 0, batches, heads, n}, options);
  args.y = y.mutable_data_ptr();
  args.y_type = type_of(v);
  args.final_state = final_state.mutable_data_ptr();
  args.states = saved > 0 ? states.mutable_data_ptr() : nullptr;
  args.removed = save_removed ? removed.mutable_data_ptr() : nullptr;
  forward(args, at::get_num_threads());
  return {y, final_state, states, removed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_backward(
    const Tensor& r, const Tensor& log_w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
    const std::optional<Tensor>& document_start, const Tensor& states, const Tensor& removed,
    const std::optional<Tensor>& dy, const std::optional<Tensor>& dfinal_state, int64_t state_interval) {
  Held held;
  Backward args{};
  args.in = inputs(held, r, log_w, k, v, a, b, document_start, state_interval);
  const auto [s, batches, heads, n] = args.in.shape;
  TORCH_CHECK(state_interval > 0 && states.size(0) == (s + state_interval - 1) / state_interval && removed.size(0) == s,
              "megaforge::wkv7_backward: the forward pass on a CPU must save states and what was removed");
  args.states = held.contiguous(states).const_data_ptr();
  args.removed = held.contiguous(removed).const_data_ptr();
  if (dy) args.dy = held.view(*dy);
  args.dfinal_state = state(held, dfinal_state, v);
  std::vector<Tensor> grads;
  Gradient* const places[] = {&args.dr, &args.dlog_w, &args.dk, &args.dv, &args.da, &args.db};
  const Tensor* const likes[] = {&r, &log_w, &k, &v, &a, &b};
  for (int i = 0; i < 6; ++i) {
    grads.push_back(at::empty({s, batches, heads, n}, likes[i]->options()));
    *places[i] = {grads.back().mutable_data_ptr(), type_of(grads.back())};
  }
  Tensor dinitial = at::empty({batches, heads, n, n}, v.options().dtype(state_type(v)));
  args.dinitial_state = dinitial.mutable_data_ptr();
  backward(args, at::get_num_threads());
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], dinitial};
}

TORCH_LIBRARY_IMPL(megaforge, CPU, library) {
  library.impl("wkv7", &wkv7);
  library.impl("wkv7_backward", &wkv7_backward);
}

}  // namespace
}  // namespace megaforge::wkv7

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__wkv7_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_wkv7_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
