// The threads that run one kernel together.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastbptt {

// How many barriers a thread has arrived at.
struct alignas(64) Arrivals {
  std::atomic<uint32_t> count{0};
};

// One thread's view of a barrier. Each thread announces its own arrival and watches for the others',
// so that the last arrival costs the transfer of one cache line. It spins, and yields when it has
// spun too long.
struct Barrier {
  Arrivals* arrivals;  // [size]
  int size;
  int id;  // of this thread among `size`

  void arrive() const;  // what this thread wrote before is there for those that await
  void await() const;   // until all have arrived as often as this thread
  void wait() const { arrive(), await(); }
};

// One thread's place in its team.
struct Worker {
  int id;
  int count;
  Barrier everyone;
  Arrivals* group_arrivals;  // [count], for barriers of parts of the team
};

// Runs fn(context, worker) on up to `threads` threads. The team's real size is worker.count: OpenMP
// may give fewer threads than asked for. Inside another parallel region, and in a forked child,
// which has lost its parent's threads, the team is the calling thread alone.
void run_team(int threads, void (*fn)(const void* context, const Worker& worker),
              const void* context);

// How the threads share a recurrence: over the batch (no synchronisation), over the hidden units
// (a barrier a step), or both. batch_parts * unit_parts threads take part.
struct Split {
  int batch_parts;
  int unit_parts;
};

// The split that takes the least time by count, for `rows` lanes whose step multiplies K values by
// `unit_vecs` vectors of units with `gates` gates.
Split choose_split(int threads, int64_t rows, int64_t K, int64_t unit_vecs, int64_t gates,
                   int vec_bytes);

// How many threads are worth waking for this many multiply-adds.
int useful_threads(int available, double multiply_adds);

}  // namespace fastbptt
