// Who should compute what, by a model of what a step of a recurrence costs.
#pragma once

#include <cstdint>

namespace fastbptt {

// How parts share a recurrence: over the batch (no synchronisation), over the hidden units (a barrier
// a step), or both. batch_parts * unit_parts of them take part.
struct Split {
  int batch_parts;
  int unit_parts;
};

// What a step multiplies: `rows` lanes of K values by `unit_vecs` vectors of units with `gates` gates.
struct StepWork {
  int64_t rows, K, unit_vecs, gates;
  int vec_bytes;
  int tile_rows;     // as many as a product multiplies at once
  int barriers = 1;  // between parts that share units
};

// The split that takes the least time by count.
Split choose_split(int parts, const StepWork& work);

// Whether so many passes with such steps take less time side by side, each on one thread, than one
// after another.
bool pays_side_by_side(int passes, int parts, const StepWork& work);

// Whether so many passes of `steps` steps, each of which reads what the one before gives, take less
// time in waves, each on one thread at a time, than one after another.
bool pays_in_waves(int passes, int parts, int64_t steps, const StepWork& work);

// Steps that a pass takes at once in waves: few enough that all threads soon have some, and as many
// as fill the tiles of a product.
int64_t steps_of_piece(int64_t steps, const StepWork& work);

// How many steps take about as long as it costs little to let the threads of a team change.
int64_t steps_between_changes(Split split, const StepWork& work);

// How many threads are worth waking for this many multiply-adds.
int useful_threads(int available, double multiply_adds);

}  // namespace fastbptt
