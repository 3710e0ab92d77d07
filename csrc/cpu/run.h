// The passes as a team runs them, block by block: one, or several side by side.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace fastbptt {
namespace {

// The forward pass of one direction, a block of steps at a time.
template <typename Cell, typename scalar_t>
class ForwardRun {
 public:
  using Params = FwdParams<scalar_t>;

  ForwardRun(const Params& p, int parts)
      : p_(p),
        work_(work_of(p)),
        split_(choose_split(parts, work_)),
        pass_(p, Arena{static_cast<char*>(p.workspace)}, split_) {}

  static StepWork work_of(const Params& p) { return work_of_step(p, p.R, p.H, Cell::kGates); }
  static int64_t workspace(const Params& p) {
    return Forward<Cell, scalar_t>(p, Arena{nullptr}, {1, 1}).bytes;
  }

  // What the steps need: to be called first.
  [[gnu::noinline]] void start(Team& team) {
    shares_ = all_shares(p_, pass_.w_hh, pass_.w_hr, split_, team);
    team.run([&](const Worker& worker) { pass_.pack(worker); });
  }
  bool is_done() const { return at_.step == p_.lanes[0].steps; }

  [[gnu::noinline]] void run_block(Team& team) {
    const int64_t stretch = steps_between_changes(split_, work_);
    const int64_t block_end = pass_.block_end(at_.step);
    pass_.project_input(at_.step, block_end, team);
    at_.first_row = 0;
    while (at_.step < block_end) {
      const int64_t end = min(block_end, at_.step + stretch);
      team.run_together([&](Parts parts) { pass_.run_steps(shares_, parts, at_, end); });
      pass_.advance(&at_, end);
    }
  }
  void finish(Team&) {}

 private:
  const Params& p_;
  const StepWork work_;
  const Split split_;
  const Forward<Cell, scalar_t> pass_;
  std::vector<Share> shares_;
  typename Forward<Cell, scalar_t>::Progress at_;
};

// The backward pass of one direction, a block of steps at a time.
template <typename Cell, typename scalar_t>
class BackwardRun {
 public:
  using Params = BwdParams<scalar_t>;

  BackwardRun(const Params& p, int parts)
      : p_(p),
        work_(work_of(p)),
        split_(choose_split(parts, work_)),
        pass_(p, Arena{static_cast<char*>(p.workspace)}, split_),
        at_{p.lanes[0].steps, 0, nullptr} {}

  static StepWork work_of(const Params& p) { return work_of_step(p, Cell::kGates * p.H, p.R, 1); }
  static int64_t workspace(const Params& p) {
    return Backward<Cell, scalar_t>(p, Arena{nullptr}, {1, 1}).bytes;
  }

  // What the steps need: to be called first.
  [[gnu::noinline]] void start(Team& team) {
    shares_ = all_shares(p_, pass_.w_hh, pass_.w_hr, split_, team);
    team.run([&](const Worker& worker) {
      pass_.pack(worker);
      if (p_.overlapping) pass_.sum.clear(p_, worker);
    });
  }
  bool is_done() const { return at_.end == 0; }

  [[gnu::noinline]] void run_block(Team& team) {
    const int64_t stretch = steps_between_changes(split_, work_);
    Block<acc_t>& block = pass_.blocks[turn_];
    turn_ ^= 1;
    pass_.start_block(&block, pass_.block_begin(at_.end), at_.end, lane_row_);
    team.run([&](const Worker& worker) { pass_.find_rows(block, worker); });
    if (pass_.recomputes()) {
      team.run([&](const Worker& worker) { pass_.recompute(block, worker); });
    }
    at_.first_row = 0;
    while (at_.end > block.begin) {
      const int64_t begin = max(block.begin, at_.end - stretch);
      team.run_together([&](Parts parts) { pass_.run_steps(shares_, parts, block, at_, begin); });
      pass_.advance(&at_, block, begin);
    }
    pass_.round_d(block, p_.d_input && (p_.d_input_by_lane || !p_.overlapping), team);
    team.run([&](const Worker& worker) {
      if (p_.d_input && p_.d_input_by_lane) {
        pass_.input_gradient(block, [&](int64_t r) { return lane_row_ + r; }, worker);
      }
      if (p_.overlapping) {
        pass_.sum.add(block, worker);
      } else {
        pass_.add_products(block, lane_row_ == 0, worker);
      }
    });
    lane_row_ += block.num_rows;
  }

  // What is left when all steps are taken.
  [[gnu::noinline]] void finish(Team& team) {
    team.run([&](const Worker& worker) {
      const Share& mine = shares_[worker.id];
      if (!mine.idle) pass_.finish_initial_states(mine, at_.d);
    });
    if (p_.overlapping) finish_overlapping(team);
    if (pass_.d_weights.are_apart && p_.d_w_ih) {
      team.run([&](const Worker& worker) { pass_.d_weights.finish(p_, Cell::kGates, worker); });
    }
  }

 private:
  using acc_t = Accumulator<scalar_t>;

  void finish_overlapping(Team& team) {
    team.run([&](const Worker& worker) {
      if (p_.d_hx) {
        add_initial_states(p_, p_.d_hx, p_.R, pass_.initial, pass_.projected_stride, pass_.hx_sums,
                           worker);
      }
      if (p_.d_cx) {
        add_initial_states(p_, p_.d_cx, p_.H, pass_.carry, pass_.wide_stride, pass_.cx_sums,
                           worker);
      }
    });
    pass_.sum.for_each_block([&](const auto& block, bool first_block) {
      pass_.round_d(block, p_.d_input && !p_.d_input_by_lane, team);
      team.run([&](const Worker& worker) { pass_.add_products(block, first_block, worker); });
    });
  }

  const Params& p_;
  const StepWork work_;
  const Split split_;
  Backward<Cell, scalar_t> pass_;
  std::vector<Share> shares_;
  typename Backward<Cell, scalar_t>::Progress at_;
  int turn_ = 0;          // of the two blocks
  int64_t lane_row_ = 0;  // rows of the blocks before
};

template <typename Run>
void run_pass(const typename Run::Params& p, Team& team) {
  Run run(p, team.parts());
  run.start(team);
  while (!run.is_done()) run.run_block(team);
  run.finish(team);
}

// Passes that do not depend on each other, where a step has too little work for a team to share: each is
// one thread's, and whoever comes takes the next.
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
