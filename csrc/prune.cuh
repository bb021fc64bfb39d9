// Shared by prune.cu's kernels: the table of tensors, a block's part of one, reading and clearing it,
// histograms and lists, the bin that holds a rank, the threshold.
#pragma once

#include "launch.h"
#include "numerics.cuh"

#ifndef RELORA_WIDE_FROM  // the tests lower them
#define RELORA_WIDE_FROM (int64_t(1) << 32)
#endif
#ifndef RELORA_SAMPLED_FROM
#define RELORA_SAMPLED_FROM (int64_t(1) << 24)
#endif

namespace relora {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kUnroll = 4;      // 16-byte loads in flight per thread
constexpr int kSmall = 49152;   // up to this size one block does everything: 16-bit counters hold it
constexpr int kRoomShare = 64;  // one element in so many may be listed
constexpr int kLocal = 8192;    // listed elements that a block collects before it asks for room
constexpr int kBlocksAnSM = 2;  // limited by registers: 512 threads of 64
constexpr int kBlocksThatClear = 3;  // limited by the 1536 threads of sm_86 and sm_120; elsewhere 4, of 32 registers
// Tensors of a launch, 72 bytes each: no more than a kernel's parameters hold. Those may be 32,764 bytes from
// CUDA 12.1 and driver 530 on; CUDA 13 requires a newer driver than that. A chain takes fewer, kChainRows:
// its tensors need memory for lists and histograms, and each of its launches pays for the table.
#if CUDART_VERSION >= 13000
constexpr int kRows = 400, kChainRows = 128, kParameters = 32764;
#else
constexpr int kRows = 48, kChainRows = 48, kParameters = 4096;
#endif
constexpr int kMemoryShare = 52;  // a chain's workspace: one byte in so many of the memory pruned
constexpr uint32_t kAll = 0xFFFFFFFFu;       // all bits
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;  // of a warp
constexpr uint32_t kNone = 0xFFFFFFFFu;      // no index, no bin
// From this size on counters take 64 bits. 32-bit indices do not suffice, so such a tensor has no list.
constexpr int64_t kWideFrom = RELORA_WIDE_FROM;
// From this size on a window is tried. For smaller tensors the sample would be too large a part.
constexpr int64_t kSampledFrom = RELORA_SAMPLED_FROM;
constexpr int kSampleBlocks = 128, kSampleStrips = 2;  // kSampleStrips: of 16 bytes, per thread
// Bytes at a tensor's end that L2 keeps for the last pass: half of an H100's L2.
constexpr int64_t kKept = 24 << 20;
constexpr int kMostShift = 12;  // bits of the digit that recount finds, at most

constexpr int kSampleDigit = 13, kWindowDigit = 10;  // bits of the keys of a sample, and in a window

// Digits of a key, and the histogram of the first one. If 32768 bins would not fit in shared memory, two
// 16-bit counters share a word there; in global memory every bin has a word.
template <typename Bits>
struct Format;
template <>
struct Format<uint32_t> {
  static constexpr int first = 13, second = 10, third = 8;
  static constexpr int bins = 1 << first;
  static constexpr bool packed = false;
  static constexpr int shared_bytes = 4 * bins;
};
template <>
struct Format<uint16_t> {
  static constexpr int first = 15;
  static constexpr int bins = 1 << first;
  static constexpr bool packed = true;
  static constexpr int shared_bytes = 2 * bins;
};

enum class Source : uint32_t { list, whole, nothing };  // what recount and finish go over

// One tensor's state between the launches; initially zero. Minima are kept as maxima of ~key.
struct State {
  unsigned long long left;  // rank within the prefix
  uint32_t prefix;          // the digits picked so far
  uint32_t arrived;         // blocks, in the current launch
  uint32_t greatest;        // key
  uint32_t not_above_bin;   // ~(least key above the first digit's bin)
  uint32_t not_above;       // ~(least key above the prefix that recount saw)
  uint32_t listed;
  uint32_t threshold;
  uint32_t origin, shift;  // prefix and last digit are of key - origin; shift: the last digit's bits
  uint32_t width;          // keys in the window from `origin` on; 0: none
  uint32_t settled;        // 1: by the window; then the list holds keys, otherwise indices
  uint32_t overflowed;     // 1: a block had more keys in the window than it collects
  unsigned long long below;  // elements below the window
  Source source;   // of recount, whose blocks must not see it change
  Source finish;   // of finish; recount's last block may change it
};

struct alignas(16) Slot {
  State state;
  __device__ uint32_t* hist() { return reinterpret_cast<uint32_t*>(this + 1); }
};

struct Row {
  void* data;
  void* partner;
  int64_t size;
  uint64_t seed;
  int64_t first;
  Slot* slot;
  uint32_t* list;
  uint32_t room;
  uint32_t first_block;
  uint32_t index;                // in the caller's list
  uint8_t dtype, partner_bytes;  // DType; 0, 2 or 4 bytes an element
  bool sampled;
};

// The table is passed by value, as a kernel's parameter. A copy from host memory could not be captured in
// a CUDA graph; this way a replay finds the same rows in the graph itself.
template <int kMost>
struct TableOf {
  Row rows[kMost];
  uint32_t count, blocks;
  int64_t share;  // elements of a block
  Quantile quantile;
  uint64_t random_threshold;
  const int64_t* prefixes;  // magnitude_counts
  int64_t *counts, *lowest, *highest;
  int shift, bits;
};
using Table = TableOf<kRows>;
using Chain = TableOf<kChainRows>;
static_assert(sizeof(Table) <= kParameters, "a kernel's parameters");

extern __shared__ uint4 dynamic_shared[];

template <typename Bits>
constexpr int kPack = 16 / int(sizeof(Bits));

// Elements that a block loads at a time, kStrips strips per thread. Blocks take whole spans of 96 KB, so a
// tensor of 1 MB has eleven. How many spans a block takes is decided per launch: see spans_a_block.
template <typename Bits, int kStrips = kUnroll>
constexpr int kSweep = kStrips * kThreads * kPack<Bits>;
template <typename Bits>
constexpr int kSpan = 3 * kSweep<Bits>;
// 32-bit elements: what a block lists, 1.56 %, must fit kLocal. 16-bit elements: a block's 16-bit counters hold
// one span, but a window's counters are wider.
constexpr uint32_t kMostWindowSpans = 16;
template <typename Bits>
constexpr uint32_t kMostSpans = sizeof(Bits) == 4 ? kMostWindowSpans : 1;
static_assert(kSpan<uint16_t> * kMostSpans<uint16_t> <= 65535, "16-bit counters");

// ---- A kernel's place among the launches --------------------------------------------------------

// Allows the next launch to take its place on the device.
__device__ __forceinline__ void let_next_in() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// After this call all earlier kernels of the chain have ended and their writes are visible: each of them waits
// for the one before it. A chain's first kernel starts when everything before the chain has ended. So what no
// earlier kernel of the chain writes may be read before this call.
__device__ __forceinline__ void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Called first in most kernels of a chain. The last kernel calls wait_for_previous() only, because the launch
// after it is not ours.
__device__ __forceinline__ void follow() {
  let_next_in();
  wait_for_previous();
}

// ---- A block's part of a tensor -----------------------------------------------------------------

struct Part {
  const Row& row;          // in the parameters' constant bank: loaded at each use
  uint32_t block, blocks;  // of this tensor
  int64_t begin, end;      // elements
};

template <int kMost>
__device__ __forceinline__ Part find_part(const TableOf<kMost>& table, uint32_t at) {
  uint32_t low = 0, high = table.count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (table.rows[middle].first_block <= at ? low : high) = middle;
  }
  const Row& row = table.rows[low];
  const uint32_t next = low + 1 < table.count ? table.rows[low + 1].first_block : table.blocks;
  const uint32_t block = at - row.first_block;
  const int64_t begin = block * table.share;
  return {row, block, next - row.first_block, begin, min(row.size, begin + table.share)};
}
template <int kMost>
__device__ __forceinline__ Part find_part(const TableOf<kMost>& table) {
  return find_part(table, blockIdx.x);
}

