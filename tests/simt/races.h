// A race detector: finds two threads that access one address without an order between them. The shim reports
// events to races.cpp, which keeps the last accesses to every word and, for every thread, what it knows of the
// other threads (as vector clocks do). The result does not depend on the order in which a run's threads happen to
// run: one run covers every order in which the atomics at each address come in the same sequence.
//
// A source compiled with -fsanitize=thread calls a function at every access. races.cpp defines these functions, in
// place of the sanitizer's library. Compile with -DSIMT_RACES and link with races.cpp. Without SIMT_RACES
// everything here is a no-op.
//
// Only these order accesses:
//
// - A barrier of a block, of a warp or of a cluster (a cluster's from the arrival on). Shuffles, votes and
//   tensor-core products do not.
// - The sequence: __threadfence(), an atomic, another atomic at the same address, __threadfence(). What precedes
//   the first fence is ordered before what follows the second, whatever value the second atomic returns. Another
//   thread may make either fence if a barrier joins it to the thread of the atomic.
// - A launch, after everything before it. A programmatic dependent launch: after the launch before it, and what
//   that one waited for, once it has called cudaGridDependencySynchronize().
//
// Another block's shared memory may be accessed only after a barrier of the cluster.
//
// False negatives: more than four accesses to a word without an order among them; memcpy and memset where they
// remain calls; variables of the program outside shared memory. False positives: it does not know that a cluster's
// barrier passes on what a block has learnt through atomics, nor that this barrier and atomics pass on a wait for
// the previous launch. No kernel here relies on either.
#pragma once

#include <cstddef>

namespace simt {
#ifdef SIMT_RACES
struct Races {
  // [begin, end): the program itself, which is not watched.
  static void launch(unsigned threads, bool follows, const void* begin, const void* end);
  static void host_write();  // in the stream's order
  static void start_block(unsigned slot, unsigned cluster, unsigned rank, unsigned blocks,
                          const void* shared, size_t bytes);
  static void move_in(unsigned slot, const void* at);  // the block's shared memory is at `at` until the next one's
  static void end_block(unsigned slot);
  // The thread that runs from now on. Accesses to its stack are not watched.
  static void run(unsigned slot, unsigned thread, const void* stack, size_t bytes);
  static void shim(int by);  // 1: what follows is the shim's own; -1: the kernel's again
  static void block_barrier();  // of the block that is switched in
  static void warp_barrier(unsigned first, unsigned mask);
  static void cluster_arrive();
  static void cluster_open(unsigned thread);
  static void map_in_cluster(unsigned rank);
  static void fence();
  static void wait_for_previous();
  static void atomic(const void* at, size_t bytes);
  static void access(const void* at, size_t bytes, bool write);
};
#else
struct Races {
  static void launch(unsigned, bool, const void*, const void*) {}
  static void host_write() {}
  static void start_block(unsigned, unsigned, unsigned, unsigned, const void*, size_t) {}
  static void move_in(unsigned, const void*) {}
  static void end_block(unsigned) {}
  static void run(unsigned, unsigned, const void*, size_t) {}
  static void shim(int) {}
  static void block_barrier() {}
  static void warp_barrier(unsigned, unsigned) {}
  static void cluster_arrive() {}
  static void cluster_open(unsigned) {}
  static void map_in_cluster(unsigned) {}
  static void fence() {}
  static void wait_for_previous() {}
  static void atomic(const void*, size_t) {}
  static void access(const void*, size_t, bool) {}
};
#endif
}  // namespace simt
