// RWKV-7's time mix, for the instruction set that MF_ISA names; included once by each of its files.

namespace megaforge::decode::MF_ISA {

constexpr int64_t kTurnedGranule = 64;
constexpr float kDecayScale = -0.6065306597126334f;  // -exp(-1/2)

// The normed tokens and their mixes with the ones before; every thread makes all of them.
template <class T>
inline void mix_tokens(const Block<T>& block, const TimeMix<T>& layer, const TimeMixMemory<T>& memory) {
  for (int64_t m = 0; m < block.tokens; ++m) {
    const int64_t row = m * block.hidden;
    normalize(layer.norm, block.x + row, block.hidden, memory.normed + row);
    for (int each = 0; each < TimeMix<T>::kMixes; ++each) {
      const float* mix = layer.mix[each];
      T* out = memory.mixed[each] + row;
#pragma omp simd
      for (int64_t i = 0; i < block.hidden; ++i) {
        const float now = as_float(memory.normed[row + i]), before = as_float(layer.shift[row + i]);
        store(now + (before - now) * mix[i], out + i);
      }
    }
  }
}

template <class T>
inline void first_products(const Block<T>& block, const TimeMix<T>& layer, const TimeMixMemory<T>& memory, const Team& team) {
  enum { kR, kW, kK, kV, kA, kG };
  const int of_map[TimeMix<T>::kMaps] = {kW, kA, kG, kV};
  const Range range = share(layer.channels(), granule(layer.receptance, layer.key, layer.value), team);
  multiply(layer.receptance, memory.mixed[kR], block.tokens, memory.r, range);
  multiply(layer.key, memory.mixed[kK], block.tokens, memory.k, range);
  multiply(layer.value, memory.mixed[kV], block.tokens, memory.v, range);
  // The maps lie turned, a few lines of memory a row: they are split between granules, one after the other.
  int64_t granules = 0, before = 0;
  for (int i = 0; i < layer.maps(); ++i) granules += (layer.first[i].n + kTurnedGranule - 1) / kTurnedGranule;
  const Range own = share(granules, 1, team);
  for (int i = 0; i < layer.maps(); ++i) {
    const int64_t count = layer.first[i].n;
    const auto place = [&](int64_t granule) { return std::clamp<int64_t>((granule - before) * kTurnedGranule, 0, count); };
    multiply(layer.first[i], memory.mixed[of_map[i]], block.tokens, memory.inner[i], {place(own.begin), place(own.end)});
    before += (count + kTurnedGranule - 1) / kTurnedGranule;
  }
}

// The inside of the low-rank maps, which every thread makes, and this thread's outputs of them.
template <class T>
inline void second_products(const Block<T>& block, const TimeMix<T>& layer, const TimeMixMemory<T>& memory, Range channels) {
  for (int i = 0; i < layer.maps(); ++i) {
    const int64_t count = block.tokens * layer.first[i].n;
    const float* from = memory.inner[i];
    T* to = memory.maps[i];
    if (i == 0) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) store(tangent(from[j]), to + j);
    } else if (i == 2) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) store(sigmoid(from[j]), to + j);
    } else {
      for (int64_t j = 0; j < count; ++j) store(from[j], to + j);
    }
    multiply(layer.second[i], memory.maps[i], block.tokens, memory.outer[i], channels);
  }
}

// `size` rows of a head's state: what a removes comes back along b, v is written at k, r reads.
inline void recur(float* state, int64_t size, const float* r, const float* w, const float* k, const float* v,
                  const float* a, const float* b, float* y) {
  for (int64_t i = 0; i < size; ++i) {
    float* row = state + i * size;
    const float removed = dot(row, a, size), value = v[i];
    const Vec removed_all = broadcast(removed), value_all = broadcast(value);
    Vec sums = zero();
    int64_t j = 0;
    for (; j + kLanes <= size; j += kLanes) {
      const Vec written = multiply_add(value_all, load(k + j), multiply_add(load(row + j), load(w + j), zero()));
      const Vec next = multiply_add(removed_all, load(b + j), written);
      gemv::MF_ISA::store_lanes(next, row + j);
      sums = multiply_add(next, load(r + j), sums);
    }
    float read = total(sums);
    for (; j < size; ++j) {
      row[j] = row[j] * w[j] + removed * b[j] + value * k[j];
      read += row[j] * r[j];
    }
    y[i] = read;
  }
}

// One head of one token: the recurrence with the arithmetic around it.
template <class T>
inline void one_head(const TimeMix<T>& layer, const TimeMixMemory<T>& memory, int64_t token, int64_t head) {
  const int64_t size = layer.size, at = head * size, here = token * layer.channels() + at;
  float* row[8];
  for (int i = 0; i < 8; ++i) row[i] = memory.head + i * size;
  auto [w, k, v, a, b, y, unused, bonus_of] = row;
  (void)unused;
  const float *r = memory.r + here, *key = memory.k + here, *value = memory.v + here;
  const float *decay = memory.outer[0] + here, *rate = memory.outer[1] + here, *gate = memory.outer[2] + here;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float learned = sigmoid(layer.a0[at + i] + rate[i]), removed = key[i] * layer.k_k[at + i];
    w[i] = exponential(kDecayScale * sigmoid(layer.w0[at + i] + decay[i]));
    k[i] = key[i] * (1 + (learned - 1) * layer.k_a[at + i]);
    a[i] = removed;
    b[i] = learned;
  }
  const float length = std::sqrt(dot(a, a, size)), scale = 1.0f / (length < 1e-12f ? 1e-12f : length);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float removed = a[i] * scale;
    a[i] = -removed;
    b[i] = removed * b[i];
    bonus_of[i] = r[i] * layer.r_k[at + i];
  }
  float* v_first = layer.v_first + here;
  if (layer.makes_v_first) {
    for (int64_t i = 0; i < size; ++i) v_first[i] = v[i] = value[i];
  } else {
    const float* mix = memory.outer[3] + here;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) v[i] = value[i] + (v_first[i] - value[i]) * sigmoid(layer.v0[at + i] + mix[i]);
  }
  recur(layer.wkv + (token * layer.heads + head) * size * size, size, r, w, k, v, a, b, y);
  float mean, deviation;
  moments(y, size, true, layer.head_norm.epsilon, mean, deviation);
  const float bonus = dot(bonus_of, k, size);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float normed = (y[i] - mean) * deviation * layer.head_norm.weight[at + i] + layer.head_norm.bias[at + i];
    store((normed + bonus * v[i]) * gate[i], memory.gated + here + i);
  }
}

template <class T>
void time_mix(const Block<T>& block, const TimeMix<T>& layer, const TimeMixMemory<T>& memory, const Team& team) {
  mix_tokens(block, layer, memory);
  first_products(block, layer, memory, team);
  wait_for_all();
  remember(layer.shift, memory.normed, block.tokens * block.hidden, team);
  const Range heads = share(layer.heads, 1, team);
  second_products(block, layer, memory, {heads.begin * layer.size, heads.end * layer.size});
  for (int64_t m = 0; m < block.tokens; ++m) {
    for (int64_t head = heads.begin; head < heads.end; ++head) one_head(layer, memory, m, head);
  }
  wait_for_all();
  add_product(layer.output, memory.gated, block.tokens, memory.out, block.x, team);
}

}  // namespace megaforge::decode::MF_ISA
