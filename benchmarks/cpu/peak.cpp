// As many multiplications and additions a second as the vector units can do: the bound of what is
// arithmetic. No memory is read; the operands stay in registers.
//
// KVECTOR_BYTES is the width of a register of the instruction set that the kernels use.

#include <cstdint>

typedef float Vector __attribute__((vector_size(KVECTOR_BYTES)));
constexpr int kLanes = KVECTOR_BYTES / sizeof(float);

// Chains that do not wait for each other: more than two units times a latency of 4 or 5 cycles, and
// with the two operands they fit the 16 registers that every set has.
#define CHAINS(DO) \
  DO(a0) DO(a1) DO(a2) DO(a3) DO(a4) DO(a5) DO(a6) DO(a7) DO(a8) DO(a9) DO(a10) DO(a11)
constexpr int kChains = 12;

#if defined(__x86_64__)
#define IN_REGISTER(a) asm volatile("" : "+x"(a));
#elif defined(__aarch64__)
#define IN_REGISTER(a) asm volatile("" : "+w"(a));
#else
#error "no vector registers are known here"
#endif

static void run(int64_t iterations) {
  Vector x = Vector{} + 0.999f, y = Vector{} + 1e-3f;
#define DECLARE(a) Vector a{};
#define MULTIPLY_ADD(a) a = a * x + y;
  CHAINS(DECLARE)
  // What passes through assembly is unknown to the compiler: it can neither merge the chains nor
  // compute them ahead.
  IN_REGISTER(x) IN_REGISTER(y) CHAINS(IN_REGISTER)
  for (int64_t i = 0; i < iterations; ++i) {
    CHAINS(MULTIPLY_ADD)
    IN_REGISTER(a0)
  }
  CHAINS(IN_REGISTER)
}

extern "C" int64_t fma_flops(int64_t iterations) { return 2 * iterations * kChains * kLanes; }

// In each of so many threads.
extern "C" void fma_run(int threads, int64_t iterations) {
#pragma omp parallel num_threads(threads)
  run(iterations);
}
