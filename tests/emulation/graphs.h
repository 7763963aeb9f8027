// Launches that are captured and replayed, as by a CUDA graph.
#pragma once

#include <functional>

namespace emulation {

// Between the beginning and the end of a capture launches are not made, but added to the graph.
bool capturing();
void add_to_graph(std::function<void()> launch);

} // namespace emulation
