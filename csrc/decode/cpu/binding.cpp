// The CPU implementation of megaforge::decode_*; megaforge/kernels/decode/native.py defines them.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <string_view>
#include <vector>

#include "decode.h"

namespace megaforge::decode {
namespace {

using at::Tensor;
using Tensors = c10::List<std::optional<Tensor>>;
using std::int64_t;

template <class T>
constexpr at::ScalarType kType = at::kFloat;
template <>
constexpr at::ScalarType kType<Bf16> = at::kBFloat16;

template <class U>
U* data_of(const Tensor& tensor, int64_t count, at::ScalarType type) {
  TORCH_CHECK(tensor.numel() == count && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.is_cpu(),
              "megaforge::decode: expected ", count, " contiguous elements of ", type, ", not ", tensor.sizes(), " of ",
              tensor.scalar_type());
  return static_cast<U*>(tensor.data_ptr());
}

template <class T>
Matrix<T> matrix_of(const Tensor& weight, const std::optional<Tensor>& bias, int64_t inputs) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == inputs && weight.scalar_type() == kType<T> && weight.is_cpu() &&
                  (weight.stride(0) == 1 || weight.stride(1) == 1),
              "megaforge::decode: expected a matrix of ", kType<T>, " with ", inputs, " columns, not ", weight.sizes(),
              " of ", weight.scalar_type());
  const bool turned = weight.stride(1) != 1;
  return {weight.size(0), inputs, weight.stride(turned ? 1 : 0), static_cast<const T*>(weight.const_data_ptr()), turned,
          bias.has_value() ? data_of<const T>(*bias, weight.size(0), kType<T>) : nullptr};
}

// Codes as bitgemm_prepare makes them, with scales [n] or [n, groups].
bitgemm::Matrix codes_of(const Tensor& panels, const Tensor& scale, int64_t inputs) {
  const int64_t groups = scale.dim() == 2 ? scale.size(1) : 1;
  const auto* steps = data_of<const float>(scale, scale.numel(), at::kFloat);
  TORCH_CHECK(scale.dim() >= 1 && inputs % groups == 0 && inputs / groups % 32 == 0 && panels.is_contiguous(),
              "megaforge::decode: packed matrices have a scale a row and neighbourhoods of whole 32 columns");
  for (const int bits : {1, 2, 4}) {
    const bitgemm::Shape shape{bits, scale.size(0), inputs, groups, panels.scalar_type() == at::kShort};
    if (shape.words ? bits == 1 && bitgemm::prefers_words(1) : panels.dim() == 5 && panels.size(2) == shape.steps()) {
      TORCH_CHECK(static_cast<int64_t>(panels.nbytes()) == shape.bytes(), "megaforge::decode: packed codes ",
                  panels.sizes(), " are not of ", shape.rows, " rows of ", inputs);
      return {shape, panels.const_data_ptr(), steps, groups};
    }
  }
  TORCH_CHECK(false, "megaforge::decode: packed codes ", panels.sizes(), " are not of ", inputs, " columns on this CPU");
}

// Threads that are worth waiting for each other, in a step that reads so many elements of matrices.
int threads_for(int64_t elements) {
  constexpr int64_t kWorthAThread = 1 << 17;
  return static_cast<int>(std::clamp<int64_t>(elements / kWorthAThread, 1, std::max(at::get_num_threads(), 1)));
}

template <class... Matrices>
int64_t elements_of(const Matrices&... matrices) {
  return (int64_t{0} + ... + (matrices.n * matrices.k));
}

template <class T>
int64_t elements_of_block(const Block<T>& block) {
  int64_t sum = 0;
  if (block.time_mix != nullptr) {
    const TimeMix<T>& layer = *block.time_mix;
    sum += elements_of(layer.receptance, layer.key, layer.value, layer.output);
    for (int i = 0; i < layer.maps(); ++i) sum += elements_of(layer.first[i], layer.second[i]);
  }
  if (block.attention != nullptr) {
    const Attention<T>& layer = *block.attention;
    sum += elements_of(layer.qkv, layer.output);
    sum += 2 * block.tokens * layer.groups * layer.width * (layer.place + 1);
  }
  if (block.ffn != nullptr) sum += elements_of(block.ffn->up, block.ffn->down);
  return sum;
}

// Takes one argument after the other; what a list lacks is an error.
class Arguments {
 public:
  Arguments(const Tensors& weights, at::TensorList states, const Tensors& inputs, at::IntArrayRef sizes,
            at::ArrayRef<double> epsilons)
      : weights_(weights), states_(states), inputs_(inputs), sizes_(sizes), epsilons_(epsilons) {}

