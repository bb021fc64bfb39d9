// Where two threads meet at one address without an order: what the shim tells races.cpp, which keeps for
// every word who was there last, and for every thread what it knows of the others. Not by the order that a
// run happens to have: one run shows what any order would in which the atomics at an address come as in it.
//
// A source compiled with -fsanitize=thread calls a function at every access; these are in races.cpp instead
// of the sanitizer's library. Compile with -DSIMT_RACES, and link with it. Without, all of this is nothing.
//
// What orders accesses, and nothing else does:
//
//   a block's barrier, a warp's, a cluster's (from its arrival on)    not shuffles, votes and products
//   __threadfence(), an atomic, an atomic at the same address, __threadfence(): what came before the first
//   has come before what follows the second, whatever the second makes of it; either fence may be of another
//   thread that a barrier joins
//   a launch: all before it; one that follows programmatically: the one before it, and what that one waited
//   for, once it has called cudaGridDependencySynchronize()
//
// Another block's shared memory may be looked into behind a barrier of the cluster only.
//
// It does not see: of a word more than four accesses in no order with each other; memcpy and memset where they
// are calls; variables of the program outside of shared memory. It does not know, and finds races where there are
// none: that a cluster's barrier passes on what a block has learnt by atomics, and that this barrier and atomics
// pass on a wait for the launch before. No kernel here builds upon either.
#pragma once

#include <cstddef>

namespace simt {
#ifdef SIMT_RACES
struct Races {
  // From `begin` to `end`: the program itself, which is not looked at.
  static void launch(unsigned threads, bool follows, const void* begin, const void* end);
  static void host_write();  // in the stream's order
  static void start_block(unsigned slot, unsigned cluster, unsigned rank, unsigned blocks,
                          const void* shared, size_t bytes);
  static void move_in(unsigned slot, const void* at);  // its shared memory lies there for now
  static void end_block(unsigned slot);
  // The thread that runs from now on; its stack is its own.
  static void run(unsigned slot, unsigned thread, const void* stack, size_t bytes);
  static void shim(int by);  // 1: what follows is the shim's own; -1: the kernel's again
  static void block_barrier();  // of the block that is in
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
