// The CPU implementation of megaforge::attention and attention_backward; megaforge/kernels/attention/native.py defines them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "attention.h"

namespace megaforge::attention {
namespace {

using at::Tensor;

Type type_of(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "megaforge::attention: ", x.scalar_type(),
              " is not supported on CPUs; use float32 or bfloat16");
  return x.scalar_type() == at::kFloat ? Type::f32 : Type::bf16;
}

Tensor dense(const Tensor& x) { return x.size(3) == 1 || x.stride(3) == 1 ? x : x.contiguous(); }

View view(const Tensor& x) { return {x.const_data_ptr(), type_of(x), x.stride(0), x.stride(1), x.stride(2)}; }
Result result(const Tensor& x) { return {x.mutable_data_ptr(), type_of(x), x.stride(0), x.stride(1), x.stride(2)}; }

// [b, heads, s, d] whose memory is [s, b, heads, d], as the layers around it have it; zeros unless all of it is written.
Tensor like(const Tensor& x, at::ScalarType type, bool written) {
  const std::array<std::int64_t, 4> shape = {x.size(2), x.size(0), x.size(1), x.size(3)};
  const auto options = x.options().dtype(type);
  return (written ? at::empty(shape, options) : at::zeros(shape, options)).permute({1, 2, 0, 3});
}

struct Segments {
  Tensor held;
  const Segment* data;
  std::int64_t count;
  bool all_queries, all_keys;
};

// Whether the parts (batch, first, count) are within `batches` x `length` and apart; `all`: whether they are all of it.
void check_parts(std::vector<std::array<std::int64_t, 3>> parts, std::int64_t batches, std::int64_t length, const char* what,
                 bool& all) {
  std::sort(parts.begin(), parts.end());
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto [batch, first, count] = parts[i];
    TORCH_CHECK(batch >= 0 && batch < batches && first >= 0 && count >= 0 && first <= length - count,
                "megaforge::attention: a segment's ", what, " ", first, " to ", first + count, " of sequence ", batch,
                " are not within ", batches, " sequences of ", length);
    TORCH_CHECK(i == 0 || parts[i - 1][0] != batch || parts[i - 1][1] + parts[i - 1][2] <= first,
                "megaforge::attention: two segments share ", what, " of sequence ", batch, " at ", first);
    sum += count;
  }
  all = sum == batches * length;
}

Segments checked(const Tensor& segments, const Tensor& q, const Tensor& k) {
  static_assert(sizeof(Segment) == 6 * sizeof(std::int64_t));
  TORCH_CHECK(segments.scalar_type() == at::kLong && segments.dim() == 2 && segments.size(1) == 6,
              "megaforge::attention: segments must be int64 [n, 6], got ", segments.scalar_type(), " ", segments.sizes());
  Segments found{segments.contiguous(), nullptr, segments.size(0), false, false};
  found.data = reinterpret_cast<const Segment*>(found.held.const_data_ptr<std::int64_t>());
  std::vector<std::array<std::int64_t, 3>> queries, keys;
  for (const Segment* s = found.data; s < found.data + found.count; ++s) {
    queries.push_back({s->batch, s->query, s->queries});
    keys.push_back({s->batch, s->key, s->keys});
  }
  check_parts(std::move(queries), q.size(0), q.size(2), "queries", found.all_queries);
  check_parts(std::move(keys), k.size(0), k.size(2), "keys", found.all_keys);
  return found;
}

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, double scale) {
  return {q.size(1), k.size(1), q.size(2), q.size(3), static_cast<float>(scale), segments.data, segments.count,
          view(q), view(k), view(v), Turns{}, Dropped{}};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(0) == k.size(0) && q.size(3) == k.size(3) &&
                  k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "megaforge::attention: expected [b, heads, s, d] and twice [b, groups, t, d], got ", q.sizes(), " ", k.sizes(),
              " ", v.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "megaforge::attention: queries, keys and values of different types");
  TORCH_CHECK(scale > 0, "megaforge::attention: scale ", scale, " is not above 0");
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& segments_any,
                                     double scale, bool wide) {
  check(q_any, k_any, v_any, scale);
  const Tensor q = dense(q_any), k = dense(k_any), v = dense(v_any);
  const Segments segments = checked(segments_any, q, k);
  const Tensor out = like(q, wide ? at::kFloat : q.scalar_type(), segments.all_queries);
  const Tensor lse = at::full({q.size(0), q.size(1), q.size(2)}, -std::numeric_limits<float>::infinity(), q.options().dtype(at::kFloat));
  Forward args{problem(q, k, v, segments, scale), result(out), lse.mutable_data_ptr<float>()};
  forward(choose(type_of(q)), args, at::get_num_threads());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any,
                                                      const Tensor& v_any, const Tensor& out_any, const Tensor& lse_any,
                                                      const Tensor& segments_any, double scale, bool wide) {
  check(q_any, k_any, v_any, scale);
  const Tensor q = dense(q_any), k = dense(k_any), v = dense(v_any), out = dense(out_any);
  TORCH_CHECK(dout_any.sizes() == q.sizes() && out.sizes() == q.sizes() && lse_any.scalar_type() == at::kFloat &&
                  lse_any.sizes() == q.sizes().slice(0, 3),
              "megaforge::attention_backward: shapes differ: ", q.sizes(), " ", out.sizes(), " ", dout_any.sizes(), " ",
              lse_any.sizes());
  const Tensor dout = dense(dout_any.to(q.scalar_type())), lse = lse_any.contiguous();
  const Segments segments = checked(segments_any, q, k);
  const at::ScalarType type = wide ? at::kFloat : q.scalar_type();
  const Tensor dq = like(q, type, segments.all_queries), dk = like(k, type, segments.all_keys), dv = like(k, type, segments.all_keys);
  Backward args{problem(q, k, v, segments, scale), view(out), view(dout), lse.const_data_ptr<float>(),
                result(dq), result(dk), result(dv)};
  backward(choose(type_of(q)), args, at::get_num_threads());
  return {dq, dk, dv};
}

