#include "user_cell/steps.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "few_rows_launch.h"
#include "few_rows_tensors.h"
#include "user_cell/step.h"

namespace fastbptt {
namespace {

class UserSteps {
 public:
  explicit UserSteps(const UserStepsCall& call) : call_(call), offsets_(size_t(call.T) + 1) {
    for (int64_t t = 0; t < call.T; ++t) offsets_[size_t(t) + 1] = offsets_[size_t(t)] + active(t);
  }

  // The i-th in the order of the forward pass.
  UserStep at(int64_t i) const {
    const int64_t t = call_.direction > 0 ? i : call_.T - 1 - i;
    const int64_t before = t - call_.direction, after = t + call_.direction;
    return {row(t), row(before), row(after), active(t), active(before), active(after)};
  }

  int launch(void* kernel, UserStep step) const {
    void* arguments[] = {call_.arguments, &step};
    return call_.launch(kernel, unsigned(step.active * call_.blocks_of_row), 1, 1,
                        unsigned(call_.threads), 1, 1, unsigned(call_.shared_bytes), call_.stream,
                        arguments, nullptr);
  }

 private:
  // 0 where there is no such step.
  int active(int64_t t) const {
    if (t < 0 || t >= call_.T) return 0;
    return int(call_.batch_sizes ? call_.batch_sizes[t] : call_.B);
  }
  long long row(int64_t t) const { return t < 0 || t >= call_.T ? 0 : offsets_[size_t(t)]; }

  const UserStepsCall& call_;
  std::vector<int64_t> offsets_;
};

// The products of all steps by the library, whose views are made anew only where the rows are others.
class Multiplier {
 public:
  explicit Multiplier(const UserProducts& products) : products_(products) {}

  void run(int64_t first, int64_t count) {
    if (first != first_ || count != count_) rows_ = products_.rows.narrow(0, first, count);
    if (count != count_) product_ = products_.product.narrow(0, 0, count);
    first_ = first;
    count_ = count;
    at::mm_out(product_, rows_, products_.weight);
  }

 private:
  const UserProducts& products_;
  int64_t first_ = -1, count_ = -1;
  at::Tensor rows_, product_;
};

// The products of all steps by kernels for few rows.
class FewRowsMultiplier {
 public:
  FewRowsMultiplier(const UserStepsCall& call, const UserProducts& products)
      : call_(call), product_(few_rows_product(products.product, products.rows, products.weight)) {}

  int run(int64_t first, int64_t count) {
    FewRowsProduct product = product_;
    product.rows += first * product.ld_rows;
    product.count = int(count);
    const FewRowsLaunch launch = launch_of(product);
    void* arguments[] = {&product};
    return call_.launch(call_.products[launch.kernel()], unsigned(launch.blocks_x),
                        unsigned(launch.blocks_y), 1, unsigned(launch.threads), 1, 1,
                        unsigned(launch.shared_bytes), call_.stream, arguments, nullptr);
  }

 private:
  const UserStepsCall& call_;
  const FewRowsProduct product_;  // of all rows
};

}  // namespace

int run_user_steps(const UserStepsCall& call, bool goes_back,
                   const std::optional<UserProducts>& products) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const UserSteps steps(call);
  std::optional<Multiplier> by_library;
  std::optional<FewRowsMultiplier> by_kernels;
  if (products && call.products[0]) {
    by_kernels.emplace(call, *products);
  } else if (products) {
    by_library.emplace(*products);
  }
  const auto multiply = [&](int64_t first, int64_t count) {
    if (by_kernels) return by_kernels->run(first, count);
    if (by_library) by_library->run(first, count);
    return 0;
  };
  for (int64_t i = 0; i < call.T; ++i) {
    const UserStep step = steps.at(goes_back ? call.T - 1 - i : i);
    if (!goes_back) {
      if (const int error = multiply(0, step.active)) return error;
    }
    if (const int error = steps.launch(call.kernel, step)) return error;
    // Of sequences that begin here the product stays, for `finish`.
    const bool is_read = i + 1 < call.T || call.finish;
    if (goes_back && is_read) {
      if (const int error = multiply(step.row, step.active)) return error;
    }
  }
  if (!goes_back || !call.finish) return 0;
  UserStep all{};
  all.active = int(call.B);
  return steps.launch(call.finish, all);
}

}  // namespace fastbptt
