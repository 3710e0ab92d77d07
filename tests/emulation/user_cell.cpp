// cuLaunchKernel's place in the emulation: a kernel is a function of its arguments' addresses.
#include <cstdint>
#include <exception>
#include <string>

#include "emulation/runtime.h"

namespace {

std::string error;

}  // namespace

extern "C" int emulated_launch(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                               unsigned block_x, unsigned block_y, unsigned block_z,
                               unsigned shared_bytes, void* stream, void** arguments,
                               void** extra) {
  using namespace fastbptt;
  struct Context {
    void (*kernel)(void**);
    void** arguments;
  };
  const Context context{reinterpret_cast<void (*)(void**)>(kernel), arguments};
  const emulation::Call call{[](const void* pointer) {
                               const auto& c = *static_cast<const Context*>(pointer);
                               c.kernel(c.arguments);
                             },
                             &context};
  try {
    if (block_y != 1 || block_z != 1 || stream || extra) {
      throw emulation::Fault("a user's cell is launched with something else");
    }
    emulation::run_grid(call, Grid{{grid_x, grid_y, grid_z}, int(block_x), int64_t(shared_bytes)},
                        emulation::Site::here());
  } catch (const std::exception& fault) {
    error = fault.what();
    return 1;
  }
  return 0;
}

extern "C" const char* emulated_error() { return error.c_str(); }

// "forward", "reverse" or "random" by their numbers, as in runtime.h.
extern "C" void emulated_order(int order, uint64_t seed) {
  using namespace fastbptt::emulation;
  set_schedule({order == 0   ? Order::kForward
                : order == 1 ? Order::kReverse
                             : Order::kRandom,
                false, seed});
}
