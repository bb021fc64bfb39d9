// prune.cu's kernel for tensors that the shared memory of a cluster of blocks holds, or half of which it
// does: of 32 bits, from sm_90 on. A tensor is read once and written once, its partner at most once; the
// threshold is found on the way:
//
//   sample   2048 keys, the same for all blocks: a window of keys that the quantile is in
//   count    in 4094 bins of the window, as the elements arrive from memory
//   few      the keys in the quantile's bin, from shared memory; every block sorts all of them out
//
// Where the window fails, or more than a few keys lie in its bin (ties), three digits of the threshold follow,
// of 13, 10 and 8 bits. What is not held, up to as much again, is read anew for each, from L2: all clusters' are
// 25 MB at most. While one block of a multiprocessor waits for its cluster, another is at its memory.
#pragma once

#include "prune.cuh"

#ifndef RELORA_HELD_SWEEPS  // the tests lower it
#define RELORA_HELD_SWEEPS 3
#endif

namespace relora {
namespace {

constexpr uint32_t kHeldStrips = RELORA_HELD_SWEEPS * kUnroll * kThreads;  // of 16 bytes, of a block
constexpr uint32_t kHeldShare = kHeldStrips * kPack<uint32_t>;            // elements that a block holds
constexpr uint32_t kMostShare = 2 * kHeldShare;                           // and that it takes
constexpr int kLeastCluster = 8, kMostCluster = 16;
constexpr int kHeldHist = Format<uint32_t>::bins / 2;  // words: two counters each
constexpr int kHeldShared = 16 * int(kHeldStrips) + 4 * kHeldHist;
// From this ratio on a partner is not fetched ahead, as much of it need not be read: where elements are dropped
// at random, ratio^16 of its pieces of 64 bytes keep none: 0.44 at 0.95, 0.85 at 0.99.
constexpr double kSparse = 0.95;
constexpr int kSampleKeys = 4;                        // of a thread
constexpr uint32_t kSample = kSampleKeys * kThreads;  // keys
constexpr uint32_t kWindowBins = 4096;                // the first one of what is below, the last of what is above
constexpr uint32_t kFew = 64;                         // keys of the quantile's bin that a block hands over
static_assert(kWindowBins == kHeldHist && kFew * kMostCluster <= kWindowBins, "in the histogram's memory");
static_assert(kMostCluster * 32 == kThreads, "a warp for each other block's keys");
static_assert(kMostShare <= 65535, "16-bit counters");
static_assert(kHeldHist <= kLeastCluster * kThreads, "a word a thread");

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
__global__ void held_kernel(const __grid_constant__ Table) {}  // never launched
#else

// ---- Other blocks' shared memory ----------------------------------------------------------------

// What lies at `own` in the block `rank` of the cluster.
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
  uint32_t rest;      // elements behind them
  uint4* held;        // the first kHeldStrips, a thread's own for itself alone

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

  // visit(key) for every element; the first time, what can be held is.
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

  // Into L2, while the block asks memory for nothing else.
  __device__ __forceinline__ void fetch([[maybe_unused]] const uint32_t* from) const {
#ifdef __CUDA_ARCH__
    if (threadIdx.x == 0 && 0 < strips)
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(16 * strips) : "memory");
#endif
  }
  // If L2 need not keep a part of the tensor.
  __device__ __forceinline__ void fetch_partner() const {
    if (strips <= kHeldStrips) fetch(partner);
  }

  // Strips from the thread's `at` up to `end`, all held or none. Where they are held, it is known which strips
  // the partner loses whole: those are not read.
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

// The bin that holds rank `rank` of all blocks' histograms of `bins` bins together. All threads of all
// blocks; the histograms may be written again behind it.
template <bool kPacked>
__device__ __forceinline__ Digit pick_in_cluster(const SharedHist<kPacked>& hist, uint32_t bins, uint32_t rank,
                                                 uint32_t own, uint32_t blocks) {
  __shared__ uint32_t sums[kMostCluster];
  __shared__ Digit digit;
  constexpr uint32_t kEach = kPacked ? 2 : 1;
  const uint32_t words = bins / kEach / blocks;  // of which this block finds the sums
  const uint32_t word = own * words + threadIdx.x;
  cluster_sync();  // all have counted
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
  cluster_sync();  // all have their sums, and have read
  uint32_t before = 0;
  for (uint32_t other = 0; other < own; ++other) before += sums[other];
  const uint32_t left = rank - (before + upto - low - high);  // huge where rank is less
  if (rank >= before + upto - low - high && left < low + high) {
    const bool second = left >= low;
    for (uint32_t other = 0; other < blocks; ++other)
      in_block(&digit, other) = {word * kEach + second, second ? left - low : left};
  }
  cluster_sync();
  return digit;
}

// ---- The window ---------------------------------------------------------------------------------

struct Window {
  uint32_t origin, width, shift;  // width 0: there is none