  std::optional<Tensor> weight() { return next(weights_, weight_); }
  std::optional<Tensor> input() { return next(inputs_, input_); }
  const Tensor& state() {
    TORCH_CHECK(state_ < states_.size(), "megaforge::decode: too few states");
    return states_[state_++];
  }
  int64_t size() {
    TORCH_CHECK(size_ < sizes_.size(), "megaforge::decode: too few sizes");
    return sizes_[size_++];
  }

  // fp32 values; null where there are none.
  const float* vector(int64_t count) {
    const auto tensor = weight();
    return tensor.has_value() ? data_of<const float>(*tensor, count, at::kFloat) : nullptr;
  }
  const float* wanted(int64_t count) {
    const float* data = vector(count);
    TORCH_CHECK(data != nullptr, "megaforge::decode: a vector is missing");
    return data;
  }
  Norm norm(int64_t count) {
    TORCH_CHECK(epsilon_ < epsilons_.size(), "megaforge::decode: too few epsilons");
    const float *weight = vector(count), *bias = vector(count);
    return {weight, bias, static_cast<float>(epsilons_[epsilon_++])};
  }
  Norm wanted_norm(int64_t count) {
    const Norm made = norm(count);
    TORCH_CHECK(made.weight != nullptr, "megaforge::decode: a norm is missing");
    return made;
  }
  // A matrix and its bias.
  template <class T>
  Matrix<T> matrix(int64_t inputs) {
    const auto values = weight(), bias = weight();
    TORCH_CHECK(values.has_value(), "megaforge::decode: a matrix is missing");
    return matrix_of<T>(*values, bias, inputs);
  }
  // That, or packed codes and their scales.
  template <class T>
  Matrix<T> matrix_or_codes(int64_t inputs) {
    TORCH_CHECK(weight_ + 1 < weights_.size(), "megaforge::decode: too few tensors");
    const auto values = weights_.get(weight_), scale = weights_.get(weight_ + 1);
    if (!values.has_value() || (values->scalar_type() != at::kByte && values->scalar_type() != at::kShort)) {
      return matrix<T>(inputs);
    }
    weight_ += 2;
    TORCH_CHECK(scale.has_value(), "megaforge::decode: packed codes without scales");
    codes_.push_back(codes_of(*values, *scale, inputs));
    Matrix<T> made;
    made.n = codes_.back().shape.rows;
    made.k = inputs;
    made.packed = &codes_.back();
    return made;
  }
  void finish() const {
    TORCH_CHECK(weight_ == weights_.size() && state_ == states_.size() && input_ == inputs_.size() &&
                    size_ == sizes_.size() && epsilon_ == epsilons_.size(),
                "megaforge::decode: too many arguments");
  }

 private:
  static std::optional<Tensor> next(const Tensors& from, std::size_t& at) {
    TORCH_CHECK(at < from.size(), "megaforge::decode: too few tensors");
    return from.get(at++);
  }

  const Tensors& weights_;
  at::TensorList states_;
  const Tensors& inputs_;
  at::IntArrayRef sizes_;
  at::ArrayRef<double> epsilons_;
  std::size_t weight_ = 0, state_ = 0, input_ = 0, size_ = 0, epsilon_ = 0;
  std::deque<bitgemm::Matrix> codes_;  // what the layers' matrices point to
};

template <class T>
TimeMix<T> time_mix_of(Arguments& given, int64_t tokens, int64_t hidden) {
  TimeMix<T> layer;
  layer.heads = given.size();
  layer.size = given.size();
  layer.makes_v_first = given.size() != 0;
  const int64_t wide = layer.channels();
  layer.norm = given.wanted_norm(hidden);
  for (const float*& mix : layer.mix) mix = given.wanted(hidden);
  for (Matrix<T>* each : {&layer.receptance, &layer.key, &layer.value}) {
    *each = given.matrix_or_codes<T>(hidden);
    TORCH_CHECK(each->n == wide, "megaforge::decode: a projection has ", each->n, " outputs, not ", wide);
  }
  layer.output = given.matrix_or_codes<T>(wide);
  for (int i = 0; i < layer.maps(); ++i) {
    layer.first[i] = given.matrix<T>(hidden);
    layer.second[i] = given.matrix<T>(layer.first[i].n);
    TORCH_CHECK(layer.second[i].n == wide, "megaforge::decode: a low-rank map has ", layer.second[i].n, " outputs");
  }
  for (const float** each : {&layer.w0, &layer.a0, &layer.k_k, &layer.k_a, &layer.r_k}) *each = given.wanted(wide);
  layer.v0 = layer.makes_v_first ? nullptr : given.wanted(wide);
  layer.head_norm = given.wanted_norm(wide);
  TORCH_CHECK(layer.head_norm.bias != nullptr && layer.output.n == hidden, "megaforge::decode: not a time mix");
  layer.v_first = data_of<float>(given.state(), tokens * wide, at::kFloat);
  layer.shift = data_of<T>(given.state(), tokens * hidden, kType<T>);
  layer.wkv = data_of<float>(given.state(), tokens * wide * layer.size, at::kFloat);
  return layer;
}

