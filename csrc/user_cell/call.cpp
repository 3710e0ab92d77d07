#include "user_cell/call.h"

#include <memory>
#include <utility>

#include "cpu/kernels.h"
#include "lanes.h"
#include "thread_workspace.h"

namespace fastbptt {
namespace {

template <typename scalar_t, typename Params>
class UserPass {
 public:
  UserPass(const UserCall& call, int threads, const bool* closed) {
    Params& p = params_;
    const UserCell& cell = *call.cell;
    p.layout = {call.T, call.B, call.N, call.B, 1, call.offsets, call.batch_sizes};
    Cuts cuts;
    cuts.resets = call.resets;
    cuts.closed = closed;
    lanes_ = make_lanes(p.layout, int(call.direction), cuts);
    for (int64_t k = 0; k < cell.extras; ++k) {
      extras_.push_back({static_cast<const scalar_t*>(call.extra_data[k]),
                         call.extra_strides[2 * k], call.extra_strides[2 * k + 1]});
    }
    for (int64_t k = 0; call.reset_to && k < cell.states; ++k) {
      reset_to_.push_back({static_cast<const scalar_t*>(call.reset_to[k]),
                           call.reset_strides[2 * k], call.reset_strides[2 * k + 1]});
    }
    p.I = call.I;
    p.H = p.R = p.ld_out = call.H;
    p.direction = int(call.direction);
    p.lanes = lanes_.data();
    p.num_lanes = int64_t(lanes_.size());
    p.resets = call.resets;
    p.input = static_cast<const scalar_t*>(call.input);
    p.w_ih = static_cast<const scalar_t*>(call.w_ih);
    p.w_hh = static_cast<const scalar_t*>(call.w_hh);
    p.b_ih = static_cast<const scalar_t*>(call.b_ih);
    p.b_hh = static_cast<const scalar_t*>(call.b_hh);
    p.cell = {int(cell.gates),           int(cell.states),    int(cell.kept_values),
              int(cell.extras),          int(cell.recurrent), int(cell.columns),
              int(cell.first_recurrent), cell.input_order,    cell.recurrent_order,
              int(cell.phases),          int(cell.slots),     int(cell.gradient_slots),
              int(cell.norms),           cell.norm_table};
    p.initial = reinterpret_cast<const scalar_t* const*>(call.initial);
    p.states = reinterpret_cast<scalar_t* const*>(call.all_states);
    p.reset_to = call.reset_to ? reset_to_.data() : nullptr;
    p.extras = extras_.data();
    p.pre = static_cast<scalar_t*>(call.pre);
    p.kept = static_cast<scalar_t*>(call.kept);
    p.ld_kept = call.ld_kept;
    const double terms =
        double(call.I) + (call.w_hh ? double(call.H) : 16);  // 16: as much as a cell
    p.threads = useful_threads(threads, double(call.N) * double(cell.gates * call.H) * terms);
  }

  Params& params() { return params_; }

  void run(const Kernel<Params>& kernel) {
    params_.workspace = workspace.reserve(kernel.workspace(params_));
    const std::pair<const Kernel<Params>*, const Params*> context(&kernel, &params_);
    run_team(
        params_.threads,
        [](const void* c, Team& team) {
          const auto& [kernel, params] = *static_cast<const decltype(context)*>(c);
          kernel->run(*params, team);
        },
        &context);
    workspace.trim();
  }

 private:
  std::vector<Lane> lanes_;
  std::vector<Extra<scalar_t>> extras_;
  std::vector<ResetTo<scalar_t>> reset_to_;
  Params params_{};
};

template <typename scalar_t>
void forward(const UserCall& call, int threads) {
  using Params = UserForwardParams<scalar_t>;
  UserPass<scalar_t, Params> pass(call, threads, nullptr);
  Params& p = pass.params();
  p.last = reinterpret_cast<scalar_t* const*>(call.last);
  p.run = reinterpret_cast<decltype(p.run)>(call.cell->forward);
  pass.run(user_kernels_for<scalar_t>()->forward);
}

template <typename scalar_t>
void backward(const UserCall& call, int threads) {
  using Params = UserBackwardParams<scalar_t>;
  const auto* const kappa = static_cast<const scalar_t*>(call.kappa);
  std::unique_ptr<bool[]> closed;
  if (kappa) {
    closed = std::make_unique<bool[]>(size_t(call.N));
    for (int64_t r = 0; r < call.N; ++r) closed[r] = kappa[r] == 0;
  }
  UserPass<scalar_t, Params> pass(call, threads, closed.get());
  Params& p = pass.params();
  p.kappa = kappa;
  p.d_states = reinterpret_cast<const scalar_t* const*>(call.d_states);
  p.d_last = reinterpret_cast<const scalar_t* const*>(call.d_last);
  p.d_initial = reinterpret_cast<scalar_t* const*>(call.d_initial);
  p.d_extras = reinterpret_cast<scalar_t* const*>(call.d_extras);
  p.d_reset_to = reinterpret_cast<scalar_t* const*>(call.d_reset_to);
  p.clip_grad = scalar_t(call.clip_grad);
  p.d_input = static_cast<scalar_t*>(call.d_input);
  p.d_w_ih = static_cast<scalar_t*>(call.d_w_ih);
  p.d_w_hh = static_cast<scalar_t*>(call.d_w_hh);
  p.d_b_ih = static_cast<scalar_t*>(call.d_b_ih);
  p.d_b_hh = static_cast<scalar_t*>(call.d_b_hh);
  p.run = reinterpret_cast<decltype(p.run)>(call.cell->backward);
  pass.run(user_kernels_for<scalar_t>()->backward);
}

}  // namespace

void run_user_forward(const UserCall& call, int threads) {
  call.cell->is_double ? forward<double>(call, threads) : forward<float>(call, threads);
}

void run_user_backward(const UserCall& call, int threads) {
  call.cell->is_double ? backward<double>(call, threads) : backward<float>(call, threads);
}

}  // namespace fastbptt
