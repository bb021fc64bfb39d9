// Instructions that the merge needs beyond C++: a tensor-core product, and asynchronous copies into
// shared memory. On the host, tests/simt/mma_emulation.h emulates them by exchanges between the lanes
// of a warp, fragment layout included.
#pragma once

#include "numerics.cuh"

#ifndef __CUDACC__
#include "mma_emulation.h"
#else

namespace relora {

// The same pointer, known to the compiler to point to global memory: a pointer out of a table would
// otherwise be accessed by generic loads and stores instead of LDG and STG.
template <typename T>
__device__ __forceinline__ T* global_memory(void* p) {
  __builtin_assume(__isGlobal(p));
  return static_cast<T*>(p);
}

// The lane number, read anew at each call: addresses computed from threadIdx would stay in registers
// across loops that have none to spare.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  __builtin_assume(lane >= 0 && lane < 32);
  return lane;
}

// Writes kBytes (4 or 16) to shared memory: the first `bytes` of them from global memory, then zeros.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                 "n"(kBytes), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until all but this thread's last kPending groups of copies have arrived.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch_L2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// fp32 to nearest tf32 (10 bits of mantissa), as fp32 bits; ties away from zero. The lower 13 bits are
// not cleared, because a product ignores them. Not for NaN: cvt.rna handles it, and makes the loop
// around it twice as long.
__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) { return bits + 0x1000u; }

// D (16 x 8) += L (16 x 8) R (8 x 8) by a warp, of tf32, D in fp32. Lane 4 g + t holds L's (row g,
// k = t), (g + 8, t), (g, t + 4), (g + 8, t + 4), R's (t, col g), (t + 4, g), and D's (g, 2 t),
// (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&l)[4], const uint32_t (&r)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(l[0]), "r"(l[1]), "r"(l[2]), "r"(l[3]), "r"(r[0]), "r"(r[1]));
}

}  // namespace relora
#endif
