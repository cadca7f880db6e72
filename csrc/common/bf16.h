// bfloat16, whichever compiler reads it.
#pragma once

#include <cstdint>

namespace megaforge {

struct Bf16 {
  std::uint16_t bits;
};

}  // namespace megaforge
