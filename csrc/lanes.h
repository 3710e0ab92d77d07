// The stretches of time that a pass runs, from the layout of a batch, its resets and the truncation.
#pragma once

#include <algorithm>
#include <vector>

#include "losses.h"
#include "params.h"

namespace fastbptt {

// Where the lanes of a pass begin and end. A boundary between the steps t-1 and t belongs to t, in
// both directions.
struct Cuts {
  int64_t k1 = 0, k2 = 0;  // windows begin every k1 steps and are k2 long; 0: one whole window
  bool last_only = false;  // of a window's losses only the last one counts
  int64_t first_window = 0, num_windows = 0;  // some of the windows; 0: all
  const bool* resets = nullptr;               // [N] the state before this step is zeros
  const bool* closed = nullptr;               // [N] the gate before this step is 0

  bool overlapping() const { return k2 > k1; }

  // Says the same with numbers that cannot overflow.
  void limit_to(int64_t T) {
    const int64_t reach_back = std::min(k2 - k1, T);
    k1 = std::min(k1, T);
    k2 = k1 == T ? T : k1 + reach_back;
  }
};

inline int64_t count_windows(int64_t T, int64_t k1) { return k1 == 0 ? 1 : (T + k1 - 1) / k1; }

// Steps t.
struct Span {
  int64_t begin, end;
};

// Those that the windows of `cuts` lie in.
inline Span span_of(int64_t T, const Cuts& cuts) {
  if (cuts.num_windows == 0) return {0, T};
  const int64_t last_window =
      std::min(count_windows(T, cuts.k1), cuts.first_window + cuts.num_windows);
  return {std::max<int64_t>(0, cuts.first_window * cuts.k1 - (cuts.k2 - cuts.k1)),
          std::min(T, last_window * cuts.k1)};
}

// The length of each sequence, [B].
inline std::vector<int64_t> sequence_lengths(const Layout& layout) {
  std::vector<int64_t> lengths(layout.B, layout.T);
  if (!layout.batch_sizes) return lengths;
  for (int64_t b = 0, t = layout.T; b < layout.B; ++b) {
    while (layout.batch_sizes[t - 1] <= b) --t;
    lengths[b] = t;
  }
  return lengths;
}

// Rows of (step, lane).
inline int64_t count_rows(const std::vector<Lane>& lanes) {
  int64_t rows = 0;
  for (const Lane& lane : lanes) rows += lane.steps;
  return rows;
}

// Whether no two lanes have a step in common.
inline bool are_apart(const Layout& layout, int direction, const std::vector<Lane>& lanes) {
  if (count_rows(lanes) > layout.N) return false;
  std::vector<bool> is_taken(layout.N);
  for (const Lane& lane : lanes) {
    for (int64_t s = 0; s < lane.steps; ++s) {
      const int64_t row = layout.row(lane.first + direction * s, lane.batch);
      if (is_taken[row]) return false;
      is_taken[row] = true;
    }
  }
  return true;
}

// The lanes of each window of each sequence. Windows begin at t = 0, k1, 2 k1, ... in both directions.
//
// What resets and closed gates cut a window into is independent, and could be as many lanes: fewer
// steps of more rows. But the longest piece decides how many steps there are, beyond kEnoughRows more
// rows gain nothing, and uneven lanes leave late steps with few. So neighbours stay together as long
// as no lane gets longer than that piece or than kEnoughRows even lanes would be, and the kernels cut
// inside a lane.
//
// Where windows overlap, what comes before the cut that precedes a window's first loss has no
// gradient and is left out; else the lanes cover every step once. Given `losses`, only those steps
// are in lanes which the gradient of one comes to: in its window, and cut off by nothing.
constexpr int64_t kEnoughRows = 16;

inline std::vector<Lane> make_lanes(const Layout& layout, int direction, const Cuts& cuts,
                                    const Losses* losses = nullptr) {
  const std::vector<int64_t> lengths = sequence_lengths(layout);
  const int64_t k1 = cuts.k1 == 0 ? layout.T : cuts.k1;
  const int64_t windows = count_windows(layout.T, k1);
  const int64_t first_window = cuts.num_windows == 0 ? 0 : cuts.first_window;
  const int64_t last_window = cuts.num_windows == 0 ? windows : first_window + cuts.num_windows;
  const auto is_reset = [&](int64_t t, int64_t b) {
    return cuts.resets && cuts.resets[layout.row(t, b)];
  };
  const auto is_cut = [&](int64_t t, int64_t b) {
    return is_reset(t, b) || (cuts.closed && cuts.closed[layout.row(t, b)]);
  };

  // Steps [begin, end) of sequence b and those of them with losses, from one cut to the next.
  struct Piece {
    int64_t b, window, begin, end, loss_begin, loss_end;
  };
  std::vector<Piece> pieces;
  int64_t longest = 0, rows = 0;
  const auto leave_out_steps_behind_losses = [&](Piece* piece) {
    const int64_t b = piece->b;
    const bool is_last = direction > 0 ? piece->end == lengths[b] : piece->begin == 0;
    if (is_last && losses->at_end(b)) return;
    const auto has_loss = [&](int64_t t) { return losses->at_step(layout.row(t, b)); };
    int64_t &first = piece->loss_begin, &behind = piece->loss_end;
    if (direction > 0) {
      while (first < behind && !has_loss(behind - 1)) --behind;
      piece->end = first < behind ? behind : piece->begin;
    } else {
      while (first < behind && !has_loss(first)) ++first;
      piece->begin = first < behind ? first : piece->end;
    }
  };
  const auto add = [&](Piece piece) {
    piece.loss_begin = std::max(piece.loss_begin, piece.begin);
    piece.loss_end = std::max(piece.loss_begin, std::min(piece.loss_end, piece.end));
    if (losses) leave_out_steps_behind_losses(&piece);
    if (piece.begin == piece.end) return;
    if (cuts.overlapping() && piece.loss_begin == piece.loss_end) return;
    longest = std::max(longest, piece.end - piece.begin);
    rows += piece.end - piece.begin;
    pieces.push_back(piece);
  };
  for (int64_t window = first_window; window < last_window; ++window) {
    for (int64_t b = 0; b < layout.B; ++b) {
      if (window * k1 >= lengths[b]) continue;
      const int64_t end = std::min((window + 1) * k1, lengths[b]);
      const int64_t loss_begin = cuts.last_only ? end - 1 : window * k1;
      int64_t begin = std::max<int64_t>(0, window * k1 - (cuts.k2 - cuts.k1));
      for (int64_t t = begin + 1; (cuts.resets || cuts.closed) && t < end; ++t) {
        if (!is_cut(t, b)) continue;
        add({b, window, begin, t, loss_begin, end});
        begin = t;
      }
      add({b, window, begin, end, loss_begin, end});
    }
  }

  const int64_t limit = std::max(longest, (rows + kEnoughRows - 1) / kEnoughRows);
  std::vector<Lane> lanes;
  for (size_t i = 0; i < pieces.size();) {
    Piece whole = pieces[i++];
    while (i < pieces.size() && pieces[i].b == whole.b && pieces[i].window == whole.window &&
           pieces[i].begin == whole.end && pieces[i].end - whole.begin <= limit) {
      const Piece& next = pieces[i++];
      if (whole.loss_begin == whole.loss_end) whole.loss_begin = next.loss_begin;
      whole.loss_end = next.loss_end;
      whole.end = next.end;
    }
    const auto [b, window, begin, end, loss_begin, loss_end] = whole;
    const bool starts = begin == 0, ends = end == lengths[b];
    if (direction > 0) {
      const Before before = is_reset(begin, b) ? Before::kZeros
                            : starts           ? Before::kInitial
                                               : Before::kStep;
      lanes.push_back({begin, b, end - begin, before, ends, loss_begin - begin, loss_end - begin});
    } else {  // there is no boundary beyond the last step
      const Before before = ends               ? Before::kInitial
                            : is_reset(end, b) ? Before::kZeros
                                               : Before::kStep;
      lanes.push_back({end - 1, b, end - begin, before, starts, end - loss_end, end - loss_begin});
    }
  }
  std::stable_sort(lanes.begin(), lanes.end(),
                   [](const Lane& a, const Lane& b) { return a.steps > b.steps; });
  return lanes;
}

}  // namespace fastbptt
