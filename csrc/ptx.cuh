// PTX instructions without a name in C++ that the two-segment kernels and sm_90's merge need. Semantics: PTX
// ISA 8.x, chapters "mbarrier", "cp.async.bulk.tensor", "wgmma"; "cp.async", "ldmatrix", "mma" for sm_80.
// Addresses of shared memory are 32-bit. (An include guard instead of #pragma once, because the tests
// replace these functions by a model.)
#ifndef RELORA_PTX_CUH
#define RELORA_PTX_CUH

#include <cuda.h>  // CUtensorMap

#include <type_traits>

#include "numerics.cuh"

namespace relora::ptx {

// The block's shared memory, aligned as the 128-byte swizzle requires.
__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return uint32_t(__cvta_generic_to_shared(memory));
}

// A pointer to what is at an address of shared memory.
template <typename T>
__device__ __forceinline__ T* shared_pointer(uint32_t address) {
  void* const p = __cvta_shared_to_generic(address);
  __builtin_assume(__isShared(p));
  return static_cast<T*>(p);
}

// ---- Blocks and clusters -----------------------------------------------------------------------

// Hands registers back to the pool, or takes them from it; called by a whole warpgroup.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A barrier of `threads` threads of the block; 0 is __syncthreads().
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of the cluster: needed before the first and after the last access to another
// block's memory.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- mbarrier: a phase ends when all arrivals and all announced bytes have come ----------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the other blocks of the cluster and to TMA.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

// Arrives, and announces bytes that TMA will report on this barrier.
__device__ __forceinline__ void arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the same barrier of the cluster's block `rank`.
__device__ __forceinline__ void arrive_remote(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ bool try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// Waits until the phase of this parity is over. Each try may sleep for a while. A wait of some ten
// seconds is a bug in the kernel, which then traps instead of hanging the GPU.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  if (try_wait(barrier, parity)) return;
  const long long start = clock64();
  while (!try_wait(barrier, parity))
    if (clock64() - start > 1ll << 34) __trap();
}

// ---- TMA: one thread moves a whole box; coordinates in elements, contiguous dimension first ----

// Global to shared memory. The barrier counts the bytes of the whole box, zeros beyond the edge
// included.
__device__ __forceinline__ void load(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c0,
                                     int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

// The same, to the same address and with the same barrier in every block of `blocks` (one bit each).
__device__ __forceinline__ void load_multicast(const CUtensorMap* map, uint32_t to,
                                               uint32_t barrier, int c0, int c1, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}

// Shared to global memory, clipped at the edge.
__device__ __forceinline__ void store(const CUtensorMap* map, uint32_t from, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(from), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the latest kPending of this thread's stores have read their shared memory.
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Makes this thread's writes to shared memory visible to TMA.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma: a warpgroup multiplies 64 x 16 by 16 x N, asynchronously ----------------------------

// Orders earlier accesses to accumulator and operand registers before the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all but the latest kPending groups are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading accumulators before a wgmma_wait, of whose effect on them it knows
// nothing.
template <int kCount>
__device__ __forceinline__ void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define RELORA_REGS_32                                                                        \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"     \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define RELORA_REGS_64                                                                        \
  RELORA_REGS_32                                                                              \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,"  \
  "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define RELORA_REGS_128                                                                       \
  RELORA_REGS_64                                                                              \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"  \
  "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,"     \
  "%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123," \
  "%124,%125,%126,%127"
#define RELORA_D8(i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define RELORA_D32(i) RELORA_D8(i), RELORA_D8(i + 8), RELORA_D8(i + 16), RELORA_D8(i + 24)
#define RELORA_D64(i) RELORA_D32(i), RELORA_D32(i + 32)
// REGS: %0..; the operands after them: A, B: descriptors; P: whether to accumulate; S, T:
// transpositions.
#define RELORA_WGMMA(N, TYPE, REGS, A, B, P, S, T, ...)                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                  \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGS "}, " A \
               ", " B ", p, 1, 1, " S ", " T ";\n}"                                                \
               : __VA_ARGS__                                                                   \
               : "l"(left), "l"(right), "r"(int(accumulate)), "n"(int(!kLeftK)), "n"(int(!kRightK)))

// d (64, N) = left (64, 16) @ right (16, N) + (accumulate ? d : 0), either K-contiguous or not.
// Thread t of the warpgroup holds in d[i] row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i
// / 4) + 2 (t % 4) + i % 2.
template <typename T, bool kLeftK, bool kRightK, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t left, uint64_t right,
                                      bool accumulate) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kCount == 128 && kBf16)
    RELORA_WGMMA("256", "bf16", RELORA_REGS_128, "%128", "%129", "%130", "%131", "%132",
                 RELORA_D64(0), RELORA_D64(64));
  else if constexpr (kCount == 128)
    RELORA_WGMMA("256", "f16", RELORA_REGS_128, "%128", "%129", "%130", "%131", "%132",
                 RELORA_D64(0), RELORA_D64(64));
  else if constexpr (kCount == 64 && kBf16)
    RELORA_WGMMA("128", "bf16", RELORA_REGS_64, "%64", "%65", "%66", "%67", "%68", RELORA_D64(0));
  else if constexpr (kCount == 64)
    RELORA_WGMMA("128", "f16", RELORA_REGS_64, "%64", "%65", "%66", "%67", "%68", RELORA_D64(0));
  else if constexpr (kBf16)
    RELORA_WGMMA("64", "bf16", RELORA_REGS_32, "%32", "%33", "%34", "%35", "%36", RELORA_D32(0));
  else
    RELORA_WGMMA("64", "f16", RELORA_REGS_32, "%32", "%33", "%34", "%35", "%36", RELORA_D32(0));
}

