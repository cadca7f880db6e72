// Steps of decoding for any CPU.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "gemv/cpu/gemv.h"
#include "memory.h"

#define MF_ISA scalar
#include "gemv/cpu/values.h"
#include "gemv/cpu/lanes_scalar.h"
#include "gemv/cpu/part.h"

#include "gemv/cpu/products.h"

#include "arithmetic.h"

#include "attention.h"
#include "ffn.h"
#include "time_mix.h"

#include "step.h"

namespace megaforge::decode {

const Kernels scalar_kernels = scalar::all_kernels;

}  // namespace megaforge::decode