using L2Policy = uint64_t;

__device__ __forceinline__ L2Policy leave_first() {
  L2Policy policy = 0;
#ifdef __CUDA_ARCH__
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}
__device__ __forceinline__ L2Policy stay() {
  L2Policy policy = 0;
#ifdef __CUDA_ARCH__
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// Compares two 16-bit keys of a word at once: the top bit of each half says whether its key is `least` or more.
// `both` holds `least`, 2^15 at most, twice.
__device__ __forceinline__ uint32_t at_least(uint32_t word, uint32_t both) { return (word | 0x80008000u) - both; }
__device__ __forceinline__ uint32_t twice(uint32_t key) { return key << 16 | key; }

// prmt: picks bytes of two words, which are numbered 0 to 7, by the selector's hexadecimal digits, lowest first.
// A digit from 8 on repeats the top bit of byte digit - 8 eight times.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t permute(uint32_t first, uint32_t second) {
  uint32_t bytes = 0;
#ifdef __CUDA_ARCH__
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(first), "r"(second), "n"(kSelector));
#else
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = kSelector >> 4 * i & 15, of = digit % 8;
    const uint32_t byte = (of < 4 ? first : second) >> of % 4 * 8 & 0xFF;
    bytes |= (digit < 8 ? byte : byte >> 7 ? 0xFF : 0) << 8 * i;
  }
