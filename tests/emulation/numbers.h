// The emulation's 16-bit types; see csrc/cuda/numbers.h.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace fastbptt {

using half_t = c10::Half;
using bfloat16_t = c10::BFloat16;

}  // namespace fastbptt
