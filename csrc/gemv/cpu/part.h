// What products take at a time, in the registers of the instruction set that MF_ISA names; included behind its lanes.

namespace megaforge::gemv::MF_ISA {

// What a product takes at a time of a row and of a vector.
template <class T>
struct Part {
  using Values = Vec;
  static constexpr int kValues = kLanes;
  static Values load(const T* from) { return MF_ISA::load(from); }
  static Values load_some(const T* from, int64_t count) { return MF_ISA::load_some(from, count); }
  static Vec product(Values a, Values b, Vec sum) { return multiply_add(a, b, sum); }
};

}  // namespace megaforge::gemv::MF_ISA
