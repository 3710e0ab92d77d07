// The memory that the kernels of a calling thread work in.
#pragma once

#include <ATen/Context.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstring>

namespace fastbptt {

// A kernel's workspace. It stays with the calling thread for its next call: the system clears memory
// that is given back to it, which can take as long as a third of a call's own work.
class Workspace {
 public:
  // 64-aligned, like all that torch allocates, and seen by its profilers when it grows.
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      release();
      memory_ = c10::GetCPUAllocator()->allocate(size_t(bytes));
      size_ = bytes;
    }
    const auto& context = at::globalContext();
    if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
      std::memset(memory_.get(), 0xff, size_t(bytes));  // NaN in every dtype
    }
    return memory_.get();
  }
  // Gives back what is too much to keep.
  void trim() {
    constexpr int64_t kMostKept = 32 << 20;  // bytes: enough for 768 units of an LSTM
    if (size_ > kMostKept) release();
  }
  void release() {
    memory_.clear();
    size_ = 0;
  }

 private:
  c10::DataPtr memory_;
  int64_t size_ = 0;
};

inline thread_local Workspace workspace;

}  // namespace fastbptt
