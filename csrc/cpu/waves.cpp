#include "cpu/waves.h"

#include "cpu/team.h"

namespace fastbptt {

bool Waves::has_input(int pass) const {
  return pass == 0 || passes_[pass - 1].pieces > passes_[pass].pieces;
}

// Pieces go before all else, since others wait for them, and the last pass before the first: so no
// pass is left over that one thread must then run alone. Products fill the gaps.
bool Waves::find(Task* task) {
  const int count = int(passes_.size());
  const auto take = [&](int pass, Kind kind) {
    passes_[pass].is_taken = true;
    *task = {kind, pass, 0};
    return true;
  };
  for (int i = count - 1; i >= 0; --i) {
    const Pass& pass = passes_[i];
    if (pass.is_taken || pass.parts_to_finish > 0) continue;
    if (pass.phase == Kind::kPiece && has_input(i)) return take(i, Kind::kPiece);
  }
  for (int i = 0; i < count; ++i) {
    if (!passes_[i].is_taken && passes_[i].phase == Kind::kStart) return take(i, Kind::kStart);
  }
  for (int i = 0; i < count; ++i) {
    Pass& pass = passes_[i];
    if (pass.parts_to_take > 0) {
      *task = {Kind::kProducts, i, --pass.parts_to_take};
      return true;
    }
    if (!pass.is_taken && pass.phase == Kind::kFinish && pass.parts_to_finish == 0) {
      return take(i, Kind::kFinish);
    }
  }
  return false;
}

Waves::Task Waves::next() {
  for (;;) {
    const uint32_t seen = changes_.load(std::memory_order_acquire);
    {
      const std::lock_guard lock(mutex_);
      Task task;
      if (is_abandoned_ || find(&task) || num_done_ == int(passes_.size())) return task;
    }
    await_change(changes_, seen, parts_);
  }
}

void Waves::complete(const Task& task, bool is_last, bool owes_products) {
  {
    const std::lock_guard lock(mutex_);
    Pass& pass = passes_[task.pass];
    if (task.kind == Kind::kProducts) {
      --pass.parts_to_finish;
    } else {
      pass.is_taken = false;
    }
    if (task.kind == Kind::kStart) pass.phase = Kind::kPiece;
    if (task.kind == Kind::kPiece) {
      ++pass.pieces;
      if (is_last) pass.phase = Kind::kFinish;
      if (owes_products) pass.parts_to_take = pass.parts_to_finish = parts_;
    }
    if (task.kind == Kind::kFinish) {
      pass.phase = Kind::kNothing;
      ++num_done_;
    }
  }
  changes_.fetch_add(1, std::memory_order_release);
}

void Waves::abandon() {
  {
    const std::lock_guard lock(mutex_);
    is_abandoned_ = true;
  }
  changes_.fetch_add(1, std::memory_order_release);
}

}  // namespace fastbptt
