// Numbers in memory, for the instruction set that MF_ISA names; included once by each of its files.

namespace megaforge::gemv::MF_ISA {

using std::int64_t;

inline float as_float(Bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
inline float as_float(float x) { return x; }

inline void store(float x, float* to) { *to = x; }
inline void store(float x, Bf16* to) { *to = nearest_bf16(x); }

}  // namespace megaforge::gemv::MF_ISA
