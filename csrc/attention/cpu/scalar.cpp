// Causal attention for any CPU.
#include <cstddef>
#include <cstdint>

#include "attention.h"

#define MF_ISA scalar
#define MF_WIDTH 4
#include "types.h"
#include "narrow.h"
#include "lanes.h"
#include "vec.h"

#include "pack.h"

#include "backward.h"
#include "forward.h"

namespace megaforge::attention {

const Kernels scalar_kernels = {scalar::forward_bytes<scalar::F32>, scalar::forward_unit<scalar::F32>,
    scalar::backward_bytes<scalar::F32>, scalar::backward_unit<scalar::F32>};

}  // namespace megaforge::attention
