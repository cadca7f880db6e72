// What the products by wgmma share: addresses and descriptors of factors in shared memory, and on the host how the hardware
// finds what a descriptor is of.
#pragma once

#include <cstdint>

#include "block.h"

namespace megaforge {

constexpr int kSwizzleAlignment = 1024;  // bytes: eight rows, after which the permutation repeats

// An address in shared memory as instructions of the asynchronous proxy take it.
#ifdef __CUDACC__
MF_DEVICE unsigned shared_address(const void* x) { return static_cast<unsigned>(__cvta_generic_to_shared(x)); }
#else
inline thread_local const unsigned char* shared_memory = nullptr;  // the emulated block's, aligned as a GPU's
inline unsigned shared_address(const void* x) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(x) - shared_memory);
}

// The bytes at `byte` of row `row` of what a descriptor is of: bits 4-6 of the address are permuted by bits 7-9.
inline const unsigned char* described(std::uint64_t descriptor, int row, int byte) {
  const auto start = static_cast<std::int64_t>(descriptor & 0x3fffu) * 16;
  const auto stride = static_cast<std::int64_t>(descriptor >> 32 & 0x3fffu) * 16;
  const std::int64_t address = start + row / 8 * stride + row % 8 * 128 + byte;
  return shared_memory + (address ^ (address >> 3 & 0x70));
}
#endif

// The matrix descriptor (PTX ISA, "Asynchronous warpgroup level matrix instructions") of rows of 128 bytes in the 128-byte
// swizzle, the first at `address`: bits 0-13 are the address / 16, bits 32-45 the bytes from eight rows to the next eight
// / 16, bits 62-63 the swizzle (1: 128 bytes). Bits 16-29, the other stride, count for nothing in this layout; bits 49-51,
// the offset of the permutation, are zero since the stage is aligned to eight rows.
MF_DEVICE std::uint64_t descriptor(unsigned address) {
  return static_cast<std::uint64_t>((address & 0x3ffffu) >> 4) | std::uint64_t{1} << 16 |
         static_cast<std::uint64_t>(kSwizzleAlignment >> 4) << 32 | std::uint64_t{1} << 62;
}

}  // namespace megaforge
