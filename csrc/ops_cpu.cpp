// The operators on the CPU.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "cpu/kernels.h"
#include "tensors.h"
#include "workspace.h"

namespace fastbptt {
namespace {

// Calls fn with a number of the type that the kernels know a dtype by.
template <typename Fn>
void for_dtype(at::ScalarType dtype, Fn&& fn) {
  switch (dtype) {
    case at::kDouble: return fn(double{});
    case at::kFloat: return fn(float{});
    case at::kHalf: return fn(half_t{});
    case at::kBFloat16: return fn(bfloat16_t{});
    default: TORCH_INTERNAL_ASSERT(false, "no kernel for ", dtype);
  }
}

// The dtype that the kernels compute in for tensors of another: the same, or float32 where the
// instruction set has none for 16 bits.
at::ScalarType kernel_dtype(at::ScalarType dtype) {
  bool is_there = false;
  for_dtype(dtype, [&](auto number) { is_there = kernels_for<decltype(number)>(); });
  return is_there ? dtype : at::kFloat;
}

template <typename scalar_t>
void fill_common(LayerParams<scalar_t>* p, const LayerShape& shape, const Layout& layout,
                 const bool* resets, const std::vector<Lane>& lanes, const LayerTensors& tensors,
                 int64_t d, int threads) {
  const auto data = [](const Tensor& tensor) { return const_data<scalar_t>(tensor); };
  p->layout = layout;
  p->I = shape.I;
  p->H = shape.H;
  p->R = shape.R;
  p->direction = d == 0 ? 1 : -1;
  p->lanes = lanes.data();
  p->num_lanes = int64_t(lanes.size());
  p->input = data(tensors.input);
  p->resets = resets;
  p->hx = direction_of<scalar_t>(tensors.hx, d);
  p->cx = direction_of<scalar_t>(tensors.cx, d);
  p->w_ih = data(shape.w_ih(tensors.weights, d));
  p->w_hh = data(shape.w_hh(tensors.weights, d));
  p->b_ih = shape.has_biases ? data(shape.b_ih(tensors.weights, d)) : nullptr;
  p->b_hh = shape.has_biases ? data(shape.b_hh(tensors.weights, d)) : nullptr;
  p->w_hr = shape.has_projection ? data(shape.w_hr(tensors.weights, d)) : nullptr;
  p->ld_out = shape.D * shape.R;
  p->threads = threads;
}

int threads_for(const LayerShape& shape, double passes, double rows) {
  const double row = double(shape.I + shape.R) * shape.G * shape.H +
                     (shape.has_projection ? double(shape.R) * shape.H : 0);
  return useful_threads(at::get_num_threads(), passes * rows * row);
}

// A kernel's workspace. It stays with the calling thread for its next call: the system clears memory
// that is given back to it, which can take as long as a third of a call's own work.
class Workspace {
 public:
  // 64-aligned, like all that torch allocates, and seen by its profilers when it grows.
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      release();
      memory_ = c10::GetCPUAllocator()->allocate(size_t(bytes));
      size_ = bytes;
    }
    const auto& context = at::globalContext();
    if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
      std::memset(memory_.get(), 0xff, size_t(bytes));  // NaN in every dtype
    }
    return memory_.get();
  }
  // Gives back what is too much to keep.
  void trim() {
    constexpr int64_t kMostKept = 32 << 20;  // bytes: enough for 768 units of an LSTM
    if (size_ > kMostKept) release();
  }
  void release() {
    memory_.clear();
    size_ = 0;
  }

 private:
  c10::DataPtr memory_;
  int64_t size_ = 0;
};

thread_local Workspace workspace;

enum class Order { kOneByOne, kSideBySide };  // of directions: see Kernel

template <typename Params>
Order order_of_directions(const Kernel<Params>& kernel, const std::vector<Params>& passes) {
  const Params& p = passes[0];
  return pays_side_by_side(int(passes.size()), p.threads, kernel.work_of_step(p))
             ? Order::kSideBySide
             : Order::kOneByOne;
}

// With FASTBPTT_VERBOSE=1 each run of a kernel says to stderr what it was.
bool is_verbose() {
  static const bool value = [] {
    const char* text = std::getenv("FASTBPTT_VERBOSE");
    return text && *text && std::strcmp(text, "0") != 0;
  }();
  return value;
}

