// The instruction set that a kernel's CPU code runs with: one build holds all of them.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace megaforge {

enum class Isa { scalar, avx2, avx512 };

// Whether this build has the files avx*.cpp, which builds for other machines leave out, and what this CPU has of x86.
#if defined(__x86_64__)
constexpr bool kX86 = true;
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
inline bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16"); }
inline bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
#else
constexpr bool kX86 = false;
inline bool has_avx2() { return false; }
inline bool has_avx512() { return false; }
inline bool has_bf16_products() { return false; }
inline bool has_vnni() { return false; }
#endif

inline bool cpu_has(Isa isa) {
  if (isa == Isa::avx512) return has_avx512();
  return isa == Isa::scalar || has_avx2();
}

// The best that this CPU has, or what MEGAFORGE_CPU_ISA (avx512, avx2, scalar) asks for.
// Throws std::runtime_error for a name it does not know and for one that this CPU lacks.
inline Isa cpu_isa() {
  const char* wanted = std::getenv("MEGAFORGE_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    for (auto [name, isa] : {std::pair{"avx512", Isa::avx512}, {"avx2", Isa::avx2}, {"scalar", Isa::scalar}}) {
      if (std::strcmp(wanted, name) != 0) continue;
      if (cpu_has(isa)) return isa;
      throw std::runtime_error("MEGAFORGE_CPU_ISA=" + std::string(wanted) + ": this CPU lacks it; unset it");
    }
    throw std::runtime_error("MEGAFORGE_CPU_ISA=" + std::string(wanted) + ": choose avx512, avx2 or scalar");
  }
  if (cpu_has(Isa::avx512)) return Isa::avx512;
  return cpu_has(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

// Of an op's code what cpu_isa() says; `avx512_more` where the CPU has AVX-512 and `more` beside it.
template <class Kernels>
const Kernels& best_kernels(const Kernels& scalar, const Kernels& avx2, const Kernels& avx512,
                            const Kernels& avx512_more, bool more) {
  const Isa isa = cpu_isa();
  if (isa == Isa::avx512) return more ? avx512_more : avx512;
  return isa == Isa::avx2 ? avx2 : scalar;
}

// `avx512_bf16` where the CPU has products of bf16 too.
template <class Kernels>
const Kernels& best_kernels(const Kernels& scalar, const Kernels& avx2, const Kernels& avx512,
                            const Kernels& avx512_bf16) {
  return best_kernels(scalar, avx2, avx512, avx512_bf16, has_bf16_products());
}

// Of what has the scalar form alone: a type, or a build without avx*.cpp, whose callers ask kX86 first: what is named
// behind `if constexpr (kX86)` need not be there. Throws as cpu_isa() does.
template <class Kernels>
const Kernels& best_kernels(const Kernels& scalar) {
  (void)cpu_isa();
  return scalar;
}

}  // namespace megaforge