template <class T>
Attention<T> attention_of(Arguments& given, int64_t tokens, int64_t hidden) {
  Attention<T> layer;
  layer.heads = given.size();
  layer.groups = given.size();
  layer.width = given.size();
  layer.interleaved = given.size() != 0;
  layer.place = given.size();
  TORCH_CHECK(layer.groups > 0 && layer.heads % layer.groups == 0, "megaforge::decode: heads do not divide into groups");
  layer.norm = given.wanted_norm(hidden);
  layer.qkv = given.matrix_or_codes<T>(hidden);
  layer.output = given.matrix_or_codes<T>(layer.heads * layer.width);
  layer.query_norm = given.norm(layer.width);
  layer.key_norm = given.norm(layer.width);
  layer.sub_norm = given.norm(layer.heads * layer.width);
  TORCH_CHECK(layer.qkv.n == (layer.heads + 2 * layer.groups) * layer.width && layer.output.n == hidden,
              "megaforge::decode: projections of attention do not fit its heads");
  const Tensor keys = given.state(), values = given.state();
  TORCH_CHECK(keys.dim() == 4 && keys.size(2) > layer.place && layer.place >= 0, "megaforge::decode: the cache is full");
  layer.capacity = keys.size(2);
  const int64_t kept = tokens * layer.groups * layer.capacity * layer.width;
  layer.keys = data_of<T>(keys, kept, kType<T>);
  layer.values = data_of<T>(values, kept, kType<T>);
  const auto cosine = given.input(), sine = given.input(), unused = given.input();
  layer.pairs = cosine.has_value() ? cosine->numel() / tokens : 0;
  TORCH_CHECK(2 * layer.pairs <= layer.width && cosine.has_value() == sine.has_value(),
              "megaforge::decode: tables of angles do not fit the heads");
  layer.cosine = cosine.has_value() ? data_of<const float>(*cosine, tokens * layer.pairs, at::kFloat) : nullptr;
  layer.sine = sine.has_value() ? data_of<const float>(*sine, tokens * layer.pairs, at::kFloat) : nullptr;
  layer.unused = unused.has_value() ? data_of<const int64_t>(*unused, tokens, at::kLong) : nullptr;
  for (int64_t m = 0; layer.unused != nullptr && m < tokens; ++m) {
    TORCH_CHECK(layer.unused[m] >= 0 && layer.unused[m] <= layer.place, "megaforge::decode: more unused places than places");
  }
  return layer;
}

Activation activation_of(std::string_view name) {
  if (name == "relu2") return Activation::squared_relu;
  if (name == "gated_relu2") return Activation::gated_squared_relu;
  if (name == "swiglu") return Activation::swiglu;
  if (name == "gelu") return Activation::gelu;
  TORCH_CHECK(name == "gelu_exact", "megaforge::decode: no activation ", std::string(name));
  return Activation::gelu_exact;
}

template <class T>
void check_ffn(const Matrix<T>& up, const Matrix<T>& down, Activation activation, int64_t hidden) {
  TORCH_CHECK(up.n == down.k * (is_gated(activation) ? 2 : 1) && down.n == hidden,
              "megaforge::decode: the matrices of an FFN do not fit each other: ", up.n, " outputs before ", down.k,
              " inputs");
  TORCH_CHECK(up.packed == nullptr || !is_gated(activation) || down.k % up.packed->shape.granule() == 0,
              "megaforge::decode: gates of ", down.k, " rows share a panel of packed codes");
}

template <class T>
Entry<T> entry_of(Arguments& given, int64_t tokens, int64_t hidden) {
  Entry<T> entry;
  entry.norm = given.wanted_norm(hidden);
  entry.mix = given.vector(hidden);
  if (entry.mix != nullptr) entry.shift = data_of<T>(given.state(), tokens * hidden, kType<T>);
  return entry;
}

