// Attention of one token of each sequence to its cache, for the instruction set that MF_ISA names; included once by each
// of its files.

namespace megaforge::decode::MF_ISA {

// A head of a query or key: normed, rotated.
template <class T>
inline void prepare_head(const Attention<T>& layer, const Norm& norm, const float* from, int64_t token, float* spare, float* to) {
  const int64_t width = layer.width, pairs = layer.pairs;
  if (norm.weight != nullptr) {
    normalize(norm, from, width, spare);
    from = spare;
  }
  const int64_t step = layer.interleaved ? 2 : 1, second = layer.interleaved ? 1 : pairs;
  const float *cosine = layer.cosine + token * pairs, *sine = layer.sine + token * pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = from[step * i], b = from[step * i + second];
    to[i] = a * cosine[i] - b * sine[i];
    to[pairs + i] = b * cosine[i] + a * sine[i];
  }
  for (int64_t i = 2 * pairs; i < width; ++i) to[i] = from[i];
}

// e^(score - largest) in place; their sum.
inline float exponentials(float* scores, int64_t count) {
  float largest = scores[0], sum = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = exponential(scores[i] - largest);
    sum += scores[i];
  }
  return sum;
}

// The queries of one group of one token: the token's key and value go into the cache, then all of it is read.
template <class T>
inline void one_group(const Attention<T>& layer, const AttentionMemory<T>& memory, int64_t token, int64_t group) {
  const int64_t width = layer.width, each = layer.heads / layer.groups, first = group * each;
  const float* fused = memory.fused + token * layer.qkv.n;
  T* keys = layer.keys + (token * layer.groups + group) * layer.capacity * width;
  T* values = layer.values + (token * layer.groups + group) * layer.capacity * width;
  prepare_head(layer, layer.key_norm, fused + (layer.heads + group) * width, token, memory.sums, memory.queries);
  const float* value = fused + (layer.heads + layer.groups + group) * width;
  for (int64_t i = 0; i < width; ++i) {
    store(memory.queries[i], keys + layer.place * width + i);
    store(value[i], values + layer.place * width + i);
  }
  for (int64_t q = 0; q < each; ++q) {
    prepare_head(layer, layer.query_norm, fused + (first + q) * width, token, memory.sums, memory.queries + q * width);
  }
  const int64_t begin = layer.unused == nullptr ? 0 : layer.unused[token], count = layer.place + 1 - begin;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t q = 0; q < each; ++q) {
      memory.scores[q * count + j] = scale * dot(memory.queries + q * width, keys + (begin + j) * width, width);
    }
  }
  float* sums = memory.sums;
  for (int64_t i = 0; i < each * width; ++i) sums[i] = 0;
  // The queries are done with: their rows keep the scale of each head's sum.
  for (int64_t q = 0; q < each; ++q) memory.queries[q * width] = 1.0f / exponentials(memory.scores + q * count, count);
  for (int64_t j = 0; j < count; ++j) {
    const T* row = values + (begin + j) * width;
    for (int64_t q = 0; q < each; ++q) {
      const float share_of = memory.scores[q * count + j];
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sums[q * width + i] += share_of * as_float(row[i]);
    }
  }
  T* context = memory.context + (token * layer.heads + first) * width;
  for (int64_t q = 0; q < each; ++q) {
    for (int64_t i = 0; i < width; ++i) store(sums[q * width + i] * memory.queries[q * width], context + q * width + i);
  }
}

template <class T>
void attention(const Block<T>& block, const Attention<T>& layer, const AttentionMemory<T>& memory, const Team& team) {
  for (int64_t m = 0; m < block.tokens; ++m) {
    normalize(layer.norm, block.x + m * block.hidden, block.hidden, memory.normed + m * block.hidden);
  }
  multiply(layer.qkv, memory.normed, block.tokens, memory.fused, share(layer.qkv.n, granule(layer.qkv), team));
  wait_for_all();
  const Range items = share(block.tokens * layer.groups, 1, team);
  for (int64_t item = items.begin; item < items.end; ++item) {
    one_group(layer, memory, item / layer.groups, item % layer.groups);
  }
  wait_for_all();
  const T* context = memory.context;
  if (layer.sub_norm.weight != nullptr) {
    const int64_t wide = layer.heads * layer.width;
    for (int64_t m = 0; m < block.tokens; ++m) {
      normalize(layer.sub_norm, context + m * wide, wide, memory.normed + m * wide);
    }
    context = memory.normed;
  }
  add_product(layer.output, context, block.tokens, memory.out, block.x, team);
}

}  // namespace megaforge::decode::MF_ISA
