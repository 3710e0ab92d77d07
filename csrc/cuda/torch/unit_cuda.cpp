// One translation unit of these: torch's headers take the compiler longer than what they are for.
#include "ops_cuda.cpp"
#include "plan_cuda.cpp"
#include "tangents_cuda.cpp"
