// What the steps of both tangent passes have in common: boundaries, and how a pass is run.
#pragma once

#include "cpu/any_elman.h"
#include "cpu/schedule.h"
#include "dual.h"

namespace fastbptt {
namespace {

// The gate between the local steps s and s + 1 of a lane; it belongs to the later of the two in time.
template <typename scalar_t>
scalar_t gate_after(const TangentParams<scalar_t>& p, const Lane& lane, int64_t s) {
  return p.gate && s + 1 < lane.steps ? p.gate[row_of_boundary(p, lane, s)] : scalar_t(1);
}

// That between the initial state and the first step.
template <typename scalar_t>
scalar_t gate_before(const TangentParams<scalar_t>& p, const Lane& lane) {
  return p.gate && p.direction > 0 ? p.gate[row_at(p, lane, 0)] : scalar_t(1);
}

template <typename scalar_t, typename Count>
inline Vec<scalar_t> load_or_zero(const scalar_t* from, int64_t unit, Count count) {
  return from ? load_first(from + unit, count) : Vec<scalar_t>{};
}

// Runs a pass: Pass has p, w_hh, w_hr and
//   pack(worker)                    before the steps, for a share of the panels
//   run_steps(shares, parts, k, end)  takes the steps [k, end) in the pass's own order
//   finish(mine)                    after them
template <typename Pass>
class StepsRun {
 public:
  using Params = typename Pass::Params;

  StepsRun(const Params& p, int parts)
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
  bool is_done() const { return step_ == p_.lanes[0].steps; }
  void run_piece(Team& team) {
    const int64_t end = min(p_.lanes[0].steps, step_ + steps_between_changes(split_, work_));
    team.run_together([&](Parts parts) { pass_.run_steps(shares_, parts, step_, end); });
    step_ = end;
  }
  bool owes_products() const { return false; }
  void run_products(const Worker&) const {}
  void finish(Team& team) {
    team.run([&](const Worker& worker) {
      if (!shares_[worker.id].idle) pass_.finish(shares_[worker.id]);
    });
  }

 private:
  const Params& p_;
  const StepWork work_;
  const Split split_;
  const Pass pass_;
  std::vector<Share> shares_;
  int64_t step_ = 0;
};

}  // namespace
}  // namespace fastbptt
