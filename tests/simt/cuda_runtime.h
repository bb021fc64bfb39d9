// A thin SIMT shim: stands in for CUDA's cuda_runtime.h, so that the host compiler turns the very
// same .cu file into a CPU program. Put this folder first on the include path.
//
// A block's threads are fibers of one OS thread. A fiber runs until it meets a barrier, then the
// next one runs: threads are as far apart as the barriers allow, so a missing __syncthreads() reads
// shared memory that nobody has written yet, or that a faster thread has already overwritten.
// Blocks and threads run in the order simt::order asks for (0 ascending, 1 descending, else
// shuffled by that seed). Shared memory is filled with NaN before every block. Compile with
// -fsanitize=undefined: it finds misaligned vector accesses and indices outside shared arrays.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // that segment can be found and filled
#define __syncthreads() simt::barrier(__LINE__)

using std::min;

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __fmul_rn(float a, float b) { return a * b; }  // compile with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

namespace simt {

inline unsigned order = 0;
inline long blocks_run = 0;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index;
  int barrier_line;  // where it waits; 0: running or not started
  bool done;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline std::function<void()> body;

[[noreturn]] inline void die(const char* what, int a, int b) {
  std::fprintf(stderr, "simt: %s (%d, %d), block (%u, %u, %u)\n", what, a, b, blockIdx.x,
               blockIdx.y, blockIdx.z);
  std::abort();
}

inline void barrier(int line) {
  current->barrier_line = line;
  swapcontext(&current->context, &scheduler);
}

inline void fiber_main() {
  body();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// This library's thread-local segment is its shared memory: 0xFF bytes are NaNs and wild indices.
inline int poison_own_segment(dl_phdr_info* info, size_t, void* here) {
  bool own = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& p = info->dlpi_phdr[i];
    const uintptr_t start = info->dlpi_addr + p.p_vaddr, at = reinterpret_cast<uintptr_t>(here);
    own = own || (p.p_type == PT_LOAD && at >= start && at < start + p.p_memsz);
  }
  for (int i = 0; own && i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data)
      std::memset(info->dlpi_tls_data, 0xFF, info->dlpi_phdr[i].p_memsz);
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

inline void run_block(std::vector<Fiber>& fibers) {
  dl_iterate_phdr(poison_own_segment, reinterpret_cast<void*>(&poison_own_segment));
  const std::vector<unsigned> ids = sequence(unsigned(fibers.size()));
  for (unsigned id : ids) {
    Fiber& f = fibers[id];
    f.index = unflatten(id, blockDim);
    f.done = false;
    f.barrier_line = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  for (bool any = true; any;) {  // one round: every live thread to its next barrier, or its end
    any = false;
    int line = 0;
    for (unsigned id : ids) {
      Fiber& f = fibers[id];
      if (f.done) continue;
      current = &f;
      threadIdx = f.index;
      f.barrier_line = 0;
      swapcontext(&scheduler, &f.context);
      if (f.done) continue;
      any = true;
      if (line && line != f.barrier_line) die("threads wait at different barriers", line,
                                              f.barrier_line);
      line = f.barrier_line;
    }
  }
  ++blocks_run;
}

inline void run_grid(dim3 grid, dim3 block) {
  if (grid.y > 65535 || grid.z > 65535) die("grid too large in y or z", int(grid.y), int(grid.z));
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) die("threads in a block", int(threads), 1024);
  gridDim = grid;
  blockDim = block;
  static std::vector<Fiber> fibers;
  fibers.resize(threads);
  for (Fiber& f : fibers) f.stack.resize(1 << 16);
  for (unsigned id : sequence(grid.x * grid.y * grid.z)) {
    blockIdx = unflatten(id, grid);
    run_block(fibers);
  }
}

}  // namespace simt

// ---- The runtime API the launchers use ----------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  if (config->dynamicSmemBytes) simt::die("no dynamic shared memory in this shim yet", 0, 0);
  simt::body = [=] { kernel(args...); };
  simt::run_grid(config->gridDim, config->blockDim);
  return cudaSuccess;
}
