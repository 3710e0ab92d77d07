// torch.ops.emulation_test: the test kernels.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <map>
#include <string>

#include "cuda/torch/allocate.h"
#include "emulation/runtime.h"
#include "emulation/test_kernels.h"

namespace fastbptt::test {
namespace {

Fault parse(c10::string_view name) {
  static const std::map<std::string, Fault> kFaults{
      {"", Fault::kNone},
      {"missing barrier", Fault::kMissingBarrier},
      {"missing barrier after", Fault::kMissingBarrierAfter},
      {"divergent barrier", Fault::kDivergentBarrier},
      {"outsider", Fault::kOutsider},
      {"other count", Fault::kOtherCount},
      {"early exit", Fault::kEarlyExit},
      {"shared bounds", Fault::kSharedBounds},
      {"global bounds", Fault::kGlobalBounds},
      {"divergent shuffle", Fault::kDivergentShuffle},
      {"missing wait", Fault::kMissingWait},
      {"not rounded", Fault::kNotRounded},
      {"wrong count", Fault::kWrongCount},
      {"wrong bytes", Fault::kWrongBytes},
      {"missing fence", Fault::kMissingFence},
      {"missing init", Fault::kMissingInit},
      {"missing empty", Fault::kMissingEmpty},
      {"missing wait for barrier", Fault::kMissingWaitForBarrier},
      {"divergent cluster", Fault::kDivergentCluster},
      {"missing raise", Fault::kMissingRaise},
      {"missing wait for flag", Fault::kMissingWaitForFlag},
      {"not cooperative", Fault::kNotCooperative},
  };
  const auto found = kFaults.find(std::string(name));
  TORCH_CHECK(found != kFaults.end(), "no fault \"", name, "\"");
  return found->second;
}

const float* data(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }
float* data_of(const at::Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

at::Tensor block_sum(const at::Tensor& x, c10::string_view fault) {
  const at::Tensor y = allocate({x.size(0)}, x.options());
  run_block_sum(data(x), data_of(y), x.size(0), int(x.size(1)), parse(fault), Stream{});
  return y;
}

at::Tensor warp_sum(const at::Tensor& x, c10::string_view fault) {
  const at::Tensor y = allocate(x.sizes(), x.options());
  run_warp_sum(data(x), data_of(y), x.size(0), int(x.size(1)), parse(fault), Stream{});
  return y;
}

at::Tensor reversed_tiles(const at::Tensor& x, int64_t valid, c10::string_view fault) {
  const at::Tensor y = allocate(x.sizes(), x.options());
  run_reversed_tiles(data(x), data_of(y), int(x.size(0)), int(valid), int(x.size(1)), parse(fault),
                     Stream{});
  return y;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, bool by_load_matrix,
                   c10::string_view fault) {
  const at::Tensor d = allocate({16, 8}, a.options().dtype(at::kFloat));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.scalar_type(), "product", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      run_product(a.const_data_ptr<scalar_t>(), b.const_data_ptr<scalar_t>(), data_of(d),
                  by_load_matrix, parse(fault), Stream{});
    }
  });
  return d;
}

at::Tensor gather(const at::Tensor& x, c10::string_view fault) {
  const at::Tensor y = allocate(x.sizes(), x.options());
  run_gather(data(x), data_of(y), x.size(0), int(x.size(1)), int(x.size(2)), parse(fault),
             Stream{});
  return y;
}

at::Tensor ring(const at::Tensor& x, int64_t steps, c10::string_view by, c10::string_view fault,
                bool cooperative) {
  const at::Tensor y = allocate(x.sizes(), x.options());
  run_ring(data(x), data_of(y), x.size(0), int(x.size(1)), int(x.size(2)), int(steps),
           by == "store_async" ? By::kStoreAsync
           : by == "stores"    ? By::kStores
                               : By::kBarrier,
           cooperative, parse(fault), Stream{});
  return y;
}

// flag [1], int32.
at::Tensor exchange(const at::Tensor& x, const at::Tensor& flag, int64_t steps,
                    c10::string_view fault) {
  const at::Tensor y = allocate(x.sizes(), x.options());
  const at::Tensor states = allocate({2, x.size(0), x.size(1), x.size(2)}, x.options());
  auto* const own_flag = reinterpret_cast<uint32_t*>(flag.mutable_data_ptr<int32_t>());
  run_exchange(data(x), data_of(y), data_of(states), own_flag, x.size(0), int(x.size(1)),
               int(x.size(2)), int(steps), parse(fault), Stream{});
  return y;
}

at::Tensor approximations(const at::Tensor& x) {
  const at::Tensor y = allocate({5, x.numel()}, x.options());
  run_approximations(data(x), data_of(y), x.numel(), Stream{});
  return y;
}

std::vector<int64_t> limits() {
  const DeviceLimits limits = device_limits();
  return {limits.capability, limits.multiprocessors, limits.shared_bytes};
}

}  // namespace

TORCH_LIBRARY(emulation_test, m) {
  m.def("block_sum(Tensor x, str fault=\"\") -> Tensor", block_sum);
  m.def("warp_sum(Tensor x, str fault=\"\") -> Tensor", warp_sum);
  m.def("reversed_tiles(Tensor x, int valid, str fault=\"\") -> Tensor", reversed_tiles);
  m.def("product(Tensor a, Tensor b, bool by_load_matrix, str fault=\"\") -> Tensor", product);
  m.def("gather(Tensor x, str fault=\"\") -> Tensor", gather);
  m.def("ring(Tensor x, int steps, str by, str fault=\"\", bool cooperative=False) -> Tensor",
        ring);
  m.def("exchange(Tensor x, Tensor(a!) flag, int steps, str fault=\"\") -> Tensor", exchange);
  m.def("approximations(Tensor x) -> Tensor", approximations);
  m.def("limits() -> int[]", limits);
  m.def("resident_gathers(int clusters, int size, int shared_bytes, int threads=128) -> int",
        [](int64_t clusters, int64_t size, int64_t shared_bytes, int64_t threads) {
          return resident_gathers(clusters, int(size), shared_bytes, int(threads));
        });
}

}  // namespace fastbptt::test
