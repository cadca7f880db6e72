// Registers of any CPU, of one number; included once by its file, behind values.h.

namespace megaforge::gemv::MF_ISA {

constexpr int kLanes = 1;
using Vec = float;

inline Vec zero() { return 0; }
inline Vec broadcast(float x) { return x; }
inline Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline float total(Vec x) { return x; }
inline void store_lanes(Vec x, float* to) { *to = x; }
template <class T>
inline Vec load(const T* from) {
  return as_float(*from);
}
template <class T>
inline Vec load_some(const T*, int64_t) {
  return 0;
}

}  // namespace megaforge::gemv::MF_ISA
