// WKV-7 without vector instructions of its own, for any head size, in float and double.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "convert.h"
#include "wkv7.h"

namespace megaforge::wkv7 {
namespace {

// One head's tensor: converts a token's channels to T and back.
template <typename T>
struct Tokens {
  const char* data = nullptr;
  Type type = Type::f32;
  std::int64_t stride = 0;

  Tokens(const View& view, std::int64_t batch, std::int64_t head) : type(view.type), stride(view.stride_s) {
    if (view.data == nullptr) return;
    data = static_cast<const char*>(view.data) +
           (batch * view.stride_b + head * view.stride_h) * static_cast<std::int64_t>(size_of(type));
  }

  void read(std::int64_t t, std::int64_t n, T* out) const {
    if (data == nullptr) {
      std::fill_n(out, n, T(0));
      return;
    }
    const char* from = data + t * stride * static_cast<std::int64_t>(size_of(type));
    if (type == Type::bf16) {
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from_bf16(reinterpret_cast<const std::uint16_t*>(from)[i]));
    } else if (type == Type::f32) {
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(reinterpret_cast<const float*>(from)[i]);
    } else {
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(reinterpret_cast<const double*>(from)[i]);
    }
  }
};

template <typename T>
void write(void* data, Type type, std::int64_t offset, std::int64_t n, const T* from) {
  if (type == Type::bf16) {
    for (std::int64_t i = 0; i < n; ++i) static_cast<std::uint16_t*>(data)[offset + i] = to_bf16(static_cast<float>(from[i]));
  } else if (type == Type::f32) {
    for (std::int64_t i = 0; i < n; ++i) static_cast<float*>(data)[offset + i] = static_cast<float>(from[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) static_cast<double*>(data)[offset + i] = static_cast<double>(from[i]);
  }
}

// S <- S diag(w) + removed b^T + v k^T, S [value, key].
template <typename T>
void update(T* state, const T* w, const T* removed, const T* b, const T* v, const T* k, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const T removed_i = removed[i], v_i = v[i];
    T* row = state + i * n;
    for (std::int64_t j = 0; j < n; ++j) row[j] = row[j] * w[j] + removed_i * b[j] + v_i * k[j];
  }
}

// out = S x
template <typename T>
void multiply(const T* state, const T* x, T* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    T sum = 0;
    for (std::int64_t j = 0; j < n; ++j) sum += state[i * n + j] * x[j];
    out[i] = sum;
  }
}

template <typename T>
void exp_in_place(T* x, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) x[j] = std::exp(x[j]);
}

template <typename T>
std::int64_t forward_scratch(const Forward& args) {
  const std::int64_t n = args.in.shape.n;
  return static_cast<std::int64_t>(sizeof(T)) * (n * n + 8 * n);
}

template <typename T>
void forward_head(const Forward& args, std::int64_t row, void* scratch) {
  const Inputs& in = args.in;
  const auto [s, batches, heads, n] = in.shape;
  const std::int64_t rows = batches * heads, batch = row / heads, head = row % heads, square = n * n;
  T* state = static_cast<T*>(scratch);
  T *r = state + square, *w = r + n, *k = w + n, *v = k + n, *a = v + n, *b = a + n, *removed = b + n, *y = removed + n;
  const Tokens<T> all_r(in.r, batch, head), all_w(in.log_w, batch, head), all_k(in.k, batch, head),
      all_v(in.v, batch, head), all_a(in.a, batch, head), all_b(in.b, batch, head);
  if (args.initial_state != nullptr) {
    std::copy_n(static_cast<const T*>(args.initial_state) + row * square, square, state);
  } else {
    std::fill_n(state, square, T(0));
  }
  for (std::int64_t t = 0; t < s; ++t) {
    if (args.states != nullptr && t % in.interval == 0) {
      std::copy_n(state, square, static_cast<T*>(args.states) + (t / in.interval * rows + row) * square);
    }
    if (in.document_start != nullptr && in.document_start[t * batches + batch]) std::fill_n(state, square, T(0));
    all_r.read(t, n, r), all_w.read(t, n, w), all_k.read(t, n, k);
    all_v.read(t, n, v), all_a.read(t, n, a), all_b.read(t, n, b);
    exp_in_place(w, n);
    multiply(state, a, removed, n);
    update(state, w, removed, b, v, k, n);
    multiply(state, r, y, n);
    const std::int64_t offset = (t * rows + row) * n;
    write(args.y, args.y_type, offset, n, y);
    if (args.removed != nullptr) std::copy_n(removed, n, static_cast<T*>(args.removed) + offset);
  }
  std::copy_n(state, square, static_cast<T*>(args.final_state) + row * square);
}

template <typename T>
std::int64_t backward_scratch(const Backward& args) {
  const auto [s, batches, heads, n] = args.in.shape;
  const std::int64_t chunk = std::min(s, args.in.interval);
  return static_cast<std::int64_t>(sizeof(T)) * ((chunk + 3) * n * n + 14 * n);
}