  __device__ __forceinline__ uint32_t begin(uint32_t bin) const { return origin + ((bin - 1) << shift); }
};

// By all threads of every block of the cluster, with the same result: five standard deviations of the sample's
// quantile, to both sides. Any window will do that holds it, and one that does not is found out.
__device__ __forceinline__ Window find_window(const Row& row, double ratio, uint32_t* words) {
  using F = Format<uint32_t>;
  constexpr int kShift = F::second + F::third, kEach = F::bins / 2 / kThreads;  // words of a thread
  __shared__ uint32_t ends[2];  // keys
  const uint32_t* const data = static_cast<const uint32_t*>(row.data);
  const uint32_t share = uint32_t(row.size) / kSample;
  uint32_t keys[kSampleKeys];
#pragma unroll
  for (int u = 0; u < kSampleKeys; ++u) {  // somewhere in its share: columns of a matrix are not always the same
    const uint32_t id = u * kThreads + threadIdx.x;
    keys[u] = magnitude_key(data[id * share + (id * 2654435761u >> 8) % share]);
  }
  SharedHist<true> hist{words};
  hist.zero(F::bins);
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kSampleKeys; ++u) hist.add(keys[u] >> kShift, 1);
  __syncthreads();
  uint32_t count[2 * kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint32_t both = words[threadIdx.x * kEach + i];
    count[2 * i] = both & 0xFFFFu, count[2 * i + 1] = both >> 16;
    sum += count[2 * i] + count[2 * i + 1];
  }
  const uint32_t before = uint32_t(sum_upto(sum)) - sum;
  const float last = float(kSample - 1), middle = float(ratio) * last;
  const float margin = 5 * sqrtf(float(ratio) * (1 - float(ratio)) * last) + 1;
  const uint32_t ranks[2] = {uint32_t(max(middle - margin, 0.f)), uint32_t(min(middle + margin, last))};
#pragma unroll
  for (int end = 0; end < 2; ++end) {
    uint32_t left = ranks[end] - before, bin = 0, here = 0;
    if (left >= sum) continue;  // another thread's: where rank < before it is huge
#pragma unroll
    for (int i = 0; i < 2 * kEach; ++i) {
      if (here) continue;
      if (left < count[i]) here = count[i], bin = i;
      else left -= count[i];
    }
    // As if the bin's keys lay evenly in it.
    const float part = float(left + end) / float(here);
    ends[end] = ((threadIdx.x * 2 * kEach + bin) << kShift) + uint32_t(part * float(1 << kShift));
  }
  __syncthreads();
  const uint32_t slack = (1u << kShift) / 50, from = ends[0], to = ends[1] + slack;
  Window window{max(from, slack) - slack, 0, 0};
  window.width = to - window.origin;
  window.shift = uint32_t(max(32 - __clz(int((window.width - 1) / (kWindowBins - 2))), 0));
  // Zeros, of which the bin's keys are not spread; and where a bin would hold a good part of the tensor.
  if (ranks[0] == 0 || to <= 1u << kShift || window.shift > kMostShift) window.width = 0;
  return window;
}

// The threshold, by the few keys that all blocks have at rank `left` of the window's bin and next to it; false where
// a block has more than a few. All threads of all blocks; the last remote read is over when it returns, and
// this block has arrived at the cluster's barrier.
struct Few {
  uint32_t keys[kFew], count, greatest, beyond;  // beyond: ~(least key above the bin)
};
__device__ __forceinline__ bool pick_few(const Few& few, uint32_t left, const Row& row, double ratio, uint32_t blocks,
                                         uint32_t* all, uint32_t* threshold) {
  __shared__ uint32_t gathered, too_many, greatest, beyond, found[2];
  if (threadIdx.x == 0) gathered = too_many = greatest = beyond = 0, found[1] = kAll;
  cluster_sync();  // all have handed theirs over
  const uint32_t other = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (other < blocks) {
    Few* const theirs = &in_block(const_cast<Few*>(&few), other);
    const uint32_t count = theirs->count;
    if (lane == 0) {
      if (count > kFew) atomicMax(&too_many, 1u);
      atomicMax(&greatest, theirs->greatest);
      atomicMax(&beyond, theirs->beyond);
    }
#pragma unroll
    for (uint32_t i = lane; i < kFew; i += 32)
      if (i < count) all[atomicAdd(&gathered, 1u)] = theirs->keys[i];
  }
  __syncthreads();
  __cluster_barrier_arrive();
  if (too_many) return false;
  for (uint32_t i = threadIdx.x; i < gathered; i += kThreads) {
    const uint32_t key = all[i];
    uint32_t place = 0;
    for (uint32_t j = 0; j < gathered; ++j) place += all[j] < key || (all[j] == key && j < i);
    if (place - left < 2) found[place - left] = key;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const float weight = quantile_rank(row.size, ratio).weight;
    *threshold = holds_nan(DType(row.dtype), greatest)
                     ? kDropAll
                     : threshold_key<float>(found[0], min(found[1], ~beyond), weight);
  }
  __syncthreads();
  return true;
}

