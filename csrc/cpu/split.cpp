#include "cpu/split.h"

#include <algorithm>

namespace fastbptt {
namespace {

// A rough machine, in cycles; only ratios matter.
constexpr double kCoreCache = 768 << 10;  // bytes of a core's second cache that weights may fill
constexpr double kBytesPerCycle = 14;     // from the last cache

// Vectors of weights that a core reads a cycle by the size of its share: from the first, the second
// and the last cache.
double vectors_per_cycle(double bytes, int vec_bytes) {
  const double rate = bytes <= (24 << 10) ? 128 : bytes <= kCoreCache ? 32 : kBytesPerCycle;
  return std::min(2.0, rate / vec_bytes);
}

// A barrier: the transfer of one cache line, which takes a few hundred cycles between cores that share a
// cache and thousands where a virtual machine has them apart, and of one more for each further thread.
// It is not measured, since the split decides which bits come out.
constexpr double kBarrierCycles = 800, kFurtherArrivalCycles = 100;
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

double split_cycles(Split split, const StepWork& work) {
  const int64_t vecs = ceil_div(work.unit_vecs, split.unit_parts) * work.gates;
  const double barrier =
      split.unit_parts > 1 ? kBarrierCycles + kFurtherArrivalCycles * (split.unit_parts - 1) : 0;
  return step_cycles(ceil_div(work.rows, split.batch_parts), work.K, vecs, work.vec_bytes) +
         barrier * work.barriers;
}

}  // namespace

Split choose_split(int parts, const StepWork& work) {
  Split best{1, 1};
  double least = split_cycles(best, work);
  for (int unit_parts = 1; unit_parts <= std::min<int64_t>(parts, work.unit_vecs); ++unit_parts) {
    const Split split{int(std::min<int64_t>(parts / unit_parts, work.rows)), unit_parts};
    const double cycles = split_cycles(split, work);
    if (cycles < least) {
      least = cycles;
      best = split;
    }
  }
  return best;
}

// What another way than steps by all threads must promise.
constexpr double kLeastGain = 1.1;

bool pays_side_by_side(int passes, int parts, const StepWork& work) {
  if (passes == 1 || parts == 1) return false;
  const double one = split_cycles({1, 1}, work) / std::min(passes, parts);
  return kLeastGain * one < split_cycles(choose_split(parts, work), work);
}

int64_t steps_of_piece(int64_t steps, const StepWork& work) {
  constexpr int64_t kPieces = 32;
  constexpr int64_t kTiles = 2;  // enough that what begins and ends a piece costs little
  const int64_t least = ceil_div(kTiles * work.tile_rows, work.rows);
  return ceil_div(std::max(steps / kPieces, least), least) * least;
}

bool pays_in_waves(int passes, int parts, int64_t steps, const StepWork& work) {
  if (passes == 1 || parts == 1) return false;
  const int64_t piece = steps_of_piece(steps, work), pieces = ceil_div(steps, piece);
  const int busy = std::min(passes, parts);
  // Threads change between passes: where the weights of one, W_hh and W_ih, have no room in a core's
  // cache, each piece reads them from the last one.
  const double bytes = 2.0 * work.K * work.unit_vecs * work.gates * work.vec_bytes;
  const double read = bytes > kCoreCache ? bytes / kBytesPerCycle : 0;
  const double one = piece * split_cycles({1, 1}, work) + read;
  // The last of the threads begins when each pass before its own has made a piece.
  const double waves = one * (double(pieces) * passes / busy + (busy - 1) / 2.0);
  const double each = steps * split_cycles(choose_split(parts, work), work) * passes;
  return kLeastGain * waves < each;
}

int64_t steps_between_changes(Split split, const StepWork& work) {
  constexpr double kCycles = 400e3;  // 0.1 ms and more
  return 1 + int64_t(kCycles / split_cycles(split, work));
}

int useful_threads(int available, double multiply_adds) {
  // Waking the pool costs about as much as this many multiply-adds on one core.
  constexpr double kPerThread = 1.5e6;
  return int(std::clamp(multiply_adds / kPerThread, 1.0, double(std::max(available, 1))));
}

}  // namespace fastbptt
