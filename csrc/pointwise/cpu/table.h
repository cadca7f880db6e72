// What run.cpp calls, for the instruction set of vec.h; included once by each of its files, last.

namespace megaforge::pointwise::MF_ISA {

// All of an instruction set's code for one type.
template <class T>
constexpr Kernels<T> kernels_of() {
  return {norm<T>, norm_backward<T>, squared_relu<T>, squared_relu_backward<T>, activation<T>,
          activation_backward<T>, label_scores<T>, label_gradients<T>};
}

}  // namespace megaforge::pointwise::MF_ISA