// What there is to say: the pass and its sizes.
struct Description {
  const char* pass;
  const LayerShape& shape;
  at::ScalarType dtype;
};

const char* name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return "float64";
    case at::kFloat: return "float32";
    case at::kHalf: return "float16";
    default: return "bfloat16";
  }
}

template <typename Params>
void report(const Description& what, const Kernel<Params>& kernel,
            const std::vector<Params>& passes, Order order, bool had_company, double ms) {
  const LayerShape& shape = what.shape;
  const int threads = passes[0].threads;
  const Split split = choose_split(threads, kernel.work_of_step(passes[0]));
  std::string how = std::to_string(threads) + (threads == 1 ? " thread" : " threads");
  if (order == Order::kSideBySide) {
    how += ", directions side by side";
  } else if (threads > 1) {
    how += ", steps by " + std::to_string(split.batch_parts) + " of the batch x " +
           std::to_string(split.unit_parts) + " of the units";
  }
  if (!had_company) how += ", left to one";
  std::fprintf(stderr,
               "fastbptt: %s %s, %s, %s, T %lld, B %lld, I %lld, H %lld, %lld lanes, %s, %.3f ms\n",
               kCellNames[size_t(shape.cell)], what.pass, name_of(what.dtype), kernels().isa,
               (long long)shape.T, (long long)shape.B, (long long)shape.I, (long long)shape.H,
               (long long)passes[0].num_lanes, how.c_str(), ms);
}

template <typename Params>
void run_kernels(const Kernel<Params>& kernel, std::vector<Params>& passes, Order order,
                 const Description& what) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = is_verbose() ? Clock::now() : Clock::time_point();
  std::vector<int64_t> bytes;
  for (const Params& p : passes) bytes.push_back(kernel.workspace(p));
  // One after another they take the same memory.
  char* memory = static_cast<char*>(workspace.reserve(
      order == Order::kOneByOne ? *std::max_element(bytes.begin(), bytes.end())
                                : std::accumulate(bytes.begin(), bytes.end(), int64_t(0))));
  for (size_t i = 0; i < passes.size(); ++i) {
    passes[i].workspace = memory;
    if (order != Order::kOneByOne) memory += bytes[i];
  }
  struct Call {
    const Kernel<Params>& kernel;
    const std::vector<Params>& passes;
    Order order;
  } const call{kernel, passes, order};
  const bool had_company = run_team(
      passes[0].threads,
      [](const void* context, Team& team) {
        const Call& call = *static_cast<const Call*>(context);
        if (call.order != Order::kOneByOne) {
          return call.kernel.run_side_by_side(call.passes, team);
        }
        for (const Params& p : call.passes) call.kernel.run(p, team);
      },
      &call);
  workspace.trim();
  if (!is_verbose()) return;
  const std::chrono::duration<double, std::milli> ms = Clock::now() - begin;
  report(what, kernel, passes, order, had_company, ms.count());
}

ForwardResults forward_cpu(const ForwardArguments& args) {
  const LayerShape shape = check_forward(args, HalfTypes::kBoth);
  const at::ScalarType dtype = kernel_dtype(args.input.scalar_type());
  LayerTensors tensors(args);
  tensors.convert(dtype);
  const auto options = tensors.input.options();
  ForwardResults results = make_forward_results(
      args, shape, [&](const std::vector<int64_t>& sizes) { return at::empty(sizes, options); });
  if (shape.N == 0) return converted(results, args.input.scalar_type());

  const OwnedLayout layout(shape, args);
  Cuts cuts;
  cuts.resets = rows_of<bool>(tensors.resets);
  const bool has_c = shape.has_cell_state();
  std::vector<std::vector<Lane>> lanes;  // of each direction
  for (int64_t d = 0; d < shape.D; ++d) {
    lanes.push_back(make_lanes(layout.layout, d == 0 ? 1 : -1, cuts));
  }
  for_dtype(dtype, [&](auto number) {
    using scalar_t = decltype(number);
    std::vector<FwdParams<scalar_t>> passes(shape.D);
    for (int64_t d = 0; d < shape.D; ++d) {
      FwdParams<scalar_t>& p = passes[d];
      fill_common(&p, shape, layout.layout, cuts.resets, lanes[d], tensors, d,
                  threads_for(shape, double(shape.D), double(shape.N)));
      p.output = data<scalar_t>(results.output) + d * shape.R;
      p.h_n = direction_of<scalar_t>(results.h_n, d, true);
      p.gates = direction_of<scalar_t>(results.gates, d, shape.has_gates(results.gates));
      p.c = direction_of<scalar_t>(results.c, d, has_c);
      p.c_n = direction_of<scalar_t>(results.c_n, d, has_c);
    }
    const auto& kernel = kernels_for<scalar_t>()->forward[int(shape.cell)];
    run_kernels(kernel, passes, order_of_directions(kernel, passes), {"forward", shape, dtype});
  });
  return converted(results, args.input.scalar_type());
}

