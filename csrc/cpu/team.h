// The threads that run one kernel together, on a machine that may not give all of them.
//
// A kernel divides its work into as many parts as it may use threads, by counts alone: so its results
// are the same bits, whoever computes a part. The calling thread leads. It begins at once and posts
// one job after another; threads that have woken up take a job's parts beside it, and what nobody
// takes it does itself. Where waiting for the others costs it more than they save, it goes on alone,
// and so do the calls after it, for a while.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace fastbptt {

// How many barriers a part of the work has arrived at.
struct alignas(64) Arrivals {
  std::atomic<uint32_t> count{0};
};

// One part's view of a barrier. Each part announces its own arrival and watches for the others', so
// that the last arrival costs the transfer of one cache line. A thread that has several parts must
// bring each of them to a barrier before it awaits the others at it.
struct Barrier {
  Arrivals* arrivals;  // [size]
  int size;
  int id;  // of this part among `size`

  void arrive() const;  // what this thread wrote before is there for those that await
  void await() const;   // until all have arrived as often as this part
};

// One part of the work.
struct Worker {
  int id;
  int count;
  Arrivals* group_arrivals;  // [count], for barriers of groups of parts
};

// Those of the parts that one thread has, [begin, end).
struct Parts {
  int begin, end;
};

// Waits until a count is another than the one seen, as the threads of a team of so many wait for each other.
void await_change(const std::atomic<uint32_t>& count, uint32_t seen, int team);

class Team {
 public:
  Team() : Team(1, &own_arrivals_) {}  // of the calling thread, with one part

  // Runs fn(worker) for every part, in any order and by whoever is there. Returns when all are done;
  // throws what the first that failed threw.
  template <typename Fn>
  void run(const Fn& fn) {
    const auto each = [&](Parts mine) {
      for (int part = mine.begin; part < mine.end; ++part) fn(worker(part));
    };
    post(each, most_tasks());
  }

  // Runs fn(parts) with all parts, at the same time on as many threads as are there now: so those of
  // different threads may wait for each other. fn must not throw: the others would wait for ever.
  template <typename Fn>
  void run_together(const Fn& fn) {
    post(fn, members());
  }

  int parts() const { return parts_; }
  Worker worker(int part) const { return {part, parts_, arrivals_}; }

 private:
  static constexpr int kMostTasks = 32;

  friend bool run_team(int, void (*)(const void*, Team&), const void*);

  struct Job {
    void (*run)(const void* fn, Parts parts);
    const void* fn;
    int tasks;
  };
  template <typename T>
  struct alignas(64) Shared {
    std::atomic<T> value{0};
  };

  Team(int parts, Arrivals* arrivals) : parts_(parts), arrivals_(arrivals) {}

  template <typename Fn>
  void post(const Fn& fn, int tasks) {
    post({[](const void* f, Parts parts) { (*static_cast<const Fn*>(f))(parts); }, &fn, tasks});
  }
  void post(const Job& job);
  int most_tasks() const { return parts_ < kMostTasks ? parts_ : kMostTasks; }
  int members() const;  // who would come to a job now
  bool take(int id);
  void lead(void (*fn)(const void* context, Team& team), const void* context);
  void follow(int id);
  void close();       // the others leave
  void keep_error();  // the exception that is being handled, if it is the first

  const int parts_;
  Arrivals* const arrivals_;  // [parts]
  Arrivals own_arrivals_;
  bool open_ = false;    // whether there are others
  bool stayed_ = false;  // until the end
  uint32_t number_ = 0;  // of the last job
  int64_t saved_ = 0;    // ns that the others have saved the leader, less its waits for them
  // The job's number, and a bit for each of its tasks that nobody has taken. Only who has taken one
  // may look at the job: else it may be over.
  Shared<uint64_t> ticket_;
  std::atomic<const Job*> job_{nullptr};
  Shared<int> done_;     // tasks of the job
  Shared<int> waiting_;  // threads beside the leader that have no task
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // set by who made failed_ true, read when all have done their tasks
};

// Runs fn(context, team) with `parts` parts on up to as many threads, and returns whether it was not
// left alone. What fn throws passes through. Inside another parallel region, and in a forked child
// that could not be given threads of its own, the calling thread is alone.
bool run_team(int parts, void (*fn)(const void* context, Team& team), const void* context);

}  // namespace fastbptt
