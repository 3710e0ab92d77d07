// One translation unit of these: torch's headers take the compiler longer than what they are for.
#include "network.cpp"
#include "network_bwd.cpp"
#include "network_second.cpp"
#include "ops.cpp"