// ---- The kernel ---------------------------------------------------------------------------------

// The threshold by digits. All threads of all blocks; this block has arrived at the cluster's barrier when it
// returns.
__device__ __forceinline__ void find_by_digits(const Slice& slice, const Row& row, double ratio, uint32_t rank, uint32_t own,
                                            uint32_t blocks, uint32_t* words, uint32_t* threshold) {
  using F = Format<uint32_t>;
  constexpr int kSecond = 1 << F::second, kThird = 1 << F::third;
  __shared__ uint32_t extremes[2], whole_extremes[2];  // greatest key, ~(least key above the prefix)
  SharedHist<true> first{words};
  __syncthreads();  // nobody counts in the window any more
  first.zero(F::bins);
  if (threadIdx.x < 2) extremes[threadIdx.x] = whole_extremes[threadIdx.x] = 0;
  __syncthreads();
  uint32_t greatest = 0;
  {
    Runs<SharedHist<true>> runs(first);
    slice.each<false>([&](uint32_t key) {
      greatest = max(greatest, key);
      runs.add(key >> (F::second + F::third));
    });
    runs.flush();
  }
  block_max(&extremes[0], greatest);
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
  uint32_t beyond = kAll;  // the least key from `end` on, less `end`; of keys before it 2^31 and more
  {
    Runs<SharedHist<false>> runs(third);
    slice.each<false>([&](uint32_t key) {
      if ((key & kAll << F::third) == prefix) runs.add(key & (kThird - 1));
      beyond = min(beyond, key - end);
    });
    runs.flush();
  }
  block_max(&extremes[1], beyond >> 31 ? 0 : ~(end + beyond));
  cluster_sync();  // all have counted
  // Every block for itself: few bins. A thread has one of them, of several blocks at a time.
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
  __cluster_barrier_arrive();  // this block has read
  const Picked picked = pick(whole, kThird, digit.left);
  if (threadIdx.x == 0)
    *threshold = holds_nan(DType(row.dtype), whole_extremes[0])
                    ? kDropAll
                    : find_threshold(row, ratio, picked, prefix, ~whole_extremes[1]);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, kBlocksAnSM) held_kernel(const __grid_constant__ Table table) {
  __shared__ Few few;
  __shared__ uint32_t threshold;
  const uint32_t own = __clusterRelativeBlockRank(), blocks = __clusterSizeInBlocks();
  const Row& row = table.rows[blockIdx.x / blocks];
  const Slice slice(row, own, blocks, dynamic_shared);
  uint32_t* const words = counters(dynamic_shared + kHeldStrips);
  const uint32_t rank = uint32_t(quantile_rank(row.size, table.ratio).low);

  slice.fetch(slice.data);
  const Window window = find_window(row, table.ratio, words);
  SharedHist<false> hist{words};
  hist.zero(kWindowBins);
  if (threadIdx.x == 0) few.count = few.greatest = few.beyond = 0;
  __syncthreads();
  uint32_t greatest = 0, below = 0, outside = 0;
  const uint32_t one = 1 + threadIdx.z;  // or nvcc gathers the lanes of a warp first: few are here at a time
  slice.each<true>([&](uint32_t key) {
    const uint32_t from = key - window.origin;
    greatest = max(greatest, key);
    below += from >> 31;  // both are of 31 bits
    if (from < window.width) hist.add(1 + (from >> window.shift), one);
    else ++outside;
  });
  if (slice.partner && table.ratio < kSparse) slice.fetch_partner();
  block_max(&few.greatest, greatest);
  below = __reduce_add_sync(kAll, below);
  outside = __reduce_add_sync(kAll, outside);
  if (threadIdx.x % 32 == 0) {
    hist.add(0, below);
    hist.add(kWindowBins - 1, outside - below);
  }
  bool found = false;
  if (window.width) {
    const Digit digit = pick_in_cluster(hist, kWindowBins, rank, own, blocks);
    if (digit.bin != 0 && digit.bin != kWindowBins - 1) {
      const uint32_t begin = window.begin(digit.bin), width = 1u << window.shift, end = begin + width;
      uint32_t beyond = kAll;  // the least key from `end` on, less `end`; of keys before it 2^31 and more
      slice.each<false>([&](uint32_t key) {
        if (key - begin < width) {
          const uint32_t place = atomicAdd(&few.count, one);
          if (place < kFew) few.keys[place] = key;
        }
        beyond = min(beyond, key - end);
      });
      block_max(&few.beyond, beyond >> 31 ? 0 : ~(end + beyond));
      found = pick_few(few, digit.left, row, table.ratio, blocks, words, &threshold);
      if (!found) __cluster_barrier_wait();
    }
  }
  if (!found) find_by_digits(slice, row, table.ratio, rank, own, blocks, words, &threshold);
  if (slice.partner) slice.clear_to<true>(threshold);
  else slice.clear_to<false>(threshold);
  __cluster_barrier_wait();  // a block's shared memory is its own while others read it
}
#endif

}  // namespace
}  // namespace relora
