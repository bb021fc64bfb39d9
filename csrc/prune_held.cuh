// prune.cu's kernel for 32-bit tensors that the shared memory of a cluster of blocks holds, wholly or at least
// by half; from sm_90 on. A tensor is read once and written once, its partner read at most once. The three
// digits of the threshold are found on the way:
//
//   first    13 bits, counted as the elements arrive from memory
//   second   10 bits, of the elements whose first 13 are the quantile's; from shared memory
//   third     8 bits likewise, and the least key above them
//
// What is not held, up to as much again, is read three times more, from L2: 25 MB at most for all clusters.
// While one block of a multiprocessor waits for its cluster, another one uses memory.
#pragma once

#include "prune.cuh"

#ifndef RELORA_HELD_SWEEPS  // the tests lower it
#define RELORA_HELD_SWEEPS 3
#endif

namespace relora {
namespace {

constexpr uint32_t kHeldStrips = RELORA_HELD_SWEEPS * kUnroll * kThreads;  // of 16 bytes, per block
constexpr uint32_t kHeldShare = kHeldStrips * kPack<uint32_t>;            // elements that a block holds
constexpr uint32_t kMostShare = 2 * kHeldShare;                           // elements that it takes at most
constexpr int kLeastCluster = 8, kMostCluster = 16;
constexpr int kHeldHist = Format<uint32_t>::bins / 2;  // words: two counters each
constexpr int kHeldShared = 16 * int(kHeldStrips) + 4 * kHeldHist;
// From this ratio on a partner is not prefetched, because much of it need not be read: if elements are dropped at
// random, a share of ratio^16 of its 64-byte pieces keeps none: 0.44 at 0.95, 0.85 at 0.99.
constexpr float kSparse = 0.95f;
static_assert(kMostShare <= 65535, "16-bit counters");
static_assert(kHeldHist <= kLeastCluster * kThreads, "a word a thread");

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
__global__ void held_kernel(const __grid_constant__ Table) {}  // never launched
#else

// ---- Other blocks' shared memory ----------------------------------------------------------------

// The counterpart of `own` in the shared memory of the cluster's block `rank`.
template <typename T>
__device__ __forceinline__ T& in_block(T* own, uint32_t rank) {
  return *static_cast<T*>(__cluster_map_shared_rank(own, rank));
}
__device__ __forceinline__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// ---- A block's slice of the tensor --------------------------------------------------------------

struct Slice {
  uint32_t* data;
  uint32_t* partner;  // null: none
  uint32_t strips;    // whole ones
  uint32_t rest;      // elements after them
  uint4* held;        // the first kHeldStrips; a thread accesses only its own

  __device__ __forceinline__ Slice(const Row& row, uint32_t rank, uint32_t blocks, uint4* held) : held(held) {
    constexpr uint32_t kLine = 32;  // elements
    const uint32_t size = uint32_t(row.size), share = (size + blocks * kLine - 1) / (blocks * kLine) * kLine;
    const uint32_t begin = min(rank * share, size), count = min(share, size - begin);
    data = static_cast<uint32_t*>(row.data) + begin;
    partner = row.partner ? static_cast<uint32_t*>(row.partner) + begin : nullptr;
    strips = count / kPack<uint32_t>;
    rest = count % kPack<uint32_t>;
  }

  __device__ __forceinline__ Strip<uint32_t> held_strip(uint32_t i) const {
    Strip<uint32_t> strip;
    strip.set(held[i]);
    return strip;
  }

  // Calls visit(key) for every element. The first time it also stores what can be held.
  template <bool kFirst, typename Visit>
  __device__ __forceinline__ void each(Visit&& visit) const {
    constexpr uint32_t kAhead = kUnroll * kThreads;
    uint32_t at = threadIdx.x;
    if (!kFirst) {
#pragma unroll 4
      for (; at < min(strips, kHeldStrips); at += kThreads) visit_strip(held_strip(at), visit);
    }
    const uint32_t* from = data + kPack<uint32_t> * at;
    const auto load = [&](Strip<uint32_t>& strip, int u, uint32_t i) {
      if (i >= strips) return;
      if (i < kHeldStrips) strip.load_once(from + u * kThreads * kPack<uint32_t>);
      else strip.load(from + u * kThreads * kPack<uint32_t>);
    };
    Strip<uint32_t> coming[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load(coming[u], u, at + u * kThreads);
#pragma unroll 1
    for (; at < strips; at += kAhead) {
      from += kAhead * kPack<uint32_t>;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = at + u * kThreads;
        if (i >= strips) continue;
        if (kFirst && i < kHeldStrips) held[i] = coming[u].get();
        visit_strip(coming[u], visit);
        load(coming[u], u, i + kAhead);
      }
    }
    if (threadIdx.x < rest) visit(magnitude_key(data[kPack<uint32_t> * strips + threadIdx.x]));
  }

