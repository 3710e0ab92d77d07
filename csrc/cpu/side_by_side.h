// One pass, or several at once: the directions of a layer, where a step has too little work for a team to
// share.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace fastbptt {
namespace {

template <typename Run>
void run_pass(const typename Run::Params& p, Team& team) {
  Run run(p, team.parts());
  run.start(team);
  while (!run.is_done()) run.run_block(team);
  run.finish(team);
}

// Each pass is one thread's; whoever comes takes the next.
template <typename Run>
void run_side_by_side(const std::vector<typename Run::Params>& passes, Team& team) {
  std::atomic<size_t> next{0};
  team.run([&](const Worker&) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < passes.size();) {
      Team alone;
      run_pass<Run>(passes[i], alone);
    }
  });
}

}  // namespace
}  // namespace fastbptt
