// The passes of a stack side by side, in waves: each depends on the one before it and goes in pieces
// of some steps. Threads take whatever can be done, so that none stands still for another that is
// late; which thread did what changes nothing in the results.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

namespace fastbptt {

class Waves {
 public:
  enum class Kind { kStart, kPiece, kProducts, kFinish, kNothing };
  struct Task {
    Kind kind = Kind::kNothing;
    int pass = 0;
    int part = 0;  // of the products
  };

  // `parts`: how many shares the products of a block have, and threads that take tasks at most.
  Waves(int passes, int parts) : passes_(passes), parts_(parts) {}

  // A task for the calling thread, when there is one; kNothing when all is done or abandoned.
  Task next();

  // Says that a task is done: whether its pass has now taken all steps, and after a piece whether
  // products are to be made before the next.
  void complete(const Task& task, bool is_last, bool owes_products);

  // Nobody gets another task: one has failed, and what depends on it could not be done.
  void abandon();

 private:
  struct Pass {
    Kind phase = Kind::kStart;                   // kPiece until nothing but its finish is left
    bool is_taken = false;                       // the phase's task
    int64_t pieces = 0;                          // that are done; in the end all have the same
    int parts_to_take = 0, parts_to_finish = 0;  // of a block's products
  };

  bool find(Task* task);
  bool has_input(int pass) const;

  std::mutex mutex_;
  std::vector<Pass> passes_;
  int num_done_ = 0;
  bool is_abandoned_ = false;
  const int parts_;
  std::atomic<uint32_t> changes_{0};
};

}  // namespace fastbptt
