// A thin SIMT shim. It stands in for CUDA's cuda_runtime.h, so that the host compiler turns an
// unmodified .cu file into a CPU program. Put this folder first on the include path.
//
// A block's threads are fibers of one OS thread. A warp runs until all of its lanes are at a barrier of
// the block; then the next warp runs. Within a warp, a lane runs until it reaches a barrier or a shuffle.
// Threads are therefore as far apart as the barriers allow: if a __syncthreads() is missing, a thread
// reads shared memory that has not been written yet, or that a faster thread has already overwritten.
// simt::order sets the order of blocks, warps and lanes: 0 ascending, 1 descending, otherwise shuffled
// with that seed.
//
// In a shuffled launch, threads also switch at some atomics, and three blocks are in flight at once, taking turns
// after any warp. At most once per launch without clusters, one block passes barrier order % 6 with its first warp
// alone; its other warps follow after all other blocks have ended. If a block announces results before all of its
// threads have written them, the other blocks then miss the late writes. (Every write is visible at once, so only
// races.h can show a missing __threadfence().)
//
// The blocks of a cluster are in flight together, and only they may access each other's shared memory.
// In a shuffled launch, one of them gets its turn only when no other can go on, and a thread that arrives
// at the cluster's barrier waits for its block's next turn.
//
// Shared memory is filled with NaN before every block, and what lies behind a launch's dynamic shared memory must
// still hold NaN afterwards. The shim aborts with a message on a write behind it, on threads that wait at different
// barriers (those that have exited do not count), and on a vote with lanes that have left. A launch with more dynamic
// shared memory than was requested, or than any GPU has, returns an error. Compile with -fsanitize=undefined to find
// misaligned vector accesses and indices outside shared arrays.
#pragma once

#define CUDART_VERSION 13000

#include <link.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "../fibers.h"
#include "races.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SIMT_INLINE [[gnu::always_inline]] inline  // so that its return address is in the kernel
#define __shared__ thread_local  // the thread-local segment can be found and filled
#define __syncthreads() simt::wait(simt::Wait::block, 0, __LINE__)
#define __cluster_barrier_arrive() simt::arrive_in_cluster()
#define __cluster_barrier_wait() simt::wait(simt::Wait::cluster, 0, __LINE__)

using std::max;
using std::min;

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __fmul_rn(float a, float b) { return a * b; }  // compile with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline uint4 __ldcs(const uint4* from) { return *from; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += int8_t(a >> i) * int8_t(b >> i);
  return sum;
}

