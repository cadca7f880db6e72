// WKV-7 on vectors of W floats: what both passes are made of. A file for one instruction set includes this, forward.h and
// backward.h inside a namespace of its own and under that set's target pragma; nothing from the standard library is
// called, so no code for it can leak into another file's.

using Int = std::int64_t;

constexpr Int kHeads = 8;   // heads next to each other in memory that take turns
constexpr Int kTile = 16;   // tokens of a turn of the forward pass
constexpr Int kRun = 16;    // tokens whose states the backward pass holds at once
constexpr int kRows = 4;    // rows of the state that the backward pass works on at once

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef float Unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef std::int32_t Word __attribute__((vector_size(W * 4)));
  typedef std::uint32_t Bits __attribute__((vector_size(W * 4)));
  typedef std::uint16_t Half __attribute__((vector_size(W * 2)));
  typedef std::uint16_t UnalignedHalf __attribute__((vector_size(W * 2), aligned(2), may_alias));
};
template <int W>
using Vec = typename Lanes<W>::Float;

template <int W>
MEGAFORGE_INLINE Vec<W> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<W>::Unaligned*>(from);
}

template <int W>
MEGAFORGE_INLINE void store(float* to, Vec<W> x) {
  *reinterpret_cast<typename Lanes<W>::Unaligned*>(to) = x;
}

template <int W>
MEGAFORGE_INLINE Vec<W> all(float x) {
  return Vec<W>{} + x;
}

MEGAFORGE_INLINE void clear(float* x, Int count) { __builtin_memset(x, 0, static_cast<std::size_t>(count) * sizeof(float)); }
MEGAFORGE_INLINE void copy(float* to, const float* from, Int count) {
  __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}
MEGAFORGE_INLINE Int least(Int x, Int y) { return x < y ? x : y; }
MEGAFORGE_INLINE Int round_up(Int x, Int to) { return (x + to - 1) / to * to; }

// e^x to about one unit in the last place (polynomial of Cephes' expf); what would be denormal becomes 1e-38.
template <int W>
MEGAFORGE_INLINE Vec<W> exponential(Vec<W> x) {
  x = x < -87.3f ? all<W>(-87.3f) : x;
  x = x > 88.0f ? all<W>(88.0f) : x;
  const Vec<W> shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits hold the nearest integer
  const Vec<W> n = shifted - 12582912.0f;
  const Vec<W> rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<W> p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * (rest * rest) + rest + 1.0f;
  using Word = typename Lanes<W>::Word;
  return p * (Vec<W>)((__builtin_convertvector(n, Word) + 127) << 23);
}

template <int W>
struct Exponential {
  MEGAFORGE_INLINE Vec<W> operator()(Vec<W> x) const { return exponential<W>(x); }
};

template <int W>
struct Same {
  MEGAFORGE_INLINE Vec<W> operator()(Vec<W> x) const { return x; }
};

template <int W>
struct FromFloat {
  MEGAFORGE_INLINE Vec<W> operator()(const float* from) const { return load<W>(from); }
};

template <int W>
struct FromHalf {
  MEGAFORGE_INLINE Vec<W> operator()(const std::uint16_t* from) const {
    const typename Lanes<W>::Half half = *reinterpret_cast<const typename Lanes<W>::UnalignedHalf*>(from);
    return (Vec<W>)(__builtin_convertvector(half, typename Lanes<W>::Bits) << 16);
  }
};

// Tokens as floats; a stride in floats.
struct Floats {
  float* data;
  Int stride;

  MEGAFORGE_INLINE float* token(Int t) const { return data + t * stride; }
};

// One head's tokens of a tensor.
struct Tokens {
  const char* data;
  Type type;
  Int stride;  // bytes

  MEGAFORGE_INLINE Tokens(const View& view, Int batch, Int head) : data(nullptr), type(view.type), stride(0) {
    if (view.data == nullptr) return;
    const Int size = static_cast<Int>(size_of(type));
    stride = view.stride_s * size;
    data = static_cast<const char*>(view.data) + (batch * view.stride_b + head * view.stride_h) * size;
  }

  // f(vector of W channels) of `count` tokens from t on as floats, `width` apart; what is beyond channel n is f(0).
  template <int W, typename F>
  MEGAFORGE_INLINE void read(Int t, Int count, Int n, Int width, float* out, F f) const {
    if (data == nullptr || count == 0) {
      for (Int j = 0; j < count * width; j += W) store<W>(out + j, f(Vec<W>{}));
    } else if (type == Type::bf16) {
      read_as<W, std::uint16_t>(t, count, n, width, out, f, FromHalf<W>());
    } else {
      read_as<W, float>(t, count, n, width, out, f, FromFloat<W>());
    }
  }

  template <int W>
  MEGAFORGE_INLINE void read(Int t, Int count, Int n, Int width, float* out) const {
    read<W>(t, count, n, width, out, Same<W>());
  }

