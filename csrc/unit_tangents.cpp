// One translation unit of these: torch's headers take the compiler longer than what they are for.
#include "tangents.cpp"
#include "tangents_bwd.cpp"
#include "user_cell/call.cpp"
#include "user_cell/draws.cpp"
#include "user_cell/layer.cpp"
#include "user_cell/layout.cpp"
#include "user_cell/steps.cpp"