#define RELORA_WGMMA_64(TYPE)                                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" RELORA_REGS_32      \
               "}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"                                       \
               : RELORA_D32(0)                                                                    \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right),              \
                 "r"(int(accumulate)), "n"(int(!kRightK)))

// The same for N = 64 with `left` in registers, which must not change until the product is done.
// left[2 c + v] holds columns 8 c + 2 (t % 4) and the next of row v of the thread's two, as in d.
template <typename T, bool kRightK>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&left)[4], uint64_t right,
                                      bool accumulate) {
  if constexpr (std::is_same_v<T, bf16>) RELORA_WGMMA_64("bf16");
  else RELORA_WGMMA_64("f16");
}

// ---- sm_80: a warp copies, loads fragments and multiplies --------------------------------------

// Writes 16 bytes to shared memory, asynchronously: `bytes` of them from `from`, then zeros. kWithNext:
// also prefetches the 256 bytes around them into L2, because they are needed soon.
template <bool kWithNext = false>
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, int bytes) {
  if constexpr (kWithNext)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the latest kPending groups of this thread's copies have arrived.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A warp loads four 8 x 8 matrices of 16-bit elements, addressed and held as in store_matrices.
// kTranspose: lane l holds rows 2 (l % 4) and the next of column l / 4.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t row) {
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

// d (16, 8) += left (16, 16) @ right (16, 8). d is held as wgmma's, left in 8 x 8 parts (0, 0), (1, 0),
// (0, 1), (1, 1) of (rows, k), right in parts 0 and 1 of k, each as load_matrices holds them with k
// along a row.
template <typename T>
__device__ __forceinline__ void mma(float* d, const uint32_t (&left)[4], uint32_t right0,
                                    uint32_t right1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// ---- Out of the accumulators -------------------------------------------------------------------

// Two values rounded to nearest even, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
  return both;
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
  return both;
}

// A warp stores four 8 x 8 matrices of 16-bit elements: lanes 8 i to 8 i + 7 give the addresses of
// matrix i's rows, lane l holds columns 2 (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2,
                                               uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint16_t bits) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
}
__device__ __forceinline__ void store_shared_32(uint32_t address, uint32_t bits) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
}
__device__ __forceinline__ void store_shared_64(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared_128(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint32_t load_shared_32(uint32_t address) {
  uint32_t bits;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory");
  return bits;
}
__device__ __forceinline__ uint4 load_shared_128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint16_t load_shared_16(uint32_t address) {
  uint16_t bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
  return bits;
}

// p + by, hidden from the compiler, which would otherwise compute it from p's first value.
template <typename T>
__device__ __forceinline__ const T* further(const T* p, int64_t by) {
  p += by;
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}

// The 32 bits of two words from bit `bits` on, bits < 32.
__device__ __forceinline__ uint32_t funnel(uint32_t low, uint32_t high, int bits) {
  uint32_t word;
  asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(low), "r"(high), "r"(bits));
  return word;
}

// p + rows * pitch bytes, in one instruction instead of the compiler's four.
__device__ __forceinline__ char* rows_further(char* p, int rows, int pitch) {
  asm("mad.wide.s32 %0, %1, %2, %0;" : "+l"(p) : "r"(rows), "r"(pitch));
  __builtin_assume(__isGlobal(p));
  return p;
}

// Which of the warp's lanes vote yes, one bit each.
__device__ __forceinline__ uint32_t ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ uint32_t shuffle(uint32_t value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}

}  // namespace relora::ptx

#endif  // RELORA_PTX_CUH
