// The operators' schemas.
#include <torch/library.h>

#include "arguments.h"

TORCH_LIBRARY(fastbptt, m) {
  m.def(fastbptt::kForwardSchema);
  m.def(fastbptt::kBackwardSchema);
}
