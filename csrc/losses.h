// Where the gradients that a backward pass is given are not zero: no torch.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastbptt {

// Rows of numbers of any floating dtype, known by their bits. NaN and infinity are not zero, -0 is.
struct GradientRows {
  const char* data = nullptr;  // null: zeros
  int64_t stride = 0;          // bytes from row to row
  int64_t bytes = 0;           // of the numbers of a row
  uint64_t magnitudes = 0;     // all bits of eight bytes of numbers but the signs

  GradientRows() = default;
  GradientRows(const void* data, int64_t element_size, int64_t ld, int64_t columns)
      : data(static_cast<const char*>(data)),
        stride(ld * element_size),
        bytes(columns * element_size),
        magnitudes(element_size == 8   ? 0x7fffffffffffffff
                   : element_size == 4 ? 0x7fffffff7fffffff
                                       : 0x7fff7fff7fff7fff) {}

  bool any(int64_t row) const {
    if (!data) return false;
    const char* begin = data + row * stride;
    constexpr int64_t kBlock = 128;  // between two looks at what was found: the sum runs in vectors
    for (int64_t i = 0; i < bytes; i += kBlock) {
      uint64_t words[kBlock / sizeof(uint64_t)] = {}, found = 0;
      std::memcpy(words, begin + i, size_t(bytes - i < kBlock ? bytes - i : kBlock));
      for (const uint64_t word : words) found |= word;
      if (found & magnitudes) return true;
    }
    return false;
  }
};

// The steps and final states whose gradient from outside is not zero. What lies behind the last of
// them, on the way that the state goes, has none at all.
struct Losses {
  GradientRows output;    // [N]
  GradientRows h_n, c_n;  // [B]
  bool all_ends = false;  // every final state counts

  bool at_step(int64_t row) const { return output.any(row); }
  bool at_end(int64_t b) const { return all_ends || h_n.any(b) || c_n.any(b); }
};

}  // namespace fastbptt