Dropped dropped(const Tensor& rows, std::int64_t threshold, const Tensor& q) {
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.is_contiguous() && rows.sizes() == q.sizes().slice(0, 3) && threshold >= 0 &&
                  threshold < 65536,
              "megaforge::attention_dropped: expected int64 [b, heads, s] and a threshold below 65536, got ", rows.scalar_type(), " ",
              rows.sizes(), " ", threshold);
  return {rows.const_data_ptr<std::int64_t>(), threshold};
}

std::tuple<Tensor, Tensor> attention_dropped(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& segments_any,
                                             const Tensor& rows_any, std::int64_t threshold, double scale) {
  check(q_any, k_any, v_any, scale);
  const Tensor q = dense(q_any), k = dense(k_any), v = dense(v_any), rows = rows_any.contiguous();
  const Segments segments = checked(segments_any, q, k);
  const Tensor out = like(q, q.scalar_type(), segments.all_queries);
  const Tensor lse = at::full({q.size(0), q.size(1), q.size(2)}, -std::numeric_limits<float>::infinity(), q.options().dtype(at::kFloat));
  Forward args{problem(q, k, v, segments, scale), result(out), lse.mutable_data_ptr<float>()};
  args.in.dropped = dropped(rows, threshold, q);
  forward(choose(type_of(q)), args, at::get_num_threads());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_dropped_backward(const Tensor& dout_any, const Tensor& q_any, const Tensor& k_any,
                                                              const Tensor& v_any, const Tensor& out_any, const Tensor& lse_any,
                                                              const Tensor& segments_any, const Tensor& rows_any,
                                                              std::int64_t threshold, double scale) {
  check(q_any, k_any, v_any, scale);
  const Tensor q = dense(q_any), k = dense(k_any), v = dense(v_any), out = dense(out_any), rows = rows_any.contiguous();
  TORCH_CHECK(dout_any.sizes() == q.sizes() && out.sizes() == q.sizes() && lse_any.scalar_type() == at::kFloat &&
                  lse_any.sizes() == q.sizes().slice(0, 3),
              "megaforge::attention_dropped_backward: shapes differ: ", q.sizes(), " ", out.sizes(), " ", dout_any.sizes());
  const Tensor dout = dense(dout_any.to(q.scalar_type())), lse = lse_any.contiguous();
  const Segments segments = checked(segments_any, q, k);
  const at::ScalarType type = q.scalar_type();
  const Tensor dq = like(q, type, segments.all_queries), dk = like(k, type, segments.all_keys), dv = like(k, type, segments.all_keys);
  Backward args{problem(q, k, v, segments, scale), view(out), view(dout), lse.const_data_ptr<float>(),
                result(dq), result(dk), result(dv)};
  args.in.dropped = dropped(rows, threshold, q);
  backward(choose(type_of(q)), args, at::get_num_threads());
  return {dq, dk, dv};
}

// A projection's queries, keys and values, side by side.
struct Parts {
  Tensor q, k, v;  // [b, heads or groups, s, d]
};

// Of `all` [s, b, heads + 2 groups, d], or without the values where `value` [s, b, groups, d] has them.
Parts parts(const Tensor& all, const std::optional<Tensor>& value, std::int64_t heads) {
  TORCH_CHECK(all.dim() == 4 && (!value || value->dim() == 4) && heads > 0,
              "megaforge::attention_fused: expected [s, b, heads + groups, d], got ", all.sizes());
  const std::int64_t rest = all.size(2) - heads, groups = value ? rest : rest / 2;
  TORCH_CHECK(groups > 0 && (value || rest % 2 == 0), "megaforge::attention_fused: ", heads, " heads of queries do not go with ",
              all.sizes());
  const auto part = [](const Tensor& x, std::int64_t first, std::int64_t count) {
    return x.narrow(2, first, count).permute({1, 2, 0, 3});
  };
  return {part(all, 0, heads), part(all, heads, groups), value ? part(*value, 0, groups) : part(all, heads + groups, groups)};
}

Turns turns(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const Tensor& all) {
  if (!cos || !sin) return {};
  for (const Tensor& x : {*cos, *sin}) {
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 3 && x.is_contiguous() && x.size(0) == all.size(0) &&
                    x.size(1) == all.size(1) && 2 * x.size(2) <= all.size(3) && x.sizes() == cos->sizes(),
                "megaforge::attention_fused: expected fp32 [s, b, d / 2] for ", all.sizes(), ", got ", x.scalar_type(), " ", x.sizes());
  }
  return {cos->const_data_ptr<float>(), sin->const_data_ptr<float>(), cos->stride(1), cos->stride(0), cos->size(2)};
}