template <typename T>
void backward_head(const Backward& args, std::int64_t row, void* scratch) {
  const Inputs& in = args.in;
  const auto [s, batches, heads, n] = in.shape;
  const std::int64_t rows = batches * heads, batch = row / heads, head = row % heads, square = n * n;
  const std::int64_t chunk = std::min(s, in.interval);
  T* states = static_cast<T*>(scratch);  // after each token of a chunk; before all of them
  T *zero = states + (chunk + 1) * square, *grad = zero + square, *r = grad + square, *w = r + n, *k = w + n, *v = k + n,
    *a = v + n, *b = a + n, *dy = b + n, *dremoved = dy + n, *dr = dremoved + n, *dw = dr + n, *dk = dw + n,
    *dv = dk + n, *da = dv + n, *db = da + n;
  const Tokens<T> all_r(in.r, batch, head), all_w(in.log_w, batch, head), all_k(in.k, batch, head),
      all_v(in.v, batch, head), all_a(in.a, batch, head), all_b(in.b, batch, head), all_dy(args.dy, batch, head);
  const auto starts = [&](std::int64_t t) {
    return in.document_start != nullptr && in.document_start[t * batches + batch];
  };
  std::fill_n(zero, square, T(0));
  if (args.dfinal_state != nullptr) {
    std::copy_n(static_cast<const T*>(args.dfinal_state) + row * square, square, grad);
  } else {
    std::fill_n(grad, square, T(0));
  }
  for (std::int64_t first = (s - 1) / in.interval * in.interval; first >= 0; first -= in.interval) {
    const std::int64_t last = std::min(s, first + in.interval);
    std::copy_n(static_cast<const T*>(args.states) + (first / in.interval * rows + row) * square, square, states);
    const auto before = [&](std::int64_t t) { return starts(t) ? zero : states + (t - first) * square; };
    for (std::int64_t t = first; t < last; ++t) {
      all_w.read(t, n, w), all_k.read(t, n, k), all_v.read(t, n, v), all_b.read(t, n, b);
      exp_in_place(w, n);
      T* state = states + (t + 1 - first) * square;
      std::copy_n(before(t), square, state);
      update(state, w, static_cast<const T*>(args.removed) + (t * rows + row) * n, b, v, k, n);
    }
    for (std::int64_t t = last - 1; t >= first; --t) {
      all_r.read(t, n, r), all_w.read(t, n, w), all_k.read(t, n, k);
      all_v.read(t, n, v), all_a.read(t, n, a), all_b.read(t, n, b), all_dy.read(t, n, dy);
      exp_in_place(w, n);
      const std::int64_t offset = (t * rows + row) * n;
      const T *removed = static_cast<const T*>(args.removed) + offset, *previous = before(t),
              *state = states + (t + 1 - first) * square;
      for (T* x : {dr, dw, dk, da, db}) std::fill_n(x, n, T(0));
      for (std::int64_t i = 0; i < n; ++i) {
        T* g = grad + i * n;
        const T dy_i = dy[i], v_i = v[i], removed_i = removed[i];
        T sum_k = 0, sum_b = 0;
        for (std::int64_t j = 0; j < n; ++j) {
          g[j] += dy_i * r[j];
          sum_k += g[j] * k[j];
          sum_b += g[j] * b[j];
        }
        dv[i] = sum_k;
        dremoved[i] = sum_b;
        for (std::int64_t j = 0; j < n; ++j) {
          const T g_j = g[j], p_j = previous[i * n + j];
          dr[j] += dy_i * state[i * n + j];
          dk[j] += v_i * g_j;
          db[j] += removed_i * g_j;
          dw[j] += p_j * g_j;
          da[j] += p_j * sum_b;
          g[j] = g_j * w[j] + sum_b * a[j];
        }
      }
      if (starts(t)) std::fill_n(grad, square, T(0));
      for (std::int64_t j = 0; j < n; ++j) dw[j] *= w[j];
      write(args.dr.data, args.dr.type, offset, n, dr), write(args.dlog_w.data, args.dlog_w.type, offset, n, dw);
      write(args.dk.data, args.dk.type, offset, n, dk), write(args.dv.data, args.dv.type, offset, n, dv);
      write(args.da.data, args.da.type, offset, n, da), write(args.db.data, args.db.type, offset, n, db);
    }
  }
  std::copy_n(grad, square, static_cast<T*>(args.dinitial_state) + row * square);
}

template <typename T>
void forward_heads(const Forward& args, std::int64_t first, std::int64_t last, void* scratch) {
  for (std::int64_t row = first; row < last; ++row) forward_head<T>(args, row, scratch);
}

template <typename T>
void backward_heads(const Backward& args, std::int64_t first, std::int64_t last, void* scratch) {
  for (std::int64_t row = first; row < last; ++row) backward_head<T>(args, row, scratch);
}

}  // namespace

const Kernels scalar_f32 = {forward_scratch<float>, forward_heads<float>, backward_scratch<float>,
                            backward_heads<float>};
const Kernels scalar_f64 = {forward_scratch<double>, forward_heads<double>, backward_scratch<double>,
                            backward_heads<double>};

}  // namespace megaforge::wkv7
