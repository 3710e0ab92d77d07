// One pass, or several at once: the directions of a layer or the layers of a stack, where a step has too
// little work for a team to share.
#pragma once

#include <memory>

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

// Passes that are a thread's alone, a block at a time. In a chain each one reads what the one before it
// has written: its block follows the same block there.
template <typename Run>
class SideBySide {
 public:
  SideBySide(const std::vector<typename Run::Params>& params, bool is_chain) : is_chain_(is_chain) {
    for (const auto& p : params) lines_.push_back(std::make_unique<Line>(p));
    const int count = int(params.size());
    const int64_t num_blocks = is_chain ? lines_[0]->run.num_blocks() : 1;
    for (int64_t turn = 0; turn < num_blocks + count - 1; ++turn) {
      for (int i = 0; i < count; ++i) {
        const int64_t block = turn - i;
        if (0 <= block && block < num_blocks) order_.push_back({i, uint32_t(block)});
      }
    }
  }

  // Whoever comes takes the next block that there is.
  void run(Team& team) {
    team.run([&](const Worker&) {
      for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < order_.size();) {
        take(order_[i]);
      }
    });
  }

 private:
  struct Line {
    explicit Line(const typename Run::Params& p) : run(p, 1) {}
    Run run;
    Team alone;
    Arrivals blocks;  // that are done
  };
  struct Turn {
    int line;
    uint32_t block;
  };

  void take(Turn turn) {
    Line& line = *lines_[turn.line];
    line.blocks.await(turn.block);
    if (turn.line > 0 && is_chain_) lines_[turn.line - 1]->blocks.await(turn.block + 1);
    if (turn.block == 0) line.run.start(line.alone);
    do {
      line.run.run_block(line.alone);
    } while (!is_chain_ && !line.run.is_done());
    if (line.run.is_done()) line.run.finish(line.alone);
    line.blocks.count.store(turn.block + 1, std::memory_order_release);
  }

  const bool is_chain_;
  std::vector<std::unique_ptr<Line>> lines_;
  std::vector<Turn> order_;
  alignas(64) std::atomic<size_t> next_{0};
};

template <typename Run>
void run_side_by_side(const std::vector<typename Run::Params>& params, bool is_chain, Team& team) {
  SideBySide<Run>(params, is_chain).run(team);
}

}  // namespace
}  // namespace fastbptt
