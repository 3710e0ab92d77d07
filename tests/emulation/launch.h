// The emulation's bodies of csrc/cuda/launch.h, which says what they mean.
#pragma once

#include <tuple>

#include "emulation/recording.h"
#include "emulation/runtime.h"

namespace fastbptt {

namespace emulation {

DeviceLimits emulated_limits();
int emulated_device();

// A grid with the place of the launch, for messages.
struct PlacedGrid {
  Grid grid;
  Site site;

  PlacedGrid(const Grid& grid, Site site = Site::here()) : grid(grid), site(site) {}
};

}  // namespace emulation

// An H100's unless a test sets others.
inline DeviceLimits device_limits() { return emulation::emulated_limits(); }

inline int current_device() { return emulation::emulated_device(); }

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const emulation::PlacedGrid& grid, Stream stream,
            const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "as many arguments as the kernel takes");
  struct Context {
    void (*kernel)(Params...);
    std::tuple<Params...> values;
  };
  emulation::check_stream(stream, grid.site);
  emulation::run_or_record([context = Context{kernel, std::tuple<Params...>(args...)}, grid] {
    const emulation::Call call{[](const void* pointer) {
                                 const auto& context = *static_cast<const Context*>(pointer);
                                 std::apply(context.kernel, context.values);
                               },
                               &context};
    emulation::run_grid(call, grid.grid, grid.site);
  });
}

template <typename... Params>
int64_t resident_clusters(void (*)(Params...), const Grid& grid) {
  return emulation::resident_clusters(grid);
}

}  // namespace fastbptt
