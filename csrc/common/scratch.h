// Scratch memory of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace megaforge {

// Equal shares of cache-aligned scratch; made before threads start, since an exception must not leave them.
class Scratch {
 public:
  Scratch(std::int64_t shares, std::int64_t bytes)
      : share_((static_cast<std::size_t>(bytes) + 63) / 64 * 64),
        data_(static_cast<char*>(::operator new(share_ * static_cast<std::size_t>(shares), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* of(std::int64_t share) const { return data_ + share_ * static_cast<std::size_t>(share); }

 private:
  std::size_t share_;
  char* data_;
};

}  // namespace megaforge
