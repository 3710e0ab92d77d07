// What a team's work throws comes out of run_team, whoever threw it, and the next team is whole.
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/team.h"
#include "cpu/waves.h"

using namespace fastbptt;

namespace {

constexpr int kParts = 4;

// What run_team throws with fn(team), or nothing.
template <typename Fn>
std::string error_of(const Fn& fn) {
  try {
    run_team(
        kParts, [](const void* context, Team& team) { (*static_cast<const Fn*>(context))(team); },
        &fn);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

int failures = 0;
void expect(const std::string& found, const std::string& wanted, const char* of) {
  if (found == wanted) return;
  std::printf("%s: \"%s\" instead of \"%s\"\n", of, found.c_str(), wanted.c_str());
  ++failures;
}

}  // namespace

int main() {
  for (int round = 0; round < 200; ++round) {
    for (int bad = 0; bad < kParts; ++bad) {
      const std::string found = error_of([&](Team& team) {
        team.run([&](const Worker& worker) {
          if (worker.id == bad) throw std::runtime_error("part " + std::to_string(bad));
        });
      });
      expect(found, "part " + std::to_string(bad), "one part");
    }
    expect(error_of([](Team&) { throw std::bad_alloc(); }), "std::bad_alloc", "the leader");
    // All wait for passes of which one fails: nobody may wait for ever.
    const std::string found = error_of([&](Team& team) {
      Waves waves(3, team.parts());
      team.run([&](const Worker&) {
        try {
          for (Waves::Task task; (task = waves.next()).kind != Waves::Kind::kNothing;) {
            if (task.pass == round % 3) throw std::runtime_error("a pass");
            waves.complete(task, task.kind == Waves::Kind::kPiece, false);
          }
        } catch (...) {
          waves.abandon();
          throw;
        }
      });
    });
    expect(found, "a pass", "waves");
    int done[kParts] = {};
    expect(
        error_of([&](Team& team) { team.run([&](const Worker& worker) { ++done[worker.id]; }); }),
        "", "the next");
    for (int count : done) {
      if (count != 1) expect(std::to_string(count), "1", "a part of the next");
    }
  }
  return failures ? 1 : 0;
}
