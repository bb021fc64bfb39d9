// A thin SIMT shim: stands in for CUDA's cuda_runtime.h, so that the host compiler turns the very
// same .cu file into a CPU program. Put this folder first on the include path.
//
// A block's threads are fibers of one OS thread. A warp runs until all its lanes are at a barrier of
// the block, then the next one does, and within a warp a lane until it meets a barrier or a shuffle:
// threads are as far apart as the barriers allow, so a missing __syncthreads() reads shared memory
// that nobody has written yet, or that a faster thread has already overwritten. Blocks, warps and
// lanes run in the order simt::order asks for: 0 ascending, 1 descending, else shuffled by that
// seed. Shuffled, threads also change over at some atomics, and three blocks are under way at once,
// taking turns after any warp: what one announces before all of its threads have written it, the
// others miss. (Every write is seen at once: a missing __threadfence() does not show.)
//
// Shared memory is filled with NaN before every block, and what lies behind a launch's dynamic
// shared memory must still hold it afterwards. Barriers that not all threads reach, votes of lanes
// that have left, more dynamic shared memory than asked for or than any GPU has: it aborts and says
// so. Compile with -fsanitize=undefined: it finds misaligned vector accesses and indices outside
// shared arrays.
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

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local  // that segment can be found and filled
#define __syncthreads() simt::wait(simt::Wait::block, 0, __LINE__)

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

namespace simt {

inline unsigned order = 0;
inline long blocks_run = 0;
inline unsigned char* dynamic_shared = nullptr;  // the harness's array, and its size
inline size_t dynamic_capacity = 0;
inline std::map<const void*, int> dynamic_allowed;  // by cudaFuncSetAttribute
constexpr int kDynamicDefault = 48 << 10, kDynamicMost = 99 << 10;  // sm_86, 89 and 120: 99 KB

enum class Wait { none, block, warp };

struct Fiber {
  fibers::Fiber fiber;
  dim3 index;
  unsigned id;
  bool done;
  Wait waits;
  unsigned mask;  // lanes of a warp's barrier
  int line;       // of the barrier
};

struct Warp { uint64_t lanes[32]; };  // what a shuffle or a vote exchanges

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;  // its shared memory while another block is in
  bool live;
};

inline Fiber* current = nullptr;
inline Block* inside = nullptr;
inline std::mt19937 generator;
inline std::function<void()> body;
inline thread_local unsigned char anchor;  // so that there is a thread-local segment
inline unsigned char* shared_begin = nullptr;
inline size_t shared_size = 0;

[[noreturn]] inline void die(const char* what, int a, int b) {
  std::fprintf(stderr, "simt: %s (%d, %d), block (%u, %u, %u)\n", what, a, b, blockIdx.x,
               blockIdx.y, blockIdx.z);
  std::abort();
}

inline void wait(Wait what, unsigned mask, int line) {
  Fiber& me = *current;
  me.waits = what;
  me.mask = mask;
  me.line = line;
  fibers::leave(me.fiber);
}

inline void perhaps_change_over() {
  if (order > 1 && generator() % 32 == 0) wait(Wait::none, 0, 0);
}

inline void fiber_main() {
  body();
  current->done = true;
  fibers::leave(current->fiber);
}

// This library's thread-local segment is its shared memory.
inline int find_own_segment(dl_phdr_info* info, size_t, void* here) {
  bool own = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& p = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + p.p_vaddr, at = reinterpret_cast<uintptr_t>(here);
    own = own || (p.p_type == PT_LOAD && at >= start && at < start + p.p_memsz);
  }
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
  if (order > 1) std::shuffle(ids.begin(), ids.end(), std::mt19937(order));
  return ids;
}

inline dim3 unflatten(unsigned id, dim3 shape) {
  return {id % shape.x, id / shape.x % shape.y, id / shape.x / shape.y};
}

// Lets go on the lanes of a warp that have all come to one barrier. All its live lanes wait.
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
    any = true;
  }
  return any;
}

// The same for the block's barrier. False where no thread is left.
inline bool release_block(std::vector<Fiber>& fibers) {
  int line = 0;
  for (Fiber& f : fibers) {
    if (f.done) continue;
    if (line && line != f.line) die("threads wait at different barriers", line, f.line);
    line = f.line;
    if (f.waits != Wait::block) die("lanes of a warp wait for others for ever, line", f.line, 0);
  }
  for (Fiber& f : fibers) f.waits = Wait::none;
  return line != 0;
}

inline void start(Block& block, unsigned id) {
  block.index = unflatten(id, gridDim);
  block.live = true;
  block.shared.assign(shared_size, 0xFF);  // NaNs and wild indices
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  block.fibers.resize(threads);
  block.warps.resize((threads + 31) / 32);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i];
    f.index = unflatten(i, blockDim);
    f.id = i;
    f.done = false;
    f.waits = Wait::none;
    fibers::prepare(f.fiber, 1 << 16, fiber_main);
  }
}

inline void enter(Block& block) {
  if (inside == &block) return;
  if (inside) std::memcpy(inside->shared.data(), shared_begin, shared_size);
  std::memcpy(shared_begin, block.shared.data(), shared_size);
  inside = &block;
}

inline bool run_thread(Fiber& f) {
  if (f.done || f.waits != Wait::none) return false;
  current = &f;
  threadIdx = f.index;
  fibers::enter(f.fiber);
  return true;
}