#endif
  return bytes;
}
// Repeats the top bits of two words' four halves over a byte each, or those of one word's halves over the halves.
__device__ __forceinline__ uint32_t top_bits(uint32_t first, uint32_t second) { return permute<0xFDB9>(first, second); }
__device__ __forceinline__ uint32_t top_bits(uint32_t word) { return permute<0xBB99>(word, word); }

// Keeps `v` in a register of its own from here on: nvcc neither recomputes it at each use nor lets it share a
// register with what it was copied from.
template <typename T>
__device__ __forceinline__ void hold(T& v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) asm volatile("" : "+r"(v));
  else asm volatile("" : "+l"(v));
#else
  (void)v;
#endif
}
// The same for an address in shared memory.
__device__ __forceinline__ void hold_shared(uint32_t*& words) {
#ifdef __CUDA_ARCH__
  uint32_t at = uint32_t(__cvta_generic_to_shared(words));
  hold(at);
  words = static_cast<uint32_t*>(__cvta_shared_to_generic(at));
  __builtin_assume(__isShared(words));
#else
  (void)words;
#endif
}

// While one lives, loads are speculative: they may race with writers, and are discarded then. The tests' race
// detector (tests/simt/races.h) skips them, used or not.
#ifdef __CUDACC__
struct PerhapsUnused { __device__ __forceinline__ PerhapsUnused() {} };
#else
using PerhapsUnused = simt::InShim;
#endif

// 16 bytes of elements in registers. Every index is a constant after unrolling.
template <typename Bits>
struct Strip {
  static constexpr int kEach = 4 / int(sizeof(Bits));  // elements a word
  uint32_t w[4];