  template <typename Visit>
  __device__ __forceinline__ static void visit_strip(const Strip<uint32_t>& strip, Visit&& visit) {
#pragma unroll
    for (int i = 0; i < kPack<uint32_t>; ++i) visit(strip.key(i));
  }

  // Prefetches the partner into L2 while the block has nothing else to load. Not if the tensor is held in part only:
  // then L2 has to keep the rest of it.
  __device__ __forceinline__ void fetch_partner() const {
#ifdef __CUDA_ARCH__
    if (threadIdx.x == 0 && 0 < strips && strips <= kHeldStrips)
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(partner), "r"(16 * strips) : "memory");
#endif
  }

  // Clears strips from the thread's `at` up to `end`, all of which are held, or none. If they are held, it is known
  // which strips the partner loses whole: those are not read.
  template <bool kPaired, bool kHeld>
  __device__ __forceinline__ void clear_strips(uint32_t at, uint32_t end, uint32_t threshold) const {
    constexpr int kN = kPack<uint32_t>, kStrips = kPaired && !kHeld ? kUnroll / 2 : kUnroll;
#pragma unroll 1
    for (; at < end; at += kStrips * kThreads) {
      Strip<uint32_t> mine[kStrips], other[kStrips] = {};
#pragma unroll
      for (int u = 0; u < kStrips; ++u) {
        const uint32_t i = at + u * kThreads;
        if (i >= end) continue;
        if (kHeld) mine[u] = held_strip(i);
        else mine[u].load_once(data + kN * i);
        if (kPaired && (!kHeld || mine[u].greatest() > threshold)) other[u].load_once(partner + kN * i);
      }
#pragma unroll
      for (int u = 0; u < kStrips; ++u) {
        const uint32_t i = at + u * kThreads;
        if (i >= end) continue;
        const uint32_t mask = not_above(mine[u], threshold);
        mine[u].clear(mask);
        mine[u].store_once(data + kN * i);
        if (!kPaired) continue;
        other[u].clear(mask);
        other[u].store_once(partner + kN * i);
      }
    }
  }
  template <bool kPaired>
  __device__ __forceinline__ void clear_to(uint32_t threshold) const {
    constexpr int kN = kPack<uint32_t>;
    clear_strips<kPaired, true>(threadIdx.x, min(strips, kHeldStrips), threshold);
    clear_strips<kPaired, false>(kHeldStrips + threadIdx.x, strips, threshold);
    const uint32_t last = kN * strips + threadIdx.x;
    if (threadIdx.x >= rest || magnitude_key(data[last]) > threshold) return;
    data[last] = 0;
    if (kPaired) partner[last] = 0;
  }
};

// ---- Ranks in a cluster's histograms ------------------------------------------------------------

struct Digit {
  uint32_t bin, left;  // left: the rank within it
};

// The bin that holds rank `rank` in the sum of all blocks' histograms of `bins` bins. Called by all threads of all
// blocks. The histograms may be overwritten after it.
template <bool kPacked>
__device__ __forceinline__ Digit pick_in_cluster(const SharedHist<kPacked>& hist, uint32_t bins, uint32_t rank,
                                                 uint32_t own, uint32_t blocks) {
  __shared__ uint32_t sums[kMostCluster];
  __shared__ Digit digit;
  constexpr uint32_t kEach = kPacked ? 2 : 1;
  const uint32_t words = bins / kEach / blocks;  // whose sums this block computes
  const uint32_t word = own * words + threadIdx.x;
  cluster_sync();  // all blocks have counted
  uint32_t low = 0, high = 0;
  if (threadIdx.x < words)
#pragma unroll 8
    for (uint32_t other = 0; other < blocks; ++other) {
      const uint32_t both = in_block(hist.words + word, other);
      low += kPacked ? both & 0xFFFFu : both;
      high += kPacked ? both >> 16 : 0;
    }
  const uint32_t upto = uint32_t(sum_upto(low + high));
  if (threadIdx.x == kThreads - 1)
    for (uint32_t other = 0; other < blocks; ++other) in_block(&sums[own], other) = upto;
  cluster_sync();  // all blocks have the sums, and have read the histograms
  uint32_t before = 0;
  for (uint32_t other = 0; other < own; ++other) before += sums[other];
  const uint32_t left = rank - (before + upto - low - high);  // wraps to a huge number if rank is less
  if (rank >= before + upto - low - high && left < low + high) {
    const bool second = left >= low;
    for (uint32_t other = 0; other < blocks; ++other)
      in_block(&digit, other) = {word * kEach + second, second ? left - low : left};
  }
  cluster_sync();
  return digit;
}

// ---- The kernel ---------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, kBlocksAnSM) held_kernel(const __grid_constant__ Table table) {
  using F = Format<uint32_t>;
  constexpr int kSecond = 1 << F::second, kThird = 1 << F::third;
  __shared__ uint32_t extremes[2], whole_extremes[2];  // greatest key, ~(least key above the prefix)
  __shared__ uint32_t threshold;
  const uint32_t own = __clusterRelativeBlockRank(), blocks = __clusterSizeInBlocks();
  const Row& row = table.rows[blockIdx.x / blocks];
  const Slice slice(row, own, blocks, dynamic_shared);
  uint32_t* const words = counters(dynamic_shared + kHeldStrips);

