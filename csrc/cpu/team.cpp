#include "cpu/team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <memory>

namespace fastbptt {
namespace {

// A forked child inherits the thread pool's records but none of its threads: using it would hang.
std::atomic<bool> in_forked_child{false};
const int fork_handler_installed = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

int usable_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spinning only pays while every thread of the team has a core.
int spin_limit(int team) {
  static const int cores = usable_cores();
  return team <= cores ? 2000 : 0;
}

}  // namespace

void Barrier::arrive() const {
  if (size == 1) return;
  const uint32_t now = arrivals[id].count.load(std::memory_order_relaxed) + 1;
  arrivals[id].count.store(now, std::memory_order_release);
}

void Barrier::await() const {
  if (size == 1) return;
  const uint32_t now = arrivals[id].count.load(std::memory_order_relaxed);
  int spins = spin_limit(size);
  for (int other = 0; other < size; ++other) {
    // Another thread may already have arrived at the next barrier, though at none beyond it.
    while (int32_t(arrivals[other].count.load(std::memory_order_acquire) - now) < 0) {
      if (--spins > 0) {
        relax();
      } else {
        sched_yield();
      }
    }
  }
}

void run_team(int threads, void (*fn)(const void* context, const Worker& worker),
              const void* context) {
  if (threads <= 1 || omp_in_parallel() || in_forked_child) {
    Arrivals everyone, group;
    fn(context, Worker{0, 1, {&everyone, 1, 0}, &group});
    return;
  }
  const auto arrivals = std::make_unique<Arrivals[]>(2 * threads);
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), count = omp_get_num_threads();
    fn(context, Worker{id, count, {arrivals.get(), count, id}, arrivals.get() + threads});
  }
}

namespace {

// A rough machine, in cycles; only ratios matter. Vectors of weights that a core reads a cycle by
// the size of its share: from the first, the second and the last cache.
double vectors_per_cycle(double bytes, int vec_bytes) {
  const double rate = bytes <= (32 << 10) ? 128 : bytes <= (768 << 10) ? 48 : 14;
  return std::min(2.0, rate / vec_bytes);
}

constexpr double kBarrierCycles = 500;
constexpr double kStepCycles = 60;  // activation latency and loop overhead

// One step of one thread with `rows` lanes and `vecs` vectors of columns.
double step_cycles(int64_t rows, int64_t K, int64_t vecs, int vec_bytes) {
  const double products = double(K) * vecs;
  const double compute = products * rows / 2;
  const double read = products / vectors_per_cycle(products * vec_bytes, vec_bytes);
  // They overlap, but not wholly.
  return std::max(compute, read) + std::min(compute, read) / 4 + kStepCycles;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Split choose_split(int threads, int64_t rows, int64_t K, int64_t unit_vecs, int64_t gates,
                   int vec_bytes) {
  Split best{1, 1};
  double least = step_cycles(rows, K, unit_vecs * gates, vec_bytes);
  for (int unit_parts = 1; unit_parts <= std::min<int64_t>(threads, unit_vecs); ++unit_parts) {
    const int batch_parts = int(std::min<int64_t>(threads / unit_parts, rows));
    const int64_t vecs = ceil_div(unit_vecs, unit_parts) * gates;
    const double cycles = step_cycles(ceil_div(rows, batch_parts), K, vecs, vec_bytes) +
                          (unit_parts > 1 ? kBarrierCycles : 0);
    if (cycles < least) {
      least = cycles;
      best = {batch_parts, unit_parts};
    }
  }
  return best;
}

int useful_threads(int available, double multiply_adds) {
  // Waking the pool costs about as much as this many multiply-adds on one core.
  constexpr double kPerThread = 1.5e6;
  return int(std::clamp(multiply_adds / kPerThread, 1.0, double(std::max(available, 1))));
}

}  // namespace fastbptt