  __device__ __forceinline__ uint32_t key(int i) const {
    return magnitude_key(Bits(w[i / kEach] >> (i % kEach * 16)));
  }
  __device__ __forceinline__ uint32_t greatest() const {
    uint32_t found = key(0);
#pragma unroll
    for (int i = 1; i < kPack<Bits>; ++i) found = max(found, key(i));
    return found;
  }
  __device__ __forceinline__ void clear(uint32_t mask) {
#pragma unroll
    for (int i = 0; i < kPack<Bits>; ++i)
      if (mask >> i & 1) w[i / kEach] &= ~(uint32_t(Bits(~Bits(0))) << (i % kEach * 16));
  }
  // All ones where an element's key is above `threshold`, otherwise zeros.
  __device__ __forceinline__ uint4 above(uint32_t threshold) const {
    uint32_t kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      kept[i] = kEach == 1 ? (magnitude_key(w[i]) > threshold ? kAll : 0)
                           : top_bits(at_least(w[i], twice(min(threshold, 0x7FFFu) + 1)));
    return {kept[0], kept[1], kept[2], kept[3]};
  }
  __device__ __forceinline__ void keep(const uint4& kept) {
    w[0] &= kept.x, w[1] &= kept.y, w[2] &= kept.z, w[3] &= kept.w;
  }
  // A copy in other registers, so that the next load can write to this strip's own. Otherwise ptxas loads into
  // others and moves the values here at the end of the loop, where it waits for them.
  __device__ __forceinline__ Strip taken() const {
    Strip copy = *this;
    hold(copy.w[0]), hold(copy.w[1]), hold(copy.w[2]), hold(copy.w[3]);
    return copy;
  }
  __device__ __forceinline__ void set(const uint4& v) { w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w; }
  __device__ __forceinline__ uint4 get() const { return {w[0], w[1], w[2], w[3]}; }
  __device__ __forceinline__ void load(const Bits* from) { set(*reinterpret_cast<const uint4*>(from)); }
  __device__ __forceinline__ void store(Bits* to) const { *reinterpret_cast<uint4*>(to) = get(); }
  // Evicted from L2 first.
  __device__ __forceinline__ void load_once(const Bits* from) {
    set(__ldcs(reinterpret_cast<const uint4*>(from)));
  }
  // volatile: keeps its place among other loads, and is not moved to where its registers would be free.
  __device__ __forceinline__ void load(const Bits* from, L2Policy policy) {
#ifdef __CUDA_ARCH__
    asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(from), "l"(policy));
#else
    load(from);
    (void)policy;
#endif
  }
  __device__ __forceinline__ void store_once(Bits* to) const {
    __stcs(reinterpret_cast<uint4*>(to), get());
  }
  __device__ __forceinline__ void load_some(const Bits* from, int count) {
    w[0] = w[1] = w[2] = w[3] = 0;
#pragma unroll
    for (int i = 0; i < kPack<Bits>; ++i)
      if (i < count) w[i / kEach] |= uint32_t(from[i]) << (i % kEach * 16);
  }
};

__host__ __device__ __forceinline__ bool is_aligned16(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

// Calls visit(strip, index of its first element, elements in it). Each thread's next load is issued before a strip
// is visited.
template <typename Bits, typename Visit>
__device__ __forceinline__ void read(const Row& row, int64_t begin, int64_t end, Visit&& visit) {
  constexpr int kN = kPack<Bits>;
  static_assert(kSpan<Bits> % kSweep<Bits> == 0, "whole sweeps");
  const Bits* data = static_cast<const Bits*>(row.data);
  Strip<Bits> strips[kUnroll];
  if (is_aligned16(data) && begin + kSweep<Bits> <= end) {
    const int64_t mine = threadIdx.x * kN;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) strips[u].load(data + begin + mine + u * kThreads * kN);
    for (bool more = true; more; begin += kSweep<Bits>) {
      more = begin + 2 * kSweep<Bits> <= end;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = begin + mine + u * kThreads * kN;
        const Strip<Bits> strip = strips[u];
        if (more) strips[u].load(data + at + kSweep<Bits>);
        visit(strip, at, kN);
      }
    }
  }
#pragma unroll 1
  for (int64_t at = begin + threadIdx.x * kN; at < end; at += kThreads * kN) {
    const int count = int(min(end - at, int64_t(kN)));
    strips[0].load_some(data + at, count);
    visit(strips[0], at, count);
  }
}

// The whole sweeps of clear(), 16 bytes at a time; returns where it stopped.
template <typename Bits, int kStrips, bool kPaired, typename Dropped>
__device__ __forceinline__ int64_t clear_sweeps(const Row& row, int64_t begin, int64_t end,
                                                Dropped&& dropped) {
  constexpr int kN = kPack<Bits>;
  static_assert(kSpan<Bits> % kSweep<Bits, kStrips> == 0, "whole sweeps");
  Bits* data = static_cast<Bits*>(row.data);
  Bits* partner = static_cast<Bits*>(row.partner);
  Strip<Bits> mine[kStrips], other[kStrips];
  for (; begin + kSweep<Bits, kStrips> <= end; begin += kSweep<Bits, kStrips>) {
    const int64_t at = begin + threadIdx.x * kN;
#pragma unroll
    for (int u = 0; u < kStrips; ++u) {
      mine[u].load(data + at + u * kThreads * kN);
      if (kPaired) other[u].load(partner + at + u * kThreads * kN);
    }
#pragma unroll
    for (int u = 0; u < kStrips; ++u) {
      const int64_t first = at + u * kThreads * kN;
      const uint32_t mask = dropped(mine[u], first, kN);
      mine[u].clear(mask);
      mine[u].store(data + first);
      if (kPaired) {
        other[u].clear(mask);
        other[u].store(partner + first);
      }
    }
  }
  return begin;
}