  // The same without f, where they are if they can be read there.
  template <int W>
  MEGAFORGE_INLINE Floats floats(Int t, Int count, Int n, Int width, float* room) const {
    if (type == Type::f32 && n == width && data != nullptr) {
      return {reinterpret_cast<float*>(const_cast<char*>(data + t * stride)), stride / 4};
    }
    read<W>(t, count, n, width, room);
    return {room, width};
  }

  // Asks for the line of memory that channel j of token t is in. The token may lie beyond the last one.
  MEGAFORGE_INLINE void prefetch(Int t, Int j) const {
    const auto place = reinterpret_cast<std::uintptr_t>(data) + t * stride + j * size_of(type);
    __builtin_prefetch(reinterpret_cast<const void*>(place));
  }

 private:
  template <int W, typename T, typename F, typename Convert>
  MEGAFORGE_INLINE void read_as(Int t, Int count, Int n, Int width, float* out, F f, Convert convert) const {
    for (Int i = 0; i < count; ++i, out += width) {
      const T* from = reinterpret_cast<const T*>(data + (t + i) * stride);
      Int j = 0;
      for (; j + W <= n; j += W) store<W>(out + j, f(convert(from + j)));
      for (; j < width; j += W) {
        T rest[W]{};
        for (Int m = 0; j + m < n; ++m) rest[m] = from[j + m];
        store<W>(out + j, f(convert(rest)));
      }
    }
  }
};

// One head's tokens of a contiguous result.
struct Result {
  char* data;
  Type type;
  Int stride;  // bytes

  MEGAFORGE_INLINE Result(void* data, Type type, Int rows, Int row, Int n)
      : data(data == nullptr ? nullptr : static_cast<char*>(data) + row * n * static_cast<Int>(size_of(type))),
        type(type),
        stride(rows * n * static_cast<Int>(size_of(type))) {}

  // Asks for the line of memory that channel j of token t will be written to.
  MEGAFORGE_INLINE void prefetch(Int t, Int j) const {
    const auto place = reinterpret_cast<std::uintptr_t>(data) + t * stride + j * size_of(type);
    __builtin_prefetch(reinterpret_cast<const void*>(place), 1);
  }

  // Where tokens from t on are written: their own place if that takes whole vectors of floats.
  MEGAFORGE_INLINE Floats floats(Int t, Int n, Int width, float* room) const {
    if (type == Type::f32 && n == width && data != nullptr) return {reinterpret_cast<float*>(data + t * stride), stride / 4};
    return {room, width};
  }

  template <int W>
  MEGAFORGE_INLINE void write(Int t, Int n, const float* from) const {
    const Int whole = n - n % W;
    if (type == Type::bf16) {
      auto* to = reinterpret_cast<std::uint16_t*>(data + t * stride);
      using Bits = typename Lanes<W>::Bits;
      for (Int j = 0; j < whole; j += W) {
        const Vec<W> x = load<W>(from + j);
        const Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Bits chosen = x == x ? rounded : (bits >> 16) | 0x40u;
        *reinterpret_cast<typename Lanes<W>::UnalignedHalf*>(to + j) =
            __builtin_convertvector(chosen, typename Lanes<W>::Half);
      }
      for (Int j = whole; j < n; ++j) to[j] = to_bf16(from[j]);
    } else {
      auto* to = reinterpret_cast<float*>(data + t * stride);
      for (Int j = 0; j < whole; j += W) store<W>(to + j, load<W>(from + j));
      for (Int j = whole; j < n; ++j) to[j] = from[j];
    }
  }
};

// to[j][i] = from[i][j] for a W x W block: log2 W rounds of exchanges between rows `Half` apart.
template <int W, int Half, int... I>
MEGAFORGE_INLINE void exchange(Vec<W>* x, std::integer_sequence<int, I...>) {
  for (int i = 0; i < W; ++i) {
    if (i & Half) continue;
    const Vec<W> low = x[i], high = x[i + Half];
    x[i] = __builtin_shufflevector(low, high, (I & Half ? I - Half + W : I)...);
    x[i + Half] = __builtin_shufflevector(low, high, (I & Half ? I + W : I + Half)...);
  }
}

template <int W>
MEGAFORGE_INLINE void transpose_block(const float* from, Int from_stride, float* to, Int to_stride) {
  Vec<W> x[W];
  const auto lanes = std::make_integer_sequence<int, W>();
  for (int i = 0; i < W; ++i) x[i] = load<W>(from + i * from_stride);
  if constexpr (W >= 16) exchange<W, 8>(x, lanes);
  exchange<W, 4>(x, lanes);
  exchange<W, 2>(x, lanes);
  exchange<W, 1>(x, lanes);
  for (int i = 0; i < W; ++i) store<W>(to + i * to_stride, x[i]);
}

template <int W>
void transpose(const float* from, Int from_stride, float* to, Int to_stride, Int rows, Int columns) {
  if (rows % W == 0 && columns % W == 0) {
    for (Int i = 0; i < rows; i += W) {
      for (Int j = 0; j < columns; j += W) {
        transpose_block<W>(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
      }
    }
    return;
  }
  for (Int i = 0; i < rows; ++i) {
    for (Int j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}
