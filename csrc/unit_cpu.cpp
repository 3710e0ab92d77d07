// One translation unit of these: torch's headers take the compiler longer than what they are for.
#include "ops_cpu.cpp"
#include "tangents_cpu.cpp"