namespace simt {

inline unsigned order = 0;
inline long blocks_run = 0;
inline unsigned char* dynamic_shared = nullptr;  // the harness's array, and its size
inline size_t dynamic_capacity = 0, dynamic_bytes = 0;  // dynamic_bytes: the launch's
inline std::map<const void*, int> dynamic_allowed;  // set by cudaFuncSetAttribute
constexpr size_t kStackBytes = 1 << 16;
constexpr int kDynamicDefault = 48 << 10, kDynamicMost = 227 << 10;
inline int most_cluster = 0;  // blocks; 0: a device without clusters, < 0: one that rejects cluster settings
inline int most_dynamic() { return most_cluster ? kDynamicMost : 99 << 10; }  // sm_90; sm_86, 89 and 120
inline long questions = 0;  // number of cluster occupancy queries

enum class Wait { none, block, warp, cluster, turn };  // turn: the block's next one

struct Fiber {
  fibers::Fiber fiber;
  dim3 index;
  unsigned id;
  bool done;
  Wait waits;
  unsigned mask;  // lanes of a warp's barrier
  int line;       // of the barrier
  bool orders;    // whether the barrier orders memory accesses; shuffles and votes do not
  unsigned cluster_barriers;  // cluster barriers at which it has arrived
};

struct Warp { uint64_t lanes[32]; };  // what a shuffle or a vote exchanges

struct Cluster {
  unsigned first, blocks;  // index of its first block
  unsigned arrived, barriers;  // threads at the current barrier; completed barriers
};

struct Block {
  dim3 index;
  Cluster* cluster;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;  // its shared memory while another block is switched in
  bool live;
  unsigned barriers;  // completed barriers of the block
  bool behind;        // no thread has run since the last barrier, or since the start
};

inline Fiber* current = nullptr;
inline Block* inside = nullptr;
inline std::vector<Block> resident;
inline bool moved;  // a thread has run or a barrier has opened since this was last cleared
inline std::mt19937 generator;
inline std::function<void()> body;
inline thread_local unsigned char anchor;  // ensures that there is a thread-local segment
inline unsigned char* shared_begin = nullptr;
inline size_t shared_size = 0;
inline const unsigned char *program_begin = nullptr, *program_end = nullptr;  // in memory

// While an instance exists, the thread's accesses are the shim's and not the kernel's.
struct InShim {
  InShim() { Races::shim(1); }
  ~InShim() { Races::shim(-1); }
  InShim(const InShim&) = delete;
};

[[noreturn]] inline void die(const char* what, int a, int b) {
  std::fprintf(stderr, "simt: %s (%d, %d), block (%u, %u, %u)\n", what, a, b, blockIdx.x,
               blockIdx.y, blockIdx.z);
  std::abort();
}

inline void wait(Wait what, unsigned mask, int line, bool orders = true) {
  const InShim in_shim;
  Fiber& me = *current;
  me.waits = what;
  me.mask = mask;
  me.line = line;
  me.orders = orders;
  fibers::leave(me.fiber);
}

inline void arrive_in_cluster() {
  const InShim in_shim;
  Races::cluster_arrive();
  Fiber& me = *current;
  Cluster& cluster = *inside->cluster;
  if (me.cluster_barriers++ != cluster.barriers) die("arrives twice at a cluster's barrier", int(me.id), 0);
  if (++cluster.arrived == cluster.blocks * blockDim.x) {
    cluster.arrived = 0;
    ++cluster.barriers;
  }
  if (order > 1) wait(Wait::turn, 0, 0);  // others may pass the barrier, and even exit, before it goes on
}

// The address of `own` in the cluster's block `rank`. Valid only until another block is switched in.
SIMT_INLINE void* map_in_cluster(const void* own, unsigned rank) {
  const InShim in_shim;
  auto* const at = static_cast<unsigned char*>(const_cast<void*>(own));
  const Cluster& cluster = *inside->cluster;
  if (at < shared_begin || at >= shared_begin + shared_size || rank >= cluster.blocks)
    die("no such shared memory in the cluster, rank, blocks", int(rank), int(cluster.blocks));
  Races::map_in_cluster(rank);
  for (Block& block : resident)
    if (block.cluster == &cluster && block.live && block.index.x == cluster.first + rank)
      return &block == inside ? at : block.shared.data() + (at - shared_begin);
  die("looks into the shared memory of a block that has ended, rank", int(rank), 0);
}

inline void perhaps_change_over() {
  if (order > 1 && generator() % 32 == 0) wait(Wait::none, 0, 0);
}

// A fiber is reused for the threads of later blocks.
[[noreturn]] inline void fiber_main() {
  for (;;) {
    Races::shim(-1);
    body();
    Races::shim(1);
    current->done = true;
    fibers::leave(current->fiber);
  }
}

// This library's thread-local segment is its shared memory.
inline int find_own_segment(dl_phdr_info* info, size_t, void* here) {
  bool own = false;
  const unsigned char *begin = nullptr, *end = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& p = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + p.p_vaddr, at = reinterpret_cast<uintptr_t>(here);
    if (p.p_type != PT_LOAD) continue;
    own = own || (at >= start && at < start + p.p_memsz);
    end = reinterpret_cast<const unsigned char*>(start) + p.p_memsz;
    if (!begin) begin = end - p.p_memsz;
  }
  if (own) program_begin = begin, program_end = end;
  for (int i = 0; own && i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS) {
      shared_begin = static_cast<unsigned char*>(info->dlpi_tls_data);
      shared_size = info->dlpi_phdr[i].p_memsz;
    }
  return own;
}

