// Plans that have been made: a plan takes dozens of divisions, and questions to the device.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "cuda/choose.h"

namespace fastbptt {

class PlanCache {
 public:
  // kernel: any function of the pass's, cell's and arithmetic's own.
  using Key = std::tuple<int /*device*/, const void* /*kernel*/, int64_t /*H*/, int64_t /*lanes*/,
                         bool /*is_replayed*/, Wish>;

  std::optional<Plan> find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    return found == plans_.end() ? std::nullopt : std::optional(found->second);
  }
  void put(const Key& key, const Plan& plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMost) plans_.clear();  // batches of ever other sizes
    plans_[key] = plan;
  }

 private:
  static constexpr size_t kMost = 4096;
  std::mutex mutex_;
  std::map<Key, Plan> plans_;
};

}  // namespace fastbptt