// Where the gradients that a layer's direction is given are not zero. Layers that hand gradients to
// each other by lane must come to the same lanes: so all of them go by the gradient of the stack's
// output, and count each final state if there are gradients of some.
Losses losses_of(const BackwardArguments& args, const BackwardTensors& tensors,
                 const LayerShape& shape, int64_t d) {
  const auto rows = [](const OptionalTensor& tensor, int64_t first, int64_t ld, int64_t columns) {
    if (!tensor.has_value() || tensor->numel() == 0) return GradientRows();
    const int64_t element = tensor->element_size();
    const char* data = static_cast<const char*>(tensor->const_data_ptr()) + first * element;
    return GradientRows(data, element, ld, columns);
  };
  Losses losses;
  losses.output = rows(args.grad_by_lane ? tensors.d_network : tensors.d_output, d * shape.R,
                       shape.D * shape.R, shape.R);
  losses.h_n = rows(tensors.d_h_n, d * shape.B * shape.R, shape.R, shape.R);
  losses.c_n = rows(tensors.d_c_n, d * shape.B * shape.H, shape.H, shape.H);
  losses.all_ends = (args.grad_by_lane || args.input_by_lane) &&
                    (args.grad_h_n.has_value() || args.grad_c_n.has_value());
  return losses;
}