inline std::vector<unsigned> sequence(unsigned count) {
  std::vector<unsigned> ids(count);
  std::iota(ids.begin(), ids.end(), 0u);
  if (order == 1) std::reverse(ids.begin(), ids.end());
  if (order > 1) std::shuffle(ids.begin(), ids.end(), generator);
  return ids;
}

inline dim3 unflatten(unsigned id, dim3 shape) {
  return {id % shape.x, id / shape.x % shape.y, id / shape.x / shape.y};
}

// Releases lanes of a warp that have all reached the same barrier, and returns whether there were any. All live
// lanes of the warp are waiting.
inline bool release_warp(std::vector<Fiber>& fibers, size_t first) {
  bool any = false;
  for (size_t at = first; at < min(first + 32, fibers.size()); ++at) {
    const Fiber& f = fibers[at];
    if (f.done || f.waits != Wait::warp) continue;
    bool complete = f.mask >> f.id % 32 & 1;
    if (!complete) die("a lane is not in its own mask, line", f.line, int(f.id));
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(f.mask >> lane & 1)) continue;
      if (first + lane >= fibers.size() || fibers[first + lane].done)
        die("a lane in the mask has left, line", f.line, int(first + lane));
      const Fiber& other = fibers[first + lane];
      complete = complete && other.waits == Wait::warp && other.line == f.line &&
                 other.mask == f.mask;
    }
    if (!complete) continue;
    const unsigned mask = f.mask;
    for (unsigned lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) fibers[first + lane].waits = Wait::none;
    if (f.orders) Races::warp_barrier(unsigned(first), mask);
    any = true;
  }
  return any;
}

// The same for the block's barrier and for its cluster's. Returns false if no thread is left.
inline bool release_block(Block& block) {
  int line = 0;
  bool opened = false, waits = false;
  for (Fiber& f : block.fibers) {
    if (f.done || f.waits != Wait::cluster) continue;
    const bool open = f.cluster_barriers <= block.cluster->barriers;
    if (open) {
      f.waits = Wait::none;
      Races::cluster_open(f.id);
    }
    opened = opened || open;
    waits = waits || !open;
  }
  moved = moved || opened;
  if (opened || waits) return true;
  for (Fiber& f : block.fibers) {
    if (f.done) continue;
    if (line && line != f.line) die("threads wait at different barriers", line, f.line);
    line = f.line;
    if (f.waits != Wait::block) die("lanes of a warp wait for others for ever, line", f.line, 0);
  }
  for (Fiber& f : block.fibers) f.waits = Wait::none;
  Races::block_barrier();
  ++block.barriers;
  block.behind = true;
  moved = true;
  return line != 0;
}

inline void start(Block& block, unsigned id, Cluster* cluster) {
  block.index = unflatten(id, gridDim);
  block.cluster = cluster;
  block.live = true;
  block.barriers = 0;
  block.behind = true;
  block.shared.assign(shared_size, 0xFF);  // NaNs and wild indices
  Races::start_block(unsigned(&block - resident.data()), cluster->first, id - cluster->first, cluster->blocks,
                     block.shared.data(), shared_size);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  block.fibers.resize(threads);
  block.warps.resize((threads + 31) / 32);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i];
    f.index = unflatten(i, blockDim);
    f.id = i;
    f.done = false;
    f.waits = Wait::none;
    f.cluster_barriers = 0;
    if (!f.fiber.begun) fibers::prepare(f.fiber, kStackBytes, fiber_main);
  }
}

// Copies the shared memory that belongs to the launch: all but what lies behind its dynamic part.
inline void copy_shared(unsigned char* to, const unsigned char* from) {
  const size_t dynamic = size_t(dynamic_shared - shared_begin);
  const size_t end = dynamic + dynamic_bytes, next = dynamic + dynamic_capacity;
  std::memcpy(to, from, end);
  std::memcpy(to + next, from + next, shared_size - next);
}