// Warps of the block to the block's next barrier, or their ends; shuffled, perhaps not all of them.
// False where the block has ended.
inline bool advance(Block& block) {
  blockIdx = block.index;
  bool any = false;
  for (unsigned warp : sequence(unsigned(block.warps.size()))) {
    const unsigned threads = unsigned(block.fibers.size()), first = 32 * warp;
    const std::vector<unsigned> lanes = sequence(min(32u, threads - first));
    bool again;
    do {
      bool ran = false;
      for (unsigned lane : lanes) ran = run_thread(block.fibers[first + lane]) || ran;
      any = any || ran;
      again = ran || release_warp(block.fibers, first);
    } while (again);
    if (order > 1 && generator() % 8 == 0) return true;
  }
  return any || release_block(block.fibers);
}

inline void run_grid(dim3 grid, dim3 block, size_t dynamic_bytes) {
  if (grid.y > 65535 || grid.z > 65535) die("grid too large in y or z", int(grid.y), int(grid.z));
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) die("threads in a block", int(threads), 1024);
  gridDim = grid;
  blockDim = block;
  generator.seed(order);
  anchor = 0;
  dl_iterate_phdr(find_own_segment, reinterpret_cast<void*>(&find_own_segment));
  const std::vector<unsigned> queue = sequence(grid.x * grid.y * grid.z);
  static std::vector<Block> resident(3);
  size_t started = 0, ended = 0;
  for (size_t i = 0; i < resident.size(); ++i) {
    resident[i].live = i < (order > 1 ? resident.size() : 1) && started < queue.size();
    if (resident[i].live) start(resident[i], queue[started++]);
  }
  while (ended < queue.size())
    for (Block& b : resident) {
      if (!b.live) continue;
      if (order > 1 && generator() % 4) continue;  // one may stay behind for many turns
      enter(b);
      if (advance(b)) continue;
      for (size_t i = dynamic_bytes; i < dynamic_capacity; ++i)
        if (dynamic_shared[i] != 0xFF) die("write behind the dynamic shared memory", int(i), 0);
      inside = nullptr;
      b.live = false;
      ++ended;
      if (started < queue.size()) start(b, queue[started++]);
    }
  blocks_run += long(ended);
}

// Every lane of `mask` gives `mine`; reduce(lanes) is called with what all have given.
template <typename T, typename Reduce>
auto exchange(unsigned mask, T mine, int line, Reduce&& reduce) {
  Warp& warp = inside->warps[current->id / 32];
  uint64_t& slot = warp.lanes[current->id % 32];
  slot = 0;
  std::memcpy(&slot, &mine, sizeof mine);
  wait(Wait::warp, mask, line);
  T lanes[32];
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&lanes[lane], &warp.lanes[lane], sizeof mine);
  wait(Wait::warp, mask, line);  // nobody gives the next value before all have read this one
  return reduce(lanes);
}

template <typename T, typename Change>
T atomic(T* at, Change&& change) {
  perhaps_change_over();
  const T before = *at;
  *at = change(before);
  return before;
}

}  // namespace simt

// ---- Warps and atomics ---------------------------------------------------------------------------

inline void __threadfence() {}
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
T atomicAdd(T* at, T v) { return simt::atomic(at, [=](T old) { return T(old + v); }); }
template <typename T>
T atomicMax(T* at, T v) { return simt::atomic(at, [=](T old) { return max(old, v); }); }
template <typename T>
T atomicMin(T* at, T v) { return simt::atomic(at, [=](T old) { return min(old, v); }); }
template <typename T>
T atomicOr(T* at, T v) { return simt::atomic(at, [=](T old) { return T(old | v); }); }
template <typename T>
T atomicExch(T* at, T v) { return simt::atomic(at, [=](T) { return v; }); }
template <typename T>
T atomicCAS(T* at, T expected, T v) {
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
struct cudaFuncAttributes { int ptxVersion; };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;  // launches are one behind the other here
  unsigned numAttrs;
};

namespace simt {
inline int loads_left = -1;  // then there is no memory for a kernel's code; below 0: always
inline std::set<const void*> loaded;

// A kernel's code comes at its first use, which is where it can fail.
inline cudaError_t load(const void* kernel) {
  if (loaded.count(kernel)) return cudaSuccess;
  if (loads_left == 0) return cudaErrorMemoryAllocation;
  if (loads_left > 0) --loads_left;
  loaded.insert(kernel);
  return cudaSuccess;
}
}  // namespace simt

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline int multiprocessors = 1;  // few, so that a block goes through several tiles or spans
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = multiprocessors;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

// Either of these loads the kernel's code.
template <typename... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Params...)) {
  *attributes = {90};
  return simt::load(reinterpret_cast<const void*>(kernel));
}
template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  if (const cudaError_t error = simt::load(reinterpret_cast<const void*>(kernel))) return error;
  if (bytes > simt::kDynamicMost) return cudaErrorInvalidValue;
  simt::dynamic_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  if (const cudaError_t error = simt::load(reinterpret_cast<const void*>(kernel))) return error;
  const auto allowed = simt::dynamic_allowed.find(reinterpret_cast<const void*>(kernel));
  const size_t most = size_t(allowed == simt::dynamic_allowed.end() ? simt::kDynamicDefault
                                                                    : allowed->second);
  if (config->dynamicSmemBytes > min(most, simt::dynamic_capacity)) return cudaErrorInvalidValue;
  simt::body = [=] { kernel(args...); };
  simt::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes);
  return cudaSuccess;
}