__device__ __forceinline__ void clear_partner(const Row& row, int64_t at) {
  if (row.partner_bytes == 2) static_cast<uint16_t*>(row.partner)[at] = 0;
  if (row.partner_bytes == 4) static_cast<uint32_t*>(row.partner)[at] = 0;
}

// clear() for `count` elements from `at` on, at most a strip, one by one.
template <typename Bits, typename Dropped>
__device__ __forceinline__ void clear_some(const Row& row, int64_t at, int count, Dropped&& dropped) {
  Bits* data = static_cast<Bits*>(row.data);
  Strip<Bits> strip;
  strip.load_some(data + at, count);
  const uint32_t mask = dropped(strip, at, count);
  for (int i = 0; i < count; ++i)
    if (mask >> i & 1) {
      data[at + i] = 0;
      clear_partner(row, at + i);
    }
}

// Zeroes the elements in [begin, end) whose bits are set in what dropped(strip, first index, elements)
// returns, and the partner's with them. A thread has kStrips strips in flight, half as many with a
// partner: what registers hold beside `dropped`. Sweeps need both aligned and of one element size.
template <typename Bits, int kStrips, typename Dropped>
__device__ __forceinline__ void clear(const Row& row, int64_t begin, int64_t end,
                                      Dropped&& dropped) {
  Bits* data = static_cast<Bits*>(row.data);
  if (is_aligned16(data) && row.partner_bytes == 0)
    begin = clear_sweeps<Bits, kStrips, false>(row, begin, end, dropped);
  if (is_aligned16(data) && is_aligned16(row.partner) && row.partner_bytes == sizeof(Bits))
    begin = clear_sweeps<Bits, kStrips / 2, true>(row, begin, end, dropped);
#pragma unroll 1
  for (int64_t at = begin + threadIdx.x * kPack<Bits>; at < end; at += kThreads * kPack<Bits>)
    clear_some<Bits>(row, at, int(min(end - at, int64_t(kPack<Bits>))), dropped);
}

template <typename Bits>
__device__ __forceinline__ uint32_t not_above(const Strip<Bits>& strip, uint32_t threshold) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < kPack<Bits>; ++i) mask |= uint32_t(strip.key(i) <= threshold) << i;
  return mask;
}

template <typename Bits>
__device__ __forceinline__ void clear_to(const Row& row, int64_t begin, int64_t end,
                                         uint32_t threshold) {
  clear<Bits, kUnroll>(row, begin, end, [=](const auto& strip, int64_t, int) {
    return not_above(strip, threshold);
  });
}

// Calls visit(index, bits) for listed elements first, first + step, ..., with four fetches in flight per thread.
template <typename Bits, typename Visit>
__device__ __forceinline__ void each_listed(const Row& row, uint32_t listed, uint32_t first,
                                            uint32_t step, Visit&& visit) {
  const Bits* data = static_cast<const Bits*>(row.data);
#pragma unroll 1
  for (int64_t i = first; i < listed; i += 4 * int64_t(step)) {
    uint32_t at[4];
    Bits bits[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) at[u] = i + u * int64_t(step) < listed ? row.list[i + u * step] : kNone;
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (at[u] != kNone) bits[u] = data[at[u]];
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (at[u] != kNone) visit(at[u], bits[u]);
  }
}

// ---- Histograms ---------------------------------------------------------------------------------

// Counters in dynamic shared memory, from `at` on. Adding threadIdx.z (always 0, which nvcc does not know) stops
// nvcc from recomputing the base of shared memory before every atomic.
__device__ __forceinline__ uint32_t* counters(uint4* at) { return reinterpret_cast<uint32_t*>(at + threadIdx.z); }