inline void enter(Block& block) {
  if (inside == &block) return;
  if (inside) copy_shared(inside->shared.data(), shared_begin);
  copy_shared(shared_begin, block.shared.data());
  inside = &block;
  Races::move_in(unsigned(inside - resident.data()), shared_begin);
}

inline void check_behind_dynamic(const unsigned char* dynamic) {
  static const std::vector<unsigned char> untouched(4096, 0xFF);
  for (size_t at = dynamic_bytes; at < dynamic_capacity; at += untouched.size())
    if (std::memcmp(dynamic + at, untouched.data(), min(untouched.size(), dynamic_capacity - at)))
      die("write behind the dynamic shared memory", int(at), 0);
}

inline bool run_thread(Fiber& f) {
  if (f.done || f.waits != Wait::none) return false;
  moved = true;
  current = &f;
  threadIdx = f.index;
  Races::run(unsigned(inside - resident.data()), f.id, f.fiber.stack.get(), kStackBytes);
  fibers::enter(f.fiber);
  return true;
}

// Runs the block's warps up to the block's next barrier or their ends: the first warp alone, or all; in shuffled
// order perhaps only some. Returns false if the block has ended.
inline bool advance(Block& block, bool first_alone) {
  blockIdx = block.index;
  block.behind = false;
  bool any = false;
  for (Fiber& f : block.fibers)
    if (f.waits == Wait::turn) f.waits = Wait::none;
  for (unsigned warp : first_alone ? std::vector<unsigned>(1) : sequence(unsigned(block.warps.size()))) {
    const unsigned threads = unsigned(block.fibers.size()), first = 32 * warp;
    const std::vector<unsigned> lanes = sequence(min(32u, threads - first));
    bool again;
    do {
      bool ran = false;
      for (unsigned lane : lanes) ran = run_thread(block.fibers[first + lane]) || ran;
      any = any || ran;
      again = ran || release_warp(block.fibers, first);
    } while (again);
    if (first_alone || (order > 1 && generator() % 8 == 0)) return true;
  }
  return any || release_block(block);
}

inline void run_grid(dim3 grid, dim3 block, size_t dynamic, unsigned cluster_blocks, bool follows) {
  if (grid.y > 65535 || grid.z > 65535) die("grid too large in y or z", int(grid.y), int(grid.z));
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) die("threads in a block", int(threads), 1024);
  gridDim = grid;
  blockDim = block;
  generator.seed(order);
  anchor = 0;
  dl_iterate_phdr(find_own_segment, reinterpret_cast<void*>(&find_own_segment));
  Races::launch(threads, follows, program_begin, program_end);
  dynamic_bytes = dynamic;
  std::memset(dynamic_shared, 0xFF, dynamic_capacity);
  const std::vector<unsigned> queue = sequence(grid.x * grid.y * grid.z / cluster_blocks);
  const std::vector<unsigned> ranks = sequence(cluster_blocks);
  std::vector<Cluster> clusters(order > 1 ? cluster_blocks > 1 ? 2 : 3 : 1);
  resident.resize(max(resident.size(), clusters.size() * cluster_blocks));
  for (Block& b : resident) b.live = false;
  size_t started = 0, ended = 0;
  const auto start_cluster = [&](size_t at) {
    if (started == queue.size()) return;
    const unsigned first = queue[started++] * cluster_blocks;
    clusters[at] = {first, cluster_blocks, 0, 0};
    for (unsigned i = 0; i < cluster_blocks; ++i)
      start(resident[at * cluster_blocks + i], first + ranks[i], &clusters[at]);
  };
  for (size_t at = 0; at < clusters.size(); ++at) start_cluster(at);
  // In shuffled order, one block gets its turn only when no other can go on: a block of the cluster, or one that has
  // just passed a barrier.
  const bool by_barrier = order > 1 && cluster_blocks == 1;
  const unsigned slow_barrier = order % 6;
  const size_t nobody = resident.size();
  size_t slow = order > 1 && !by_barrier ? order % cluster_blocks : nobody;
  for (int idle = 0; ended < queue.size(); ++idle) {
    if (idle > 1000) die("a cluster waits for ever", 0, 0);
    for (size_t i = 0; i < clusters.size() * cluster_blocks; ++i) {
      Block& b = resident[i];
      if (!b.live) continue;
      if (order > 1 && generator() % 4) continue;  // a block may fall behind by many turns
      if (i == slow && idle < 20) continue;
      if (i == slow && by_barrier) slow = nobody;
      const bool first_alone = by_barrier && slow == nobody && b.behind && b.barriers == slow_barrier;
      if (first_alone) slow = i;
      enter(b);
      moved = false;
      const bool goes_on = advance(b, first_alone);
      if (moved) idle = 0;
      if (goes_on) continue;
      check_behind_dynamic(dynamic_shared);
      check_behind_dynamic(b.shared.data() + (dynamic_shared - shared_begin));  // written by other blocks
      Races::end_block(unsigned(i));
      inside = nullptr;
      b.live = false;
      idle = 0;
      const size_t own = i / cluster_blocks, first = own * cluster_blocks;
      bool live = false;
      for (size_t at = first; at < first + cluster_blocks; ++at) live = live || resident[at].live;
      if (live) continue;
      ++ended;
      blocks_run += cluster_blocks;
      start_cluster(own);
    }
  }
}

