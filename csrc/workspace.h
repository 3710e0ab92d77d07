// How much memory the windows of a truncated backward pass may take when they are stacked.
#pragma once

#include <cstdint>

namespace fastbptt {

int64_t workspace_limit();  // bytes
void set_workspace_limit(int64_t bytes);

}  // namespace fastbptt
