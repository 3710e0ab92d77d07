#include "cpu/team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>

namespace fastbptt {
namespace {

// A forked child inherits the records of its parent's thread pool but none of its threads: using it
// would hang, here as in torch's own operators. GCC's runtime keeps a pool for each thread that leads,
// so before a thread forks its pool is given up, and parent and child each make a new one at need. It
// cannot be given up inside a parallel region; other runtimes have handlers of their own.
std::atomic<bool> in_forked_child{false};  // with a pool that has lost its threads
thread_local bool pool_given_up = false;

#if defined(__linux__)
#pragma weak omp_pause_resource_all
extern "C" [[gnu::weak]] int kmp_get_blocktime();  // LLVM's and Intel's runtimes alone have it

bool give_up_pool() {
  if (omp_pause_resource_all == nullptr || kmp_get_blocktime != nullptr || in_forked_child) {
    return false;
  }
  return omp_pause_resource_all(omp_pause_hard) == 0;
}
#else
bool give_up_pool() { return false; }
#endif

const int fork_handler_installed = pthread_atfork([] { pool_given_up = give_up_pool(); }, nullptr,
                                                  [] { in_forked_child = !pool_given_up; });

int64_t now() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
#else
  return std::max(1, int(std::thread::hardware_concurrency()));
#endif
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  // `yield` does nothing on most processors; this waits about as long as x86's pause.
  asm volatile("isb" ::: "memory");
#endif
}

// Spinning only pays while every thread of the team has a core.
int spin_limit(int team) {
  static const int cores = usable_cores();
  return team <= cores ? 2000 : 0;
}

// What this thread has lost in waits that outlasted their spinning, ns.
thread_local int64_t time_waited = 0;

// Waits until is_there(): spins, then yields.
template <typename IsThere>
void wait_until(int team, IsThere&& is_there) {
  for (int spins = spin_limit(team); spins > 0; --spins) {
    if (is_there()) return;
    relax();
  }
  if (is_there()) return;
  const int64_t begin = now();
  while (!is_there()) sched_yield();
  time_waited += now() - begin;
}

// What teams have been worth of late, in this process. A call in a team saves what the others did of
// its work, less the time that its own thread waited for them. Where that comes to a loss, calls are
// made alone for a while, and for longer each time that another attempt loses too.
class Experience {
 public:
  bool favours_teams() const { return now() >= alone_until_.load(std::memory_order_relaxed); }
  bool is_loss(int64_t saved) const {
    return saved_.load(std::memory_order_relaxed) + saved < -kTolerance;
  }
  void add(int64_t saved) {
    if (is_loss(saved)) {
      const int64_t longer =
          std::max(2 * pause_.load(std::memory_order_relaxed), kPauseForLoss * -saved);
      const int64_t pause = std::min(longer, kLongestPause);
      pause_.store(pause, std::memory_order_relaxed);
      alone_until_.store(now() + pause, std::memory_order_relaxed);
      saved_.store(0, std::memory_order_relaxed);
      return;
    }
    const int64_t sum = saved_.load(std::memory_order_relaxed) + saved;
    saved_.store(std::min(sum, kMostRemembered), std::memory_order_relaxed);
    if (sum >= kMostRemembered) pause_.store(0, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kTolerance = 300'000, kMostRemembered = 2'000'000;  // ns
  static constexpr int64_t kPauseForLoss = 20, kLongestPause = 1'000'000'000;
  std::atomic<int64_t> saved_{0}, alone_until_{0}, pause_{0};
};

Experience experience;

constexpr uint64_t kClosed = ~uint64_t(0) << 32;  // a ticket without tasks

}  // namespace

void Barrier::arrive() const {
  if (size == 1) return;
  const uint32_t now = arrivals[id].count.load(std::memory_order_relaxed) + 1;
  arrivals[id].count.store(now, std::memory_order_release);
}

void Barrier::await() const {
  if (size == 1) return;
  const uint32_t now = arrivals[id].count.load(std::memory_order_relaxed);
  for (int other = 0; other < size; ++other) {
    // Another part may already have arrived at the next barrier, though at none beyond it.
    const auto has_arrived = [&] {
      return int32_t(arrivals[other].count.load(std::memory_order_acquire) - now) >= 0;
    };
    if (!has_arrived()) wait_until(size, has_arrived);
  }
}

void await_change(const std::atomic<uint32_t>& count, uint32_t seen, int team) {
  wait_until(team, [&] { return count.load(std::memory_order_acquire) != seen; });
}

int Team::members() const {
  if (!open_) return 1;
  return 1 + std::min({waiting_.value.load(std::memory_order_acquire), parts_ - 1, kMostTasks - 1});
}

void Team::post(const Job& job) {
  if (open_ && experience.is_loss(saved_)) close();
  if (!open_) return job.run(job.fn, {0, parts_});
  const int64_t begin = now(), waited_before = time_waited;
  done_.value.store(0, std::memory_order_relaxed);
  job_.store(&job, std::memory_order_relaxed);
  const uint64_t tasks = (uint64_t(1) << job.tasks) - 1;
  ticket_.value.store(uint64_t(++number_) << 32 | tasks, std::memory_order_release);
  int own = 0;
  while (take(0)) ++own;
  wait_until(parts_, [&] { return done_.value.load(std::memory_order_acquire) == job.tasks; });
  if (failed_) std::rethrow_exception(error_);
  const int64_t waited = time_waited - waited_before, worked = now() - begin - waited;
  saved_ += worked * (job.tasks - own) / std::max(own, 1) - waited;
}

// Takes a task and runs it, if there is one: the thread's own, whose memory is in its caches, or else
// that of the thread that is most likely to be late.
bool Team::take(int id) {
  uint64_t ticket = ticket_.value.load(std::memory_order_acquire);
  while (const uint32_t tasks = uint32_t(ticket)) {
    const int task = id < kMostTasks && (tasks >> id & 1) ? id : 31 - __builtin_clz(tasks);
    if (!ticket_.value.compare_exchange_weak(ticket, ticket & ~(uint64_t(1) << task),
                                             std::memory_order_acquire)) {
      continue;
    }
    if (id > 0) waiting_.value.fetch_sub(1, std::memory_order_relaxed);
    const Job& job = *job_.load(std::memory_order_relaxed);
    try {
      job.run(job.fn, {parts_ * task / job.tasks, parts_ * (task + 1) / job.tasks});
    } catch (...) {  // none may leave the region, or the job while others are at it
      keep_error();
    }
    // In this order: when the job is done, who has done it waits for the next.
    if (id > 0) waiting_.value.fetch_add(1, std::memory_order_relaxed);
    done_.value.fetch_add(1, std::memory_order_release);
    return true;
  }
  return false;
}

void Team::follow(int id) {
  waiting_.value.fetch_add(1, std::memory_order_release);
  while (ticket_.value.load(std::memory_order_acquire) != kClosed) {
    if (take(id)) continue;
    wait_until(parts_, [&] {
      const uint64_t ticket = ticket_.value.load(std::memory_order_acquire);
      return uint32_t(ticket) != 0 || ticket == kClosed;
    });
  }
}

void Team::lead(void (*fn)(const void* context, Team& team), const void* context) {
  open_ = true;
  try {
    fn(context, *this);
  } catch (...) {
    keep_error();
  }
  stayed_ = open_;
  if (open_) close();
}

void Team::close() {
  open_ = false;
  ticket_.value.store(kClosed, std::memory_order_release);
}

void Team::keep_error() {
  if (!failed_.exchange(true)) error_ = std::current_exception();
}

bool run_team(int parts, void (*fn)(const void* context, Team& team), const void* context) {
  if (parts <= 1) {
    Team team;
    fn(context, team);
    return true;
  }
  const auto arrivals = std::make_unique<Arrivals[]>(parts);
  Team team(parts, arrivals.get());
  if (omp_in_parallel() || in_forked_child || !experience.favours_teams()) {
    fn(context, team);
    return false;
  }
  int64_t finished = 0;
#pragma omp parallel num_threads(parts)
  {
    if (omp_get_thread_num() > 0) {
      team.follow(omp_get_thread_num());
    } else {
      team.lead(fn, context);
      finished = now();
    }
  }
  // OpenMP has waited for all threads, whether they came or not.
  if (team.failed_) std::rethrow_exception(team.error_);
  experience.add(team.saved_ - (now() - finished));
  return team.stayed_;
}

}  // namespace fastbptt