// Each lane of `mask` contributes `mine`. Returns reduce(lanes), where `lanes` holds all contributions.
template <typename T, typename Reduce>
auto exchange(unsigned mask, T mine, int line, Reduce&& reduce) {
  const InShim in_shim;
  Warp& warp = inside->warps[current->id / 32];
  uint64_t& slot = warp.lanes[current->id % 32];
  slot = 0;
  std::memcpy(&slot, &mine, sizeof mine);
  wait(Wait::warp, mask, line, false);
  T lanes[32];
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&lanes[lane], &warp.lanes[lane], sizeof mine);
  wait(Wait::warp, mask, line, false);  // no lane writes its next value before all have read this one
  return reduce(lanes);
}

template <typename T, typename Change>
SIMT_INLINE T atomic(T* at, Change&& change) {
  perhaps_change_over();
  const InShim in_shim;
  Races::atomic(at, sizeof(T));
  const T before = *at;
  *at = change(before);
  return before;
}

}  // namespace simt

// ---- Warps and atomics ---------------------------------------------------------------------------

inline void __threadfence() {
  const simt::InShim in_shim;
  simt::Races::fence();
}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() {
  const simt::InShim in_shim;
  simt::Races::wait_for_previous();
}
inline unsigned __clusterRelativeBlockRank() { return blockIdx.x - simt::inside->cluster->first; }
inline unsigned __clusterSizeInBlocks() { return simt::inside->cluster->blocks; }
SIMT_INLINE void* __cluster_map_shared_rank(const void* own, unsigned rank) {
  return simt::map_in_cluster(own, rank);
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  simt::wait(simt::Wait::warp, mask, line);
}
template <typename T>
T __shfl_sync(unsigned mask, T v, int from, int = 32, int line = __builtin_LINE()) {
  return simt::exchange(mask, v, line, [=](const T* lanes) { return lanes[from % 32]; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int = 32, int line = __builtin_LINE()) {
  const unsigned lane = simt::current->id % 32;
  return __shfl_sync(mask, v, int(lane >= by ? lane - by : lane), 32, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int = 32, int line = __builtin_LINE()) {
  const unsigned lane = simt::current->id % 32;
  return __shfl_sync(mask, v, int(lane + by < 32 ? lane + by : lane), 32, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int with, int = 32, int line = __builtin_LINE()) {
  return __shfl_sync(mask, v, int(simt::current->id % 32) ^ with, 32, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return simt::exchange(mask, vote, line, [=](const int* lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      votes |= unsigned((mask >> lane & 1) && lanes[lane]) << lane;
    return votes;
  });
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) == mask;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v, int line = __builtin_LINE()) {
  return simt::exchange(mask, v, line, [=](const unsigned* lanes) {
    unsigned most = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) most = max(most, lanes[lane]);
    return most;
  });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v, int line = __builtin_LINE()) {
  return ~__reduce_max_sync(mask, ~v, line);
}

template <typename T>
SIMT_INLINE T atomicAdd(T* at, T v) { return simt::atomic(at, [=](T old) { return T(old + v); }); }
template <typename T>
SIMT_INLINE T atomicMax(T* at, T v) { return simt::atomic(at, [=](T old) { return max(old, v); }); }
template <typename T>
SIMT_INLINE T atomicMin(T* at, T v) { return simt::atomic(at, [=](T old) { return min(old, v); }); }
template <typename T>
SIMT_INLINE T atomicOr(T* at, T v) { return simt::atomic(at, [=](T old) { return T(old | v); }); }
template <typename T>
SIMT_INLINE T atomicExch(T* at, T v) { return simt::atomic(at, [=](T) { return v; }); }
template <typename T>
SIMT_INLINE T atomicCAS(T* at, T expected, T v) {
  return simt::atomic(at, [=](T old) { return old == expected ? v : old; });
}

// ---- The runtime API the launchers use ----------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes { int ptxVersion; };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization,  // launches run one after the other here
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct { unsigned x, y, z; } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simt {
inline int loads_left = -1;  // kernels that can be loaded before memory runs out; negative: any number
inline std::set<const void*> loaded;

// A kernel's code is loaded at its first use, and that can fail.
inline cudaError_t load(const void* kernel) {
  if (loaded.count(kernel)) return cudaSuccess;
  if (loads_left == 0) return cudaErrorMemoryAllocation;
  if (loads_left > 0) --loads_left;
  loaded.insert(kernel);
  return cudaSuccess;
}
}  // namespace simt

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline int multiprocessors = 1;  // few, so that a block goes through several tiles or spans
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = simt::most_cluster ? 9 : 8; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = simt::most_dynamic(); break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  simt::Races::host_write();
  std::memset(at, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
// Either of these loads the kernel's code.
template <typename... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Params...)) {
  *attributes = {90};
  return simt::load(reinterpret_cast<const void*>(kernel));
}
template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute what, int bytes) {
  if (const cudaError_t error = simt::load(reinterpret_cast<const void*>(kernel))) return error;
  if (what == cudaFuncAttributeNonPortableClusterSizeAllowed && simt::most_cluster < 0) return cudaErrorInvalidValue;
  if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (bytes > simt::most_dynamic()) return cudaErrorInvalidValue;
  simt::dynamic_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  return 1;
}

inline bool follows(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      return config.attrs[i].val.programmaticStreamSerializationAllowed;
  return false;
}

template <typename... Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Params...),
                                           const cudaLaunchConfig_t* config) {
  ++simt::questions;
  *clusters = int(cluster_of(*config)) <= simt::most_cluster;
  return *clusters ? cudaSuccess : cudaErrorInvalidValue;  // a device may report an error if none fits
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  if (const cudaError_t error = simt::load(reinterpret_cast<const void*>(kernel))) return error;
  const auto allowed = simt::dynamic_allowed.find(reinterpret_cast<const void*>(kernel));
  const size_t most = size_t(allowed == simt::dynamic_allowed.end() ? simt::kDynamicDefault
                                                                    : allowed->second);
  if (config->dynamicSmemBytes > min(most, simt::dynamic_capacity)) return cudaErrorInvalidValue;
  const unsigned cluster = cluster_of(*config);
  if (cluster > unsigned(max(simt::most_cluster, 1)) || config->gridDim.x % cluster)
    return cudaErrorInvalidValue;
  simt::body = [=] { kernel(args...); };
  simt::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster, follows(*config));
  return cudaSuccess;
}