// A block's histogram, in shared memory: 16-byte aligned, and at least 16 bytes.
template <bool kPacked>
struct SharedHist {
  uint32_t* words;

  __device__ __forceinline__ void zero(int bins) {
    const int fours = ((kPacked ? bins / 2 : bins) + 3) / 4;
    for (int i = threadIdx.x; i < fours; i += kThreads)
      reinterpret_cast<uint4*>(words)[i] = {0, 0, 0, 0};
  }
  __device__ __forceinline__ void add(uint32_t bin, uint32_t count) {
    if (kPacked)
      atomicAdd(&words[bin / 2], count << (bin % 2 * 16));
    else
      atomicAdd(&words[bin], count);
  }
  __device__ __forceinline__ uint32_t operator()(int bin) const {
    return kPacked ? words[bin / 2] >> (bin % 2 * 16) & 0xFFFFu : words[bin];
  }
};

// A tensor's histogram, in global memory: 64 bits per bin if 32 could overflow.
struct GlobalHist {
  uint32_t* words;
  bool wide;

  __device__ __forceinline__ explicit GlobalHist(const Row& row) : GlobalHist(row, row.size >= kWideFrom) {}
  __device__ __forceinline__ GlobalHist(const Row& row, bool wide)
      : words(row.slot->hist()), wide(wide) {}
  __device__ __forceinline__ unsigned long long* wide_words() const {
    return reinterpret_cast<unsigned long long*>(words);
  }
  __device__ __forceinline__ unsigned long long operator()(int bin) const {
    return wide ? wide_words()[bin] : words[bin];
  }
  __device__ __forceinline__ void add(int bin, uint32_t count) {
    if (count == 0) return;
    if (wide)
      atomicAdd(&wide_words()[bin], (unsigned long long)count);
    else
      atomicAdd(&words[bin], count);
  }
  template <bool kPacked>
  __device__ __forceinline__ void add(const SharedHist<kPacked>& counts, int bins) {
    constexpr int kEach = kPacked ? 2 : 1;  // bins per word; most of them are empty
    for (int i = threadIdx.x; i < bins / (4 * kEach); i += kThreads) {
      const uint4 four = reinterpret_cast<const uint4*>(counts.words)[i];
      if ((four.x | four.y | four.z | four.w) == 0) continue;
      const uint32_t word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int bin = (4 * i + j) * kEach;
        add(bin, kPacked ? word[j] & 0xFFFFu : word[j]);
        if (kPacked) add(bin + 1, word[j] >> 16);
      }
    }
  }
  // The same, with neighbouring bins added by neighbouring threads: for a window's few empty bins, and the sample.
  __device__ __forceinline__ void add_dense(const SharedHist<false>& counts, int bins) {
#pragma unroll 4
    for (int i = threadIdx.x; i < bins; i += kThreads) add(i, counts.words[i]);
  }
  __device__ __forceinline__ void zero(int bins) {
    for (int i = threadIdx.x; i < (wide ? 2 * bins : bins); i += kThreads) words[i] = 0;
  }
};

// Counts a run of equal digits with one atomic, so that atomics do not queue up on constant and mostly zero
// tensors.
template <typename Hist>
struct Runs {
  Hist hist;
  uint32_t digit = 0, length = 0;

  __device__ __forceinline__ explicit Runs(Hist hist) : hist(hist) {}
  __device__ __forceinline__ void add(uint32_t next) {
    if (next != digit) {
      hist.add(digit, length);  // adds 0 before a thread's first run, which is not worth a test
      length = 0;
    }
    digit = next;
    ++length;
  }
  __device__ __forceinline__ void flush() {
    if (length) hist.add(digit, length);
    length = 0;
  }
};

// Maximum over the block, in shared memory. The caller has initialised *out, with a barrier after that.
__device__ __forceinline__ void block_max(uint32_t* out, uint32_t value) {
  value = __reduce_max_sync(kAllLanes, value);
  if (threadIdx.x % 32 == 0 && value) atomicMax(out, value);
}

