// Where the sums of a K that is split go, and the tickets by which thread blocks find the last one of a tile.
#pragma once

#include <cstdint>

namespace exllama::cuda {

// Both null: K is not split. Tickets null: another kernel adds the partials up.
struct Splits {
  float* partials;    // (splits, M, columns)
  uint32_t* tickets;  // (thread blocks of a split,), all 0 before the launch and after it
};

// A launch with more tiles than this has a second kernel add up its partials.
inline constexpr int64_t kTickets = 512;

// Tickets for a launch on a stream of the current device, or null where there are none for it.
//
// No two launches that run at a time may share tickets. They cannot lie in the workspace: that memory is dirty, and
// cleaning it would be a second launch. So they are memory of this library, zero from the beginning, which every launch
// leaves zero. A set of them belongs to whoever runs one launch at a time: a stream, or a stream in a captured graph.
//
//   a stream             has its set for as long as the process lives, by its id, which is never another stream's
//   a captured graph     has a set for each stream that was captured. It gives them back when the graph is destroyed with
//                        all that was instantiated from it
//   several graphs       have sets of their own, whatever streams they are replayed on
//   one graph, twice     runs one after the other: the workspace that was captured allows no more, nor does CUDA
//
// That is what torch's allocator takes for granted of the workspace itself: what follows on a stream runs later, and a
// graph owns its memory. Where there are no sets left, or a driver does not tell, sums are added by a second kernel.
uint32_t* tickets_for(void* stream);

}  // namespace exllama::cuda
