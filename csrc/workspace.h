// The memory that passes work in.
#pragma once

#include <cstdint>

namespace fastbptt {

// Bytes that the windows of a truncated backward pass may take when they are stacked.
int64_t workspace_limit();
void set_workspace_limit(int64_t bytes);

// Frees the memory that the calling thread keeps for its next call on the CPU.
void release_workspace();

}  // namespace fastbptt