std::tuple<Tensor, Tensor> attention_fused(const Tensor& all_any, const std::optional<Tensor>& value_any,
                                           const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                           const Tensor& segments_any, std::int64_t heads, double scale) {
  const Tensor all = dense(all_any);
  const std::optional<Tensor> value = value_any ? std::optional(dense(*value_any)) : std::nullopt;
  const auto [q, k, v] = parts(all, value, heads);
  check(q, k, v, scale);
  const Segments segments = checked(segments_any, q, k);
  const Tensor out = like(q, q.scalar_type(), segments.all_queries);
  const Tensor lse = at::full({q.size(0), q.size(1), q.size(2)}, -std::numeric_limits<float>::infinity(), q.options().dtype(at::kFloat));
  Forward args{problem(q, k, v, segments, scale), result(out), lse.mutable_data_ptr<float>()};
  args.in.turns = turns(cos, sin, all);
  forward(choose(type_of(q)), args, at::get_num_threads());
  return {out.permute({2, 0, 1, 3}), lse};
}

std::tuple<Tensor, Tensor> attention_fused_backward(const Tensor& dout_any, const Tensor& all_any,
                                                    const std::optional<Tensor>& value_any, const std::optional<Tensor>& cos,
                                                    const std::optional<Tensor>& sin, const Tensor& out_any, const Tensor& lse_any,
                                                    const Tensor& segments_any, std::int64_t heads, double scale) {
  const Tensor all = dense(all_any);
  const std::optional<Tensor> value = value_any ? std::optional(dense(*value_any)) : std::nullopt;
  const auto [q, k, v] = parts(all, value, heads);
  check(q, k, v, scale);
  TORCH_CHECK(dout_any.dim() == 4 && out_any.dim() == 4, "megaforge::attention_fused_backward: expected [s, b, heads, d]");
  const Tensor out = dense(out_any).permute({1, 2, 0, 3}), lse = lse_any.contiguous();
  const Tensor dout = dense(dout_any.to(q.scalar_type())).permute({1, 2, 0, 3});
  TORCH_CHECK(dout.sizes() == q.sizes() && out.sizes() == q.sizes() && lse.scalar_type() == at::kFloat &&
                  lse.sizes() == q.sizes().slice(0, 3),
              "megaforge::attention_fused_backward: shapes differ: ", q.sizes(), " ", out.sizes(), " ", dout.sizes(), " ", lse.sizes());
  const Segments segments = checked(segments_any, q, k);
  const bool written = segments.all_queries && segments.all_keys;
  const auto empty = [&](const Tensor& x) { return written ? at::empty(x.sizes(), x.options()) : at::zeros(x.sizes(), x.options()); };
  const Tensor dall = empty(all), dvalue = value ? empty(*value) : at::empty({0}, all.options());
  const auto [dq, dk, dv] = parts(dall, value ? std::optional(dvalue) : std::nullopt, heads);
  Backward args{problem(q, k, v, segments, scale), view(out), view(dout), lse.const_data_ptr<float>(),
                result(dq), result(dk), result(dv)};
  args.in.turns = turns(cos, sin, all);
  backward(choose(type_of(q)), args, at::get_num_threads());
  return {dall, dvalue};
}

TORCH_LIBRARY_IMPL(megaforge, CPU, library) {
  library.impl("attention_dropped", &attention_dropped);
  library.impl("attention_dropped_backward", &attention_dropped_backward);
  library.impl("attention_fused", &attention_fused);
  library.impl("attention_fused_backward", &attention_fused_backward);
  library.impl("attention", &attention);
  library.impl("attention_backward", &attention_backward);
}

}  // namespace
}  // namespace megaforge::attention

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__attention_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_attention_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
