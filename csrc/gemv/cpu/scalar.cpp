// Products with a few vectors for any CPU.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "gemv.h"

#define MF_ISA scalar
#include "values.h"
#include "lanes_scalar.h"
#include "part.h"

#include "products.h"

namespace megaforge::gemv {

const Kernels scalar_kernels = {scalar::part<float>, scalar::part<Bf16>};

}  // namespace megaforge::gemv