template <class T>
void compute_block(const Tensor& x, std::string_view mixer, std::string_view ffn, Arguments& given) {
  const int64_t tokens = x.size(0), hidden = x.size(1);
  Block<T> block{tokens, hidden, data_of<float>(x, tokens * hidden, at::kFloat)};
  TimeMix<T> time_mix;
  Attention<T> attention;
  FFN<T> dense;
  Router<T> router;
  if (mixer == "rwkv7") {
    time_mix = time_mix_of<T>(given, tokens, hidden);
    block.time_mix = &time_mix;
  } else {
    TORCH_CHECK(mixer == "attention", "megaforge::decode: no mixer ", std::string(mixer));
    attention = attention_of<T>(given, tokens, hidden);
    block.attention = &attention;
  }
  if (ffn == "router") {
    router.entry = entry_of<T>(given, tokens, hidden);
    router.scores = given.matrix<float>(hidden);
    router.inside = data_of<T>(given.state(), tokens * hidden, kType<T>);
    router.logits = data_of<float>(given.state(), tokens * router.scores.n, at::kFloat);
    block.router = &router;
  } else if (!ffn.empty()) {
    dense.activation = activation_of(ffn);
    dense.entry = entry_of<T>(given, tokens, hidden);
    dense.up = given.matrix_or_codes<T>(hidden);
    dense.down = given.matrix_or_codes<T>(dense.up.n / (is_gated(dense.activation) ? 2 : 1));
    dense.sub_norm = given.norm(dense.down.k);
    check_ffn(dense.up, dense.down, dense.activation, hidden);
    block.ffn = &dense;
  }
  given.finish();
  run(block, threads_for(elements_of_block(block)));
}

void check_tokens(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1 && x.size(0) <= kMostTokens && x.size(1) >= 1,
              "megaforge::decode: takes [1 to ", kMostTokens, ", hidden], not ", x.sizes());
}

at::ScalarType type_of(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "megaforge::decode: takes float32 or bfloat16, not ", type);
  return type;
}

void block(const Tensor& x, c10::string_view mixer, c10::string_view ffn, const Tensors& weights, at::TensorList states,
           const Tensors& inputs, at::IntArrayRef sizes, at::ArrayRef<double> epsilons) {
  check_tokens(x);
  Arguments given(weights, states, inputs, sizes, epsilons);
  const bool mixes = mixer == "rwkv7";  // a state of its type: the shift, or the keys
  TORCH_CHECK(states.size() > (mixes ? 1 : 0), "megaforge::decode: too few states");
  const std::string_view names[] = {{mixer.data(), mixer.size()}, {ffn.data(), ffn.size()}};
  if (type_of(states[mixes ? 1 : 0]) == at::kFloat) compute_block<float>(x, names[0], names[1], given);
  else compute_block<Bf16>(x, names[0], names[1], given);
}

// Where the tokens of each expert that any token comes to are listed.
template <class T>
std::vector<Expert<T>> assigned(const Tensor& experts, const Tensor& weights, const Tensor& up, const Tensor& down,
                                const std::optional<Tensor>& sub_norm, float epsilon) {
  std::vector<Expert<T>> found;
  std::vector<int64_t> place(static_cast<std::size_t>(up.size(0)), -1);
  const auto* chosen = data_of<const int>(experts, weights.numel(), at::kInt);
  const auto* shares = data_of<const float>(weights, weights.numel(), at::kFloat);
  const int64_t each = weights.size(1);
  for (int64_t i = 0; i < weights.numel(); ++i) {
    TORCH_CHECK(chosen[i] >= 0 && chosen[i] < up.size(0), "megaforge::decode: there is no expert ", chosen[i]);
    int64_t& at = place[static_cast<std::size_t>(chosen[i])];
    if (at < 0) {
      at = static_cast<int64_t>(found.size());
      Expert<T> expert{};
      expert.up = matrix_of<T>(up.select(0, chosen[i]), {}, up.size(2));
      expert.down = matrix_of<T>(down.select(0, chosen[i]), {}, down.size(2));
      if (sub_norm.has_value()) {
        expert.sub_norm = {data_of<const float>(*sub_norm, up.size(0) * down.size(2), at::kFloat) + chosen[i] * down.size(2),
                           nullptr, epsilon};
      }
      found.push_back(expert);
    }
    Expert<T>& expert = found[static_cast<std::size_t>(at)];
    TORCH_CHECK(expert.count < kMostTokens, "megaforge::decode: a token comes to an expert twice");
    expert.token[expert.count] = i / each;
    expert.weight[expert.count++] = shares[i];
  }
  return found;
}

