// The memory that passes work in.
#pragma once

#include <cstdint>

namespace fastbptt {

// Bytes that the windows of a truncated backward pass may take when they are stacked.
int64_t workspace_limit();
void set_workspace_limit(int64_t bytes);

// Frees the memory that the calling thread keeps for its next call on the CPU.
void release_workspace();

// Bytes that may lie between the layers of a stack that the CPU runs by one call; 0: it runs none so.
int64_t stack_limit();
void set_stack_limit(int64_t bytes);

}  // namespace fastbptt