BackwardResults backward_cpu(const BackwardArguments& args) {
  const LayerShape shape = check_backward(args, HalfTypes::kBoth);
  const at::ScalarType dtype = kernel_dtype(args.input.scalar_type());
  BackwardTensors tensors(args);
  tensors.convert(dtype);
  const Tensor closed = tensors.kappa.has_value() ? tensors.kappa->eq(0) : Tensor();
  const OwnedLayout layout(shape, args);
  Cuts cuts{args.k1,
            args.k2,
            args.last_only,
            args.first_window,
            args.num_windows,
            rows_of<bool>(tensors.resets),
            closed.defined() ? closed.const_data_ptr<bool>() : nullptr};
  cuts.limit_to(shape.T);
  const Span span = span_of(shape.T, cuts);
  std::vector<std::vector<Lane>> lanes;  // of each direction
  bool in_each_row = true;
  int64_t lane_rows = 0;
  for (int64_t d = 0; d < shape.D; ++d) {
    const Losses losses = losses_of(args, tensors, shape, d);
    lanes.push_back(make_lanes(layout.layout, d == 0 ? 1 : -1, cuts, &losses));
    lane_rows += count_rows(lanes[d]);
    in_each_row = in_each_row && count_rows(lanes[d]) == shape.N;
  }
  check_grad_by_lane(args, shape, lane_rows);

  // Only where lanes share steps is there a sum over them, which the kernel begins with zeros in
  // each row of the span. Else it fills the rows that lanes come to: the others, and the initial
  // states that no lane begins with, have no gradient.
  const bool has_rows_of_all =
      span.end - span.begin == shape.T || args.input_by_lane || !args.needs[0];
  const bool sums =
      cuts.overlapping() && !(has_rows_of_all && are_apart(layout.layout, 1, lanes[0]));
  const bool states_are_sums = args.resets.has_value() || sums || !in_each_row;
  const bool steps_are_left_out = !sums && !args.input_by_lane && !in_each_row;
  const auto options = tensors.input.options();
  const auto empty = [&](const std::vector<int64_t>& sizes) { return at::empty(sizes, options); };
  const auto state = [&](const std::vector<int64_t>& sizes) {
    return states_are_sums ? at::zeros(sizes, options) : at::empty(sizes, options);
  };
  BackwardResults results = make_backward_results(
      args, d_input_sizes(args, shape, layout, span, lane_rows), empty, state);
  if (lane_rows == 0) return converted(zero(results), args.input.scalar_type());
  if (steps_are_left_out) results.d_input.zero_();

  const bool has_c = shape.has_cell_state(), needs_input = args.needs[0];
  for_dtype(dtype, [&](auto number) {
    using scalar_t = decltype(number);
    std::vector<BwdParams<scalar_t>> passes;
    for (int64_t d = 0; d < shape.D; ++d) {
      if (lanes[d].empty()) {
        for (int64_t i = 0; i < shape.weights_per_direction(); ++i) {
          results.d_weights[d * shape.weights_per_direction() + i].zero_();
        }
        continue;
      }
      BwdParams<scalar_t>& p = passes.emplace_back();
      fill_common(&p, shape, layout.layout, cuts.resets, lanes[d], tensors, d,
                  threads_for(shape, 2, double(lane_rows)));
      p.output = const_data<scalar_t>(tensors.output) + d * shape.R;
      p.gates = shape.has_gates(tensors.gates) ? direction_of<scalar_t>(tensors.gates, d) : nullptr;
      p.c = has_c ? direction_of<scalar_t>(tensors.c, d) : nullptr;
      const scalar_t* d_out = rows_of<scalar_t>(tensors.d_output);
      (args.grad_by_lane ? p.d_lanes : p.d_output) = d_out ? d_out + d * shape.R : nullptr;
      p.d_h_n = direction_of<scalar_t>(tensors.d_h_n, d);
      p.d_c_n = has_c ? direction_of<scalar_t>(tensors.d_c_n, d) : nullptr;
      p.d_input = needs_input ? data<scalar_t>(results.d_input) : nullptr;
      p.d_input_by_lane = args.input_by_lane;
      p.accumulate_d_input = d > 0;
      p.kappa = rows_of<scalar_t>(tensors.kappa);
      p.mask = rows_of<scalar_t>(tensors.mask);
      p.overlapping = sums;
      p.begin = span.begin;
      p.end = span.end;
      p.d_hx = direction_of<scalar_t>(results.d_hx, d, args.needs[1]);
      p.d_cx = direction_of<scalar_t>(results.d_cx, d, args.needs[2]);
      if (args.needs[3]) {
        const std::vector<Tensor>& d_weights = results.d_weights;
        p.d_w_ih = data<scalar_t>(shape.w_ih(d_weights, d));
        p.d_w_hh = data<scalar_t>(shape.w_hh(d_weights, d));
        p.d_b_ih = shape.has_biases ? data<scalar_t>(shape.b_ih(d_weights, d)) : nullptr;
        p.d_b_hh = shape.has_biases ? data<scalar_t>(shape.b_hh(d_weights, d)) : nullptr;
        p.d_w_hr = shape.has_projection ? data<scalar_t>(shape.w_hr(d_weights, d)) : nullptr;
      }
    }
    if (passes.empty()) return;
    const auto& kernel = kernels_for<scalar_t>()->backward[int(shape.cell)];
    const Order order = args.input_by_lane ? Order::kOneByOne : order_of_directions(kernel, passes);
    Tensor d_input_reverse;
    if (order == Order::kSideBySide && needs_input) {
      d_input_reverse = at::empty_like(results.d_input);
      if (steps_are_left_out) d_input_reverse.zero_();
      passes[1].d_input = data<scalar_t>(d_input_reverse);
      passes[1].accumulate_d_input = false;
    }
    run_kernels(kernel, passes, order, {"backward", shape, dtype});
    if (d_input_reverse.defined()) results.d_input.add_(d_input_reverse);
  });
  return converted(results, args.input.scalar_type());
}

}  // namespace

void release_workspace() { workspace.release(); }

TORCH_LIBRARY_IMPL(fastbptt, CPU, m) {
  m.impl("rnn_fwd", rnn_fwd<forward_cpu>);
  m.impl("rnn_bwd", rnn_bwd<backward_cpu>);
}

}  // namespace fastbptt
