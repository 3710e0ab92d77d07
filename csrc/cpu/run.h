// The passes as a team runs them, piece by piece: one, or several side by side.
#pragma once

#include "cpu/backward.h"
#include "cpu/backward_tangent.h"
#include "cpu/forward.h"
#include "cpu/forward_tangent.h"
#include "cpu/waves.h"

namespace fastbptt {
namespace {

constexpr int64_t kAllSteps = INT64_MAX;

// The forward pass of one direction, a piece after another: some of a block's steps, with all that
// they need.
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
  static int64_t workspace(const Params& p) { return of_one(p).bytes; }
  static bool goes_in_pieces(const Params& p) { return of_one(p).projection.goes_in_pieces(); }

  // What the steps need: to be called first.
  [[gnu::noinline]] void start(Team& team) {
    shares_ = all_shares(p_, pass_.w_hh, pass_.w_hr, split_, team);
    team.run([&](const Worker& worker) { pass_.pack(worker); });
  }
  bool is_done() const { return at_.step == p_.lanes[0].steps; }

  // Takes at most so many steps, where the pass goes in pieces.
  [[gnu::noinline]] void run_piece(Team& team, int64_t most_steps = kAllSteps) {
    const int64_t stretch = steps_between_changes(split_, work_);
    const int64_t piece_end =
        at_.step + min(most_steps, pass_.projection.block_end(at_.step) - at_.step);
    pass_.projection.run(at_.step, piece_end, team);
    at_.first_row = 0;
    while (at_.step < piece_end) {
      const int64_t end = min(piece_end, at_.step + stretch);
      team.run_together([&](Parts parts) { pass_.run_steps(shares_, parts, at_, end); });
      pass_.advance(&at_, end);
    }
  }
  // There are no products to come.
  bool owes_products() const { return false; }
  void run_products(const Worker&) const {}
  void finish(Team&) {}

 private:
  static Forward<Cell, scalar_t> of_one(const Params& p) { return {p, Arena{nullptr}, {1, 1}}; }

  const Params& p_;
  const StepWork work_;
  const Split split_;
  const Forward<Cell, scalar_t> pass_;
  std::vector<Share> shares_;
  typename Forward<Cell, scalar_t>::Progress at_;
};

// The backward pass of one direction, a piece after another: some of a block's steps and their
// gradient of the input. When a block is done its part in the weights' gradients is owed.
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
  static bool goes_in_pieces(const Params& p) { return !p.overlapping; }

  // What the steps need: to be called first.
  [[gnu::noinline]] void start(Team& team) {
    shares_ = all_shares(p_, pass_.w_hh, pass_.w_hr, split_, team);
    team.run([&](const Worker& worker) {
      pass_.pack(worker);
      if (p_.overlapping) pass_.sum.clear(p_, worker);
    });
  }
  bool is_done() const { return at_.end == 0; }

  // Takes at most so many steps.
  [[gnu::noinline]] void run_piece(Team& team, int64_t most_steps = kAllSteps) {
    const int64_t stretch = steps_between_changes(split_, work_);
    if (!block_ || at_.end == block_->begin) start_block(team);
    const Block<acc_t>& block = *block_;
    const int64_t piece_begin = at_.end - min(most_steps, at_.end - block.begin);
    const int64_t first_row = at_.first_row;
    while (at_.end > piece_begin) {
      const int64_t begin = max(piece_begin, at_.end - stretch);
      team.run_together([&](Parts parts) { pass_.run_steps(shares_, parts, block, at_, begin); });
      pass_.advance(&at_, block, begin);
    }
    if (p_.d_input && (p_.d_input_by_lane || !p_.overlapping)) {
      pass_.input_gradient(block, {first_row, at_.first_row}, team);
    }
  }
  bool owes_products() const { return block_ && at_.end == block_->begin; }
  // For a share of the units. The next block is only begun when all shares are done.
  void run_products(const Worker& worker) const {
    if (p_.overlapping) {
      pass_.sum.add(*block_, worker);
    } else {
      pass_.add_products(*block_, block_->lane_row == 0, worker);
    }
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

  void start_block(Team& team) {
    const int64_t lane_row = block_ ? block_->lane_row + block_->num_rows : 0;
    block_ = &pass_.blocks[block_ == &pass_.blocks[0]];
    fastbptt::start_block(p_, block_, block_begin(p_, at_.end), at_.end, lane_row);
    team.run([&](const Worker& worker) { pass_.find_rows(*block_, worker); });
    if (pass_.recomputes()) {
      team.run([&](const Worker& worker) { pass_.recompute(*block_, worker); });
    }
    at_.first_row = 0;
  }

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
      if (p_.d_input && !p_.d_input_by_lane) {
        pass_.input_gradient(block, {0, block.num_rows}, team);
      }
      team.run([&](const Worker& worker) { pass_.add_products(block, first_block, worker); });
    });
  }

  const Params& p_;
  const StepWork work_;
  const Split split_;
  Backward<Cell, scalar_t> pass_;
  std::vector<Share> shares_;
  typename Backward<Cell, scalar_t>::Progress at_;
  Block<acc_t>* block_ = nullptr;  // the one that was begun last
};

template <typename Run>
void run_pass(const typename Run::Params& p, Team& team) {
  Run run(p, team.parts());
  run.start(team);
  while (!run.is_done()) {
    run.run_piece(team);
    if (run.owes_products()) {
      team.run([&](const Worker& worker) { run.run_products(worker); });
    }
  }
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

// Passes that each depend on the one before, likewise: see Waves.
template <typename Run>
void run_in_waves(const std::vector<typename Run::Params>& passes, Team& team) {
  const typename Run::Params& first = passes[0];
  const int64_t piece = steps_of_piece(first.lanes[0].steps, Run::work_of(first));
  std::deque<Run> runs;
  for (const typename Run::Params& p : passes) runs.emplace_back(p, 1);
  Waves waves(int(passes.size()), team.parts());
  team.run([&](const Worker&) {
    Team alone;
    try {
      for (Waves::Task task; (task = waves.next()).kind != Waves::Kind::kNothing;) {
        Run& run = runs[task.pass];
        switch (task.kind) {
          case Waves::Kind::kStart: run.start(alone); break;
          case Waves::Kind::kPiece: run.run_piece(alone, piece); break;
          case Waves::Kind::kProducts: run.run_products({task.part, team.parts(), nullptr}); break;
          default: run.finish(alone);
        }
        waves.complete(task, run.is_done(), run.owes_products());
      }
    } catch (...) {
      waves.abandon();
      throw;
    }
  });
}

}  // namespace
}  // namespace fastbptt
