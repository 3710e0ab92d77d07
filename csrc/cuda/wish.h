// Which kernel a user wants, by the environment.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace fastbptt {

// The first ones have no division to be chosen.
enum class Kernel { kAuto, kStepwise, kLane, kResident, kCluster, kGrid };

inline const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kAuto: return "auto";
    case Kernel::kStepwise: return "stepwise";
    case Kernel::kLane: return "lane";
    case Kernel::kResident: return "resident";
    case Kernel::kCluster: return "cluster";
    case Kernel::kGrid: return "grid";
  }
  return "";
}

// A kernel, and of its division what is not to be chosen; 0: chosen.
struct Wish {
  Kernel kernel = Kernel::kAuto;
  int cluster = 0, lanes = 0;

  bool operator<(const Wish& other) const { return key() < other.key(); }
  std::tuple<Kernel, int, int> key() const { return {kernel, cluster, lanes}; }
};

// Of FASTBPTT_CUDA_KERNEL, read at every call: a kernel's name, and for measurements and tests, as in
// grid:cluster=2,lanes=4, parts of its division.
inline Wish wish_of_environment() {
  Wish result;
  const char* const value = std::getenv("FASTBPTT_CUDA_KERNEL");
  if (!value || !*value) return result;
  const std::string text = value, name = text.substr(0, text.find(':'));
  bool is_known = false;
  for (const Kernel kernel : {Kernel::kAuto, Kernel::kStepwise, Kernel::kLane, Kernel::kResident,
                              Kernel::kCluster, Kernel::kGrid}) {
    if (name != name_of(kernel)) continue;
    result.kernel = kernel;
    is_known = true;
  }
  for (size_t at = name.size(); is_known && at < text.size();) {
    const size_t end = std::min(text.find(',', at + 1), text.size());
    const std::string part = text.substr(at + 1, end - at - 1);
    is_known = false;
    if (result.kernel <= Kernel::kLane) break;
    for (const auto& [key, number] :
         {std::pair("cluster=", &result.cluster), std::pair("lanes=", &result.lanes)}) {
      const std::string digits = part.rfind(key, 0) == 0 ? part.substr(std::strlen(key)) : "";
      if (digits.empty() || digits.size() > 2) continue;
      if (digits.find_first_not_of("0123456789") != std::string::npos) continue;
      *number = std::stoi(digits);
      is_known = *number > 0;
    }
    at = end;
  }
  if (is_known) return result;
  throw std::runtime_error(
      "FASTBPTT_CUDA_KERNEL must be auto, stepwise, lane, resident, cluster or grid, the last "
      "three "
      "also with parts of their division, as in grid:cluster=2,lanes=4; got \"" +
      text + "\"");
}

}  // namespace fastbptt