template <class T>
void compute_experts(const Tensor& x, const Tensor& inside, Activation activation, std::vector<Expert<T>> all,
                     const Tensors& shared, float epsilon) {
  const int64_t tokens = x.size(0), hidden = x.size(1);
  if (!shared.empty()) {
    TORCH_CHECK(shared.size() == 5 && shared.get(0).has_value() && shared.get(2).has_value(),
                "megaforge::decode: the shared expert is two matrices with their biases, and a norm");
    const Tensor down = *shared.get(2);
    const std::optional<Tensor> norm = shared.get(4);
    Expert<T> expert{};
    expert.up = matrix_of<T>(*shared.get(0), shared.get(1), hidden);
    expert.down = matrix_of<T>(down, shared.get(3), down.size(1));
    if (norm.has_value()) expert.sub_norm = {data_of<const float>(*norm, down.size(1), at::kFloat), nullptr, epsilon};
    for (expert.count = 0; expert.count < tokens; ++expert.count) {
      expert.token[expert.count] = expert.count;
      expert.weight[expert.count] = 1;
    }
    all.push_back(expert);
  }
  int64_t elements = 0;
  for (const Expert<T>& expert : all) {
    check_ffn(expert.up, expert.down, activation, hidden);
    elements += elements_of(expert.up, expert.down);
  }
  run(Experts<T>{tokens, hidden, data_of<float>(x, tokens * hidden, at::kFloat),
                 data_of<const T>(inside, tokens * hidden, kType<T>), activation, all.data(),
                 static_cast<int64_t>(all.size())},
      threads_for(elements));
}

void experts(const Tensor& x, const Tensor& inside, const Tensor& chosen, const Tensor& weights, c10::string_view activation,
             const Tensor& up, const Tensor& down, const std::optional<Tensor>& sub_norm, const Tensors& shared,
             double epsilon) {
  check_tokens(x);
  TORCH_CHECK(weights.dim() == 2 && weights.size(0) == x.size(0) && chosen.sizes() == weights.sizes() && up.dim() == 3 &&
                  down.dim() == 3 && up.size(0) == down.size(0) && up.size(2) == x.size(1),
              "megaforge::decode: experts do not fit the tokens");
  const auto kind = activation_of({activation.data(), activation.size()});
  const auto small = static_cast<float>(epsilon);
  if (type_of(inside) == at::kFloat) {
    compute_experts<float>(x, inside, kind, assigned<float>(chosen, weights, up, down, sub_norm, small), shared, small);
  } else {
    compute_experts<Bf16>(x, inside, kind, assigned<Bf16>(chosen, weights, up, down, sub_norm, small), shared, small);
  }
}

template <class T>
void compute_head(const Tensor& x, const Norm& norm, const Tensor& weight, const Tensor& logits) {
  const int64_t tokens = x.size(0), hidden = x.size(1);
  run(Head<T>{tokens, hidden, data_of<const float>(x, tokens * hidden, at::kFloat), norm, matrix_of<T>(weight, {}, hidden),
              data_of<T>(logits, tokens * weight.size(0), kType<T>)},
      threads_for(weight.numel()));
}

Tensor head(const Tensor& x, const Tensor& norm_weight, const std::optional<Tensor>& norm_bias, double epsilon,
            const Tensor& weight) {
  check_tokens(x);
  TORCH_CHECK(weight.dim() == 2, "megaforge::decode: the head is a matrix");
  const int64_t hidden = x.size(1);
  const Norm norm = {data_of<const float>(norm_weight, hidden, at::kFloat),
                     norm_bias.has_value() ? data_of<const float>(*norm_bias, hidden, at::kFloat) : nullptr,
                     static_cast<float>(epsilon)};
  Tensor logits = at::empty({x.size(0), weight.size(0)}, weight.options());
  if (type_of(weight) == at::kFloat) compute_head<float>(x, norm, weight, logits);
  else compute_head<Bf16>(x, norm, weight, logits);
  return logits;
}

TORCH_LIBRARY_IMPL(megaforge, CPU, library) {
  library.impl("decode_block", &block);
  library.impl("decode_experts", &experts);
  library.impl("decode_head", &head);
}

}  // namespace
}  // namespace megaforge::decode

// Importing the module registers the operators; it has no functions of its own.
PyMODINIT_FUNC PyInit__decode_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_decode_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
