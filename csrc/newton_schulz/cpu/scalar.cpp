// Newton-Schulz iterations for any CPU.
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <utility>

#include "newton_schulz.h"

#define MF_ISA scalar
#include "words.h"
#include "multiply_wide.h"
#include "products_scalar.h"
#include "transpose.h"

#include "iterate.h"

namespace megaforge::newton_schulz {

const Kernels scalar_kernels = {scalar::scratch_bytes, scalar::orthogonalize, scalar::polynomial};

}  // namespace megaforge::newton_schulz