  SharedHist<true> first{words};
  first.zero(F::bins);
  if (threadIdx.x < 2) extremes[threadIdx.x] = whole_extremes[threadIdx.x] = 0;
  __syncthreads();
  uint32_t greatest = 0;
  {
    Runs<SharedHist<true>> runs(first);
    slice.each<true>([&](uint32_t key) {
      greatest = max(greatest, key);
      runs.add(key >> (F::second + F::third));
    });
    runs.flush();
  }
  if (slice.partner && float(table.quantile.ratio) < kSparse) slice.fetch_partner();
  block_max(&extremes[0], greatest);
  const uint32_t rank = uint32_t(quantile_rank(row.size, table.quantile).low);
  Digit digit = pick_in_cluster(first, F::bins, rank, own, blocks);

  uint32_t prefix = digit.bin << (F::second + F::third);  // the threshold's bits so far
  SharedHist<false> second{words};
  second.zero(kSecond);
  __syncthreads();
  {
    Runs<SharedHist<false>> runs(second);
    slice.each<false>([&](uint32_t key) {
      if ((key & kAll << (F::second + F::third)) == prefix) runs.add(key >> F::third & (kSecond - 1));
    });
    runs.flush();
  }
  digit = pick_in_cluster(second, kSecond, digit.left, own, blocks);
  prefix |= digit.bin << F::third;

  SharedHist<false> third{words}, whole{words + kThird};
  third.zero(2 * kThird);
  __syncthreads();
  const uint32_t end = prefix + kThird;
  uint32_t beyond = kAll;  // least key from `end` on, minus `end`; keys below `end` wrap to 2^31 or more
  {
    Runs<SharedHist<false>> runs(third);
    slice.each<false>([&](uint32_t key) {
      if ((key & kAll << F::third) == prefix) runs.add(key & (kThird - 1));
      beyond = min(beyond, key - end);
    });
    runs.flush();
  }
  block_max(&extremes[1], beyond >> 31 ? 0 : ~(end + beyond));
  cluster_sync();  // all blocks have counted
  // There are few bins, so every block sums all of them. A thread has one bin, of several blocks at a time.
  constexpr int kEach = kThird * kMostCluster / kThreads;
  static_assert(kThreads % kThird == 0, "one bin a thread");
  uint32_t counts[kEach], count = 0;
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    const uint32_t other = (threadIdx.x + u * kThreads) / kThird;
    counts[u] = other < blocks ? in_block(third.words + threadIdx.x % kThird, other) : 0;
  }
  const uint32_t extreme =
      threadIdx.x < 2 * blocks ? in_block(&extremes[threadIdx.x % 2], threadIdx.x / 2) : 0;
#pragma unroll
  for (int u = 0; u < kEach; ++u) count += counts[u];
  if (count) whole.add(threadIdx.x % kThird, count);
  if (extreme) atomicMax(&whole_extremes[threadIdx.x % 2], extreme);
  __syncthreads();
  __cluster_barrier_arrive();  // this block has read the others' shared memory
  const Picked picked = pick(whole, kThird, digit.left);
  if (threadIdx.x == 0)
    threshold = holds_nan(DType(row.dtype), whole_extremes[0])
                    ? kDropAll
                    : find_threshold(row, table.quantile, picked, prefix, ~whole_extremes[1]);
  __syncthreads();
  if (slice.partner) slice.clear_to<true>(threshold);
  else slice.clear_to<false>(threshold);
  __cluster_barrier_wait();  // a block must not end while others read its shared memory
}
#endif

}  // namespace
}  // namespace relora
