// A pass of a user's cell as a team runs it: some steps, and the products over their rows while these
// are in the cache.
#pragma once

#include "cpu/schedule.h"
#include "user_cell/interface.h"

namespace fastbptt {
namespace {

// The units of a panel that there are.
template <typename scalar_t>
Range units_of(const Packed<scalar_t>& units, int64_t panel) {
  return {units.first_unit(panel), min(units.units, units.first_unit(panel + 1))};
}

// The row of the step before, as in entering_row.
template <typename Params>
int64_t user_row_before(const Params& p, const Lane& lane, int64_t s) {
  const int64_t row = row_before(p, lane, s);
  return row == kNoRow && p.reset_to ? kFirstReset + row_of_boundary(p, lane, s - 1) : row;
}

// A step's work, with a barrier after each phase of the cell.
template <typename Params>
StepWork work_of_phases(const Params& p, StepWork work) {
  work.barriers = p.cell.phases;
  return work;
}

// Where a row keeps the means and scales of what is normalized.
template <typename Params>
auto* row_of_norms(const Params& p, int64_t row) {
  return p.kept + row * p.ld_kept + p.cell.kept * p.H;
}

// Pass has p, w_hh, w_hr, a Progress and
//   pack(worker)                     before the steps, for a share of the panels
//   start_block(at, team)            before the steps of a block; how many are taken at its end
//   run_steps(shares, parts, at, n)  takes steps until n are taken
//   advance(at)                      past one step
//   finish_block(team)               after the steps of a block
//   finish(mine, at)                 after all
template <typename Pass>
class UserRun {
 public:
  using Params = typename Pass::Params;

  UserRun(const Params& p, int parts)
      : p_(p),
        work_(work_of(p)),
        split_(choose_split(parts, work_)),
        pass_(p, Arena{static_cast<char*>(p.workspace)}, split_) {}

  static StepWork work_of(const Params& p) { return Pass::work_of(p); }
  static int64_t workspace(const Params& p) { return Pass(p, Arena{nullptr}, {1, 1}).bytes; }

  void start(Team& team) {
    shares_ = all_shares(p_, pass_.w_hh, pass_.w_hr, split_, team);
    team.run([&](const Worker& worker) { pass_.pack(worker); });
  }
  bool is_done() const { return at_.taken == p_.lanes[0].steps; }
  void run_piece(Team& team) {
    const int64_t stretch = steps_between_changes(split_, work_);
    const int64_t block_end = pass_.start_block(&at_, team);
    while (at_.taken < block_end) {
      const int64_t end = min(block_end, at_.taken + stretch);
      team.run_together([&](Parts parts) { pass_.run_steps(shares_, parts, at_, end); });
      while (at_.taken < end) pass_.advance(&at_);
    }
    pass_.finish_block(team);
  }
  bool owes_products() const { return false; }
  void run_products(const Worker&) const {}
  void finish(Team& team) {
    team.run([&](const Worker& worker) {
      if (!shares_[worker.id].idle) pass_.finish(shares_[worker.id], at_);
    });
  }

 private:
  const Params& p_;
  const StepWork work_;
  const Split split_;
  Pass pass_;
  std::vector<Share> shares_;
  typename Pass::Progress at_;
};

}  // namespace
}  // namespace fastbptt