// Maximum over all blocks, in global memory, with one atomic per block because atomics at one address queue up.
// Contains a barrier; the caller needs another one before it calls this again.
__device__ __forceinline__ void grid_max(uint32_t* out, uint32_t value) {
  __shared__ uint32_t of_warp[kWarps];
  value = __reduce_max_sync(kAllLanes, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  value = __reduce_max_sync(kAllLanes, threadIdx.x < kWarps ? of_warp[threadIdx.x] : 0);
  if (threadIdx.x == 0 && value) atomicMax(out, value);
}

// Whether all other blocks of the tensor have arrived. If so, what they wrote before is visible.
__device__ __forceinline__ bool is_last_block(uint32_t* arrived, uint32_t blocks) {
  __shared__ uint32_t before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) before = atomicAdd(arrived, 1u);
  __syncthreads();
  if (before != blocks - 1) return false;
  __threadfence();
  if (threadIdx.x == 0) *arrived = 0;  // for the next launch
  return true;
}

struct Picked {
  unsigned long long left, here;  // rank within the bin, elements in it
  uint32_t bin, next;             // the next bin that holds any, or kNone
};

// The sum over the threads up to and including this one. Called by all threads of the block; contains a barrier.
__device__ __forceinline__ unsigned long long sum_upto(unsigned long long sum) {
  __shared__ unsigned long long sums[kWarps];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) sums[threadIdx.x / 32] = sum;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += warp < int(threadIdx.x) / 32 ? sums[warp] : 0;
  return sum;
}

// The bin that holds rank `rank`. Called by all threads of the block; ends with a barrier.
template <typename Hist>
__device__ __forceinline__ Picked pick(const Hist& hist, int bins, unsigned long long rank) {
  __shared__ Picked picked;
  const int each = (bins + kThreads - 1) / kThreads;
  const int first = min(int(threadIdx.x) * each, bins), last = min(first + each, bins);
  unsigned long long sum = 0;
#pragma unroll 8
  for (int bin = first; bin < last; ++bin) sum += hist(bin);
  if (threadIdx.x == 0) picked.next = kNone;
  const unsigned long long upto = sum_upto(sum);
  if (upto - sum <= rank && rank < upto) {
    picked.left = rank - (upto - sum);
    int bin = first;
    for (; picked.left >= hist(bin); ++bin) picked.left -= hist(bin);
    picked.bin = bin;
    picked.here = hist(bin);
  }
  __syncthreads();
  for (int bin = first; bin < last; ++bin)
    if (bin > int(picked.bin) && hist(bin)) {
      atomicMin(&picked.next, uint32_t(bin));
      break;
    }
  __syncthreads();
  return picked;
}

// Appends what a block has listed in shared memory to the tensor's list. Called by all threads, after a barrier.
__device__ __forceinline__ void hand_over(const Row& row, const uint32_t* local, uint32_t count) {
  __shared__ uint32_t base;
  if (threadIdx.x == 0 && count) base = atomicAdd(&row.slot->state.listed, count);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < count; i += kThreads)
    if (base + i < row.room) row.list[base + i] = local[i];
}

// ---- The threshold ------------------------------------------------------------------------------

__device__ __forceinline__ bool holds_nan(DType dtype, uint32_t greatest_key) {
  switch (dtype) {
    case DType::f32: return greatest_key > Keys<float>::infinity;
    case DType::bf16: return greatest_key > Keys<bf16>::infinity;
    default: return greatest_key > Keys<fp16>::infinity;
  }
}

// The threshold, from the last digit's bin. `above`: the least key above the whole histogram.
__device__ __forceinline__ uint32_t find_threshold(const Row& row, const Quantile& quantile,
                                                   const Picked& picked, uint32_t prefix,
                                                   uint32_t above) {
  const uint32_t low = prefix + picked.bin;
  const uint32_t next = picked.next == kNone ? above : prefix + picked.next;
  const uint32_t high = picked.left + 1 < picked.here ? low : next;
  const float weight = quantile_rank(row.size, quantile).weight;
  switch (DType(row.dtype)) {
    case DType::f32: return threshold_key<float>(low, high, weight);
    case DType::bf16: return threshold_key<bf16>(low, high, weight);
    default: return threshold_key<fp16>(low, high, weight);
  }
}

}  // namespace
}  // namespace relora
