// torch.ops.emulation: what tests ask of the emulation.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <set>
#include <string>
#include <utility>

#include "cuda/torch/allocate.h"
#include "emulation/runtime.h"
#include "emulation/step_graph.h"

namespace fastbptt::emulation {
namespace {

void set_order(c10::string_view order, bool early_copies, int64_t seed) {
  TORCH_CHECK(order == "forward" || order == "reverse" || order == "random",
              "order must be \"forward\", \"reverse\" or \"random\", got \"", order, "\"");
  set_schedule({order == "forward"   ? Order::kForward
                : order == "reverse" ? Order::kReverse
                                     : Order::kRandom,
                early_copies, uint64_t(seed)});
}

void set_limits(int64_t capability, int64_t multiprocessors, int64_t shared_bytes, int64_t code,
                at::IntArrayRef gpcs) {
  set_device_limits({int(capability), int(multiprocessors), shared_bytes},
                    {int(code), std::vector<int>(gpcs.begin(), gpcs.end())});
}

at::Tensor guarded_copy(const at::Tensor& tensor) {
  return allocate(tensor.sizes(), tensor.options()).copy_(tensor);
}

int64_t set_graph_fault(c10::string_view fault) {
  static const std::set<std::string> kFaults{"",      "captured", "stream", "allocates",
                                             "begin", "inside",   "end",    "replay"};
  TORCH_CHECK(kFaults.count(std::string(fault)), "no fault \"", fault, "\"");
  graph_fault = fault;
  return std::exchange(graph_replays, 0);
}

}  // namespace

TORCH_LIBRARY(emulation, m) {
  // The schedule of the launches to come: "forward", "reverse" or "random", see runtime.h.
  m.def("set_order(str order, bool early_copies=False, int seed=0) -> ()", set_order);
  // The device; an H100 unless set. gpcs: the SMs of each, in one of which a cluster stays; none: they
  // are one. code: the architecture that what runs was compiled for; 0: the device's.
  m.def(
      "set_limits(int capability=90, int multiprocessors=132, int shared_bytes=232448, int code=0, "
      "int[] gpcs=[]) -> ()",
      set_limits);
  // How often the device was asked how many clusters it can run.
  m.def("questions() -> int", questions);
  // Launches of kernels that use shared memory fail from now on, or no longer.
  m.def("refuse_launches(bool refuse) -> ()", refuse_launches);
  // What goes wrong with the graphs of steps to come, see step_graph.h. Gives how many replays there
  // have been since the last call.
  m.def("set_graph_fault(str fault=\"\") -> int", set_graph_fault);
  // Raises if memory around a tensor that the glue has allocated was written to.
  m.def("check_guards() -> ()", check_guards);
  // The same values in memory like that.
  m.def("guarded_copy(Tensor tensor) -> Tensor", guarded_copy);
}

}  // namespace fastbptt::emulation
