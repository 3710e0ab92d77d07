// One translation unit of these: torch's headers take the compiler longer than what they are for.
#include "operators.cpp"
#include "test_operators.cpp"
