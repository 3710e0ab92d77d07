// csrc/cuda/launch.h over a made-up runtime. Prints what is wrong.
#include "cuda/launch.h"

#include <cstdio>
#include <thread>

namespace test {

using namespace fastbptt;
using fake::runtime;

int faults = 0;

void check(bool condition, const char* what) {
  if (condition) return;
  std::printf("%s\n", what);
  ++faults;
}

// Each case has kernels of its own: what launch.h knows of one stays.
template <int>
void kernel(int) {}

template <typename Body>
std::string error_of(const Body& body, bool of_launch) {
  try {
    body();
  } catch (const LaunchError& error) {
    return of_launch ? error.what() : "a LaunchError";
  } catch (const std::runtime_error& error) {
    return of_launch ? "no LaunchError" : error.what();
  }
  return "nothing was thrown";
}

void shared_memory_is_allowed_once() {
  const Grid more{{1}, 128, 200000}, less{{1}, 128, 100000}, none{{1}, 128};
  runtime.before_launch = [&] { launch(kernel<0>, less, nullptr, 0); };
  launch(kernel<0>, more, nullptr, 0);
  launch(kernel<0>, none, nullptr, 0);
  resident_clusters(kernel<0>, less);
  launch(kernel<0>, more, nullptr, 0);
  check(runtime.launches.size() == 4, "a launch with more shared memory fails after one with less");
  const auto address = reinterpret_cast<const void*>(kernel<0>);
  const std::map<cudaFuncAttribute, std::vector<int>> once{
      {cudaFuncAttributeMaxDynamicSharedMemorySize, {232448}}};
  check(runtime.set[{address, 0}] == once,
        "shared memory is not allowed once, as much as there is");
  runtime.device = 1;
  runtime.shared = 101376;
  launch(kernel<0>, less, nullptr, 0);
  const std::map<cudaFuncAttribute, std::vector<int>> other{
      {cudaFuncAttributeMaxDynamicSharedMemorySize, {101376}}};
  check(runtime.set[{address, 1}] == other, "another device has a permission of its own");
}

void launches_of_many_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back(
        [] { prepare_kernel(reinterpret_cast<void*>(kernel<1>), {{1}, 1, 99999}); });
  }
  for (std::thread& thread : threads) thread.join();
  check(runtime.set.begin()->second.begin()->second.size() == 1, "threads allow it twice");
}

void a_query_that_fails_is_no_cluster() {
  const Grid cluster{{16}, 128, 0, 16}, block{{16}, 128};
  check(resident_clusters(kernel<2>, cluster) == 15, "15 clusters");
  check(resident_clusters(kernel<2>, block) == 2 * 132, "two blocks an SM");
  check(resident_clusters(kernel<2>, {{1}, 128, 232449}) == 0, "more shared memory than there is");
  for (const auto& [function, grid] :
       std::map<std::string, Grid>{{"cudaOccupancyMaxActiveClusters", cluster},
                                   {"cudaOccupancyMaxActiveBlocksPerMultiprocessor", block}}) {
    runtime.errors = {{function, cudaErrorNotSupported}};
    check(resident_clusters(kernel<2>, grid) == 0, "a query that fails is 0");
    check(runtime.last == cudaSuccess, "the query's error is left for the next call");
    runtime.errors = {{function, cudaErrorIllegalAddress}};
    check(error_of([grid = grid] { resident_clusters(kernel<2>, grid); }, false) ==
              "test::kernel(int): an illegal memory access was encountered",
          "a context that is lost is an error");
  }
  runtime.errors = {{"cudaFuncGetAttributes", cudaErrorInvalidValue}};
  check(resident_clusters(kernel<3>, block) == 0, "no code for the device");
  runtime.errors = {{"cudaFuncSetAttribute", cudaErrorInvalidValue}};
  check(resident_clusters(kernel<3>, cluster) == 0, "no permission");
  runtime.errors.clear();
  check(resident_clusters(kernel<3>, cluster) == 15, "a failure is not kept");
}

void the_code_decides_about_clusters() {
  runtime.capability = 100;
  runtime.ptx_version = 80;
  check(resident_clusters(kernel<4>, {{2}, 128, 0, 2}) == 0, "code for 8.0 has no clusters");
  check(resident_clusters(kernel<4>, {{2}, 128}) == 2 * 132, "code for 8.0 has blocks");
  runtime.ptx_version = 90;
  check(resident_clusters(kernel<5>, {{2}, 128, 0, 2}) == 15, "code for 9.0 has clusters");
  check(device_limits().capability == 100, "the device's capability");
}

void errors_name_the_kernel_and_are_cleared() {
  runtime.errors = {{"cudaLaunchKernelExC", cudaErrorInvalidValue}};
  const auto run = [] { launch(kernel<6>, Grid{{1}, 128}, nullptr, 0); };
  check(error_of(run, true) == "test::kernel(int): invalid argument", "the kernel's name");
  check(runtime.last == cudaSuccess, "the launch's error is left for the next call");
  runtime.errors["cudaFuncGetName"] = cudaErrorInvalidResourceHandle;
  check(error_of(run, true) == "a kernel: invalid argument", "a kernel without a name");
  check(runtime.last == cudaSuccess, "an error of the name is left for the next call");
  runtime.errors["cudaLaunchKernelExC"] = cudaErrorIllegalAddress;
  check(error_of(run, false) == "a kernel: an illegal memory access was encountered", "sticky");
  check(error_of([] { check_cuda(cudaErrorInvalidValue, "cudaStreamIsCapturing"); }, true) ==
            "cudaStreamIsCapturing: invalid argument",
        "the call's name");
  const Grid large{{int64_t(1) << 32}, 128};
  check(error_of([&] { launch(kernel<6>, large, nullptr, 0); }, true) ==
            "a kernel: the grid or its shared memory is too large",
        "a grid that is too large");
  check(runtime.last == cudaSuccess, "an error of the name is left for the next call");
}

void attributes_of_a_launch() {
  launch(kernel<7>, Grid{{32}, 128, 0, 16, true}, nullptr, 0);
  const auto& attributes = runtime.attributes;
  check(attributes.size() == 2, "a cluster and a cooperative launch");
  check(attributes[0].id == cudaLaunchAttributeClusterDimension &&
            attributes[0].val.clusterDim.x == 16 && attributes[0].val.clusterDim.y == 1,
        "the cluster's blocks");
  check(attributes[1].id == cudaLaunchAttributeCooperative && attributes[1].val.cooperative == 1,
        "cooperative");
  launch(kernel<7>, Grid{{32}, 128, 0, 1, true}, nullptr, 0);
  check(attributes.size() == 1 && attributes[0].id == cudaLaunchAttributeCooperative,
        "cooperative without clusters");
  check(resident_clusters(kernel<7>, {{32}, 128, 0, 16, true}) == 15, "cooperative clusters");
  runtime.cooperative = 0;
  check(resident_clusters(kernel<7>, {{32}, 128, 0, 16, true}) == 0, "no cooperative launches");
  check(resident_clusters(kernel<7>, {{32}, 128, 0, 16}) == 15, "other launches");
}

}  // namespace test

int main() {
  for (const auto body :
       {test::shared_memory_is_allowed_once, test::launches_of_many_threads,
        test::a_query_that_fails_is_no_cluster, test::the_code_decides_about_clusters,
        test::errors_name_the_kernel_and_are_cleared, test::attributes_of_a_launch}) {
    fake::runtime = {};
    body();
  }
  return test::faults > 0;
}
