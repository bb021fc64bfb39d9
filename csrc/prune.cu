// Prune a list of tensors in place: each to zero where |t| <= quantile(|t|, ratio), exactly
// (contract: relora_kernels/reference/prune.py), or at random, keyed by logical element.
//
// A radix selection on magnitude keys (numerics.cuh), a few launches for up to kRows tensors:
//
//   large, 32-bit   count      histogram of the keys' upper 13 bits; the last block to arrive picks
//                              the bin that holds the quantile's lower neighbour       one read
//                   partition  zero what lies below the bin, list what lies in it and count its
//                              next 10 bits; the last block picks again        one read, one write
//                   recount    the listed elements' last 8 bits: the threshold
//                   finish     zero the listed elements up to the threshold
//   large, 16-bit   count      all 15 bits of the keys: the threshold itself           one read
//                   finish     zero up to the threshold                        one read, one write
//   up to kSmall    small      all of it in one block, whose later reads come from L1 and L2
//
// Where the bin holds more than the list has room for (ties, constant tensors), or where rounding
// lifts the threshold to an element above the bin, recount and finish go over the whole tensor: the
// device decides, every launch is the same. A NaN makes `partition` or `finish` zero everything.
//
// Bytes an element: 12 in 32 bits, 6 in 16, and 8 or 4 for the partner; listed elements are
// fetched again, twice, by sectors of 32 bytes.
//
// The list: 13 bits are 8 of exponent and 5 of mantissa, so the bin at x is at most x/32 wide and
// holds at most x p(x) / 32 of the elements: of a normal tensor, where x p(x) is largest at one
// standard deviation, 1.51 %, and 1.06 % at ratio 0.9. Room for 1/64 = 1.56 % holds that at any
// scale and ratio, and costs 1.56 % of the tensor's memory. A launch takes as many tensors as have
// room for lists and histograms (32 KB each, 128 KB in 16 bits) in 1.9 % of the memory pruned, and the
// next launches reuse it. One tensor is always taken: its histogram may be more than that share, and
// of the list it gets what is left.
#include "launch.h"
#include "numerics.cuh"

#ifndef RELORA_WIDE_FROM  // the tests lower it
#define RELORA_WIDE_FROM (int64_t(1) << 32)
#endif

namespace relora {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kUnroll = 4;      // 16-byte loads in flight a thread
constexpr int kSmall = 49152;   // up to here one block does it all: 16-bit counters hold that
constexpr int kRoomShare = 64;  // one element in so many may be listed
constexpr int kLocal = 8192;    // listed elements that a block collects before it asks for room
constexpr int kBlocksAnSM = 2;  // by registers: 512 threads of 64
// Tensors of a launch, 72 bytes each: as many as a kernel's parameters hold. These are 32,764 bytes from
// CUDA 12.1 and driver 530 on, and CUDA 13 asks for a newer driver.
#if CUDART_VERSION >= 13000
constexpr int kRows = 400, kParameters = 32764;
#else
constexpr int kRows = 48, kParameters = 4096;
#endif
constexpr int kMemoryShare = 52;  // a launch's workspace: one byte in so many of the memory pruned
constexpr uint32_t kAll = 0xFFFFFFFFu;
// From here on counters take 64 bits, and 32-bit indices do not reach: such a tensor has no list.
constexpr int64_t kWideFrom = RELORA_WIDE_FROM;

// Digits of a key, and the histogram of the first one. Two 16-bit counters share a word in shared
// memory where 32768 bins would not fit; in global memory every bin has a word.
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

// One tensor's numbers between the launches; zeros at first. Minima are kept as maxima of ~key.
struct State {
  unsigned long long left;  // rank within the prefix
  uint32_t prefix;          // the digits picked so far
  uint32_t arrived;         // blocks, in the current launch
  uint32_t greatest;        // key
  uint32_t not_above_bin;   // ~(least key above the first digit's bin)
  uint32_t not_above;       // ~(least key above the prefix that recount saw)
  uint32_t listed;
  uint32_t threshold;
  Source source;   // of recount
  Source finish;   // of finish: no block of recount's may see it change
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
};

// The table travels by value, as every kernel's parameter: there is no copy from host memory, which
// could not be captured in a CUDA graph, and a replay finds the same rows in the graph itself.
struct Table {
  Row rows[kRows];
  uint32_t count, blocks;
  uint32_t spans;  // a block's
  double ratio;
  uint64_t random_threshold;
  const int64_t* prefixes;  // magnitude_counts
  int64_t *counts, *lowest, *highest;
  int shift, bits;
};
static_assert(sizeof(Table) <= kParameters, "a kernel's parameters");

extern __shared__ uint4 dynamic_shared[];

template <typename Bits>
constexpr int kPack = 16 / int(sizeof(Bits));

// Blocks take whole spans of elements, 96 KB, so that a tensor of 1 MB has eleven. How many each is
// decided for a launch: see spans_a_block.
template <typename Bits>
constexpr int kSpan = 3 * kThreads * kUnroll * kPack<Bits>;
// Of 32 bits what a block lists, 1.56 %, has room in kLocal; of 16 its counters hold one span.
template <typename Bits>
constexpr uint32_t kMostSpans = sizeof(Bits) == 4 ? 16 : 1;
static_assert(kSpan<uint16_t> * kMostSpans<uint16_t> <= 65535, "16-bit counters");

// ---- A block's part of a tensor -----------------------------------------------------------------

struct Part {
  const Row& row;          // in the parameters' constant bank: loaded where used
  uint32_t block, blocks;  // of this tensor
  int64_t begin, end;      // elements
};

template <typename Bits>
__device__ __forceinline__ Part find_part(const Table& table) {
  uint32_t low = 0, high = table.count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (table.rows[middle].first_block <= blockIdx.x ? low : high) = middle;
  }
  const Row& row = table.rows[low];
  const uint32_t next = low + 1 < table.count ? table.rows[low + 1].first_block : table.blocks;
  const uint32_t block = blockIdx.x - row.first_block;
  const int64_t span = int64_t(kSpan<Bits>) * table.spans, begin = block * span;
  return {row, block, next - row.first_block, begin, min(row.size, begin + span)};
}

// 16 bytes of elements in registers. Every index is a constant after unrolling.
template <typename Bits>
struct Strip {
  static constexpr int kEach = 4 / int(sizeof(Bits));  // elements a word
  uint32_t w[4];

  __device__ __forceinline__ uint32_t key(int i) const {
    return magnitude_key(Bits(w[i / kEach] >> (i % kEach * 16)));
  }
  __device__ __forceinline__ void clear(uint32_t mask) {
#pragma unroll
    for (int i = 0; i < kPack<Bits>; ++i)
      if (mask >> i & 1) w[i / kEach] &= ~(uint32_t(Bits(~Bits(0))) << (i % kEach * 16));
  }
  __device__ __forceinline__ void load(const Bits* from) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  }
  __device__ __forceinline__ void store(Bits* to) const {
    *reinterpret_cast<uint4*>(to) = {w[0], w[1], w[2], w[3]};
  }
  __device__ __forceinline__ void load_some(const Bits* from, int count) {
    w[0] = w[1] = w[2] = w[3] = 0;
#pragma unroll
    for (int i = 0; i < kPack<Bits>; ++i)
      if (i < count) w[i / kEach] |= uint32_t(from[i]) << (i % kEach * 16);
  }
};

__device__ __forceinline__ bool is_wide(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

// visit(strip, index of its first element, elements in it) for the elements [begin, end), where
// begin is a multiple of the span: sweeps of 16-byte loads, then single elements.
template <typename Bits, typename Visit>
__device__ __forceinline__ void read(const Row& row, int64_t begin, int64_t end, Visit&& visit) {
  constexpr int kN = kPack<Bits>, kSweep = kThreads * kN * kUnroll;
  static_assert(kSpan<Bits> % kSweep == 0, "whole sweeps");
  const Bits* data = static_cast<const Bits*>(row.data);
  Strip<Bits> strips[kUnroll];
  if (is_wide(data))
    for (; begin + kSweep <= end; begin += kSweep) {
      const int64_t at = begin + threadIdx.x * kN;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) strips[u].load(data + at + u * kThreads * kN);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) visit(strips[u], at + u * kThreads * kN, kN);
    }
#pragma unroll 1
  for (int64_t at = begin + threadIdx.x * kN; at < end; at += kThreads * kN) {
    const int count = int(min(end - at, int64_t(kN)));
    strips[0].load_some(data + at, count);
    visit(strips[0], at, count);
  }
}

// Whole sweeps of what clear() does, 16 bytes at a time; returns where it stopped.
template <typename Bits, int kStrips, bool kPaired, typename Dropped>
__device__ __forceinline__ int64_t clear_sweeps(const Row& row, int64_t begin, int64_t end,
                                                Dropped&& dropped) {
  constexpr int kN = kPack<Bits>, kSweep = kThreads * kN * kStrips;
  static_assert(kSpan<Bits> % kSweep == 0, "whole sweeps");
  Bits* data = static_cast<Bits*>(row.data);
  Bits* partner = static_cast<Bits*>(row.partner);
  Strip<Bits> mine[kStrips], other[kStrips];
  for (; begin + kSweep <= end; begin += kSweep) {
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

// Zeroes, in [begin, end), the elements whose bits dropped(strip, first index, elements) returns,
// and the partner's with them. kStrips are in flight a thread, with a partner half as many: what
// the registers hold beside `dropped`. Sweeps where both are aligned and of one element size.
template <typename Bits, int kStrips, typename Dropped>
__device__ __forceinline__ void clear(const Row& row, int64_t begin, int64_t end,
                                      Dropped&& dropped) {
  Bits* data = static_cast<Bits*>(row.data);
  if (is_wide(data) && row.partner_bytes == 0)
    begin = clear_sweeps<Bits, kStrips, false>(row, begin, end, dropped);
  if (is_wide(data) && is_wide(row.partner) && row.partner_bytes == sizeof(Bits))
    begin = clear_sweeps<Bits, kStrips / 2, true>(row, begin, end, dropped);
#pragma unroll 1
  for (int64_t at = begin + threadIdx.x * kPack<Bits>; at < end; at += kThreads * kPack<Bits>) {
    const int count = int(min(end - at, int64_t(kPack<Bits>)));
    Strip<Bits> strip;
    strip.load_some(data + at, count);
    const uint32_t mask = dropped(strip, at, count);
    for (int i = 0; i < count; ++i)
      if (mask >> i & 1) {
        data[at + i] = 0;
        clear_partner(row, at + i);
      }
  }
}

template <typename Bits>
__device__ __forceinline__ void clear_to(const Row& row, int64_t begin, int64_t end,
                                         uint32_t threshold) {
  clear<Bits, kUnroll>(row, begin, end, [=](const auto& strip, int64_t, int) {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kPack<Bits>; ++i) mask |= uint32_t(strip.key(i) <= threshold) << i;
    return mask;
  });
}

// visit(index, bits) for listed elements first, first + step, ...: four fetches in flight a thread.
template <typename Bits, typename Visit>
__device__ __forceinline__ void each_listed(const Row& row, uint32_t listed, uint32_t first,
                                            uint32_t step, Visit&& visit) {
  const Bits* data = static_cast<const Bits*>(row.data);
#pragma unroll 1
  for (int64_t i = first; i < listed; i += 4 * int64_t(step)) {
    uint32_t at[4];
    Bits bits[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) at[u] = i + u * int64_t(step) < listed ? row.list[i + u * step] : kAll;
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (at[u] != kAll) bits[u] = data[at[u]];
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (at[u] != kAll) visit(at[u], bits[u]);
  }
}

// ---- Histograms ---------------------------------------------------------------------------------

// A block's own, in shared memory; 16-byte aligned, and in 16 bytes or more.
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

// A tensor's, in global memory; 64 bits a bin where 32 could overflow.
struct GlobalHist {
  uint32_t* words;
  bool wide;

  __device__ __forceinline__ explicit GlobalHist(const Row& row)
      : words(row.slot->hist()), wide(row.size >= kWideFrom) {}
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
    constexpr int kEach = kPacked ? 2 : 1;  // bins a word; most of them are empty
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
  __device__ __forceinline__ void zero(int bins) {
    for (int i = threadIdx.x; i < (wide ? 2 * bins : bins); i += kThreads) words[i] = 0;
  }
};

// Counts runs of one digit with one atomic: constant and mostly zero tensors do not queue up.
template <typename Hist>
struct Runs {
  Hist hist;
  uint32_t digit = 0, length = 0;

  __device__ __forceinline__ explicit Runs(Hist hist) : hist(hist) {}
  __device__ __forceinline__ void add(uint32_t next) {
    if (next != digit) {
      flush();
      digit = next;
    }
    ++length;
  }
  __device__ __forceinline__ void flush() {
    if (length) hist.add(digit, length);
    length = 0;
  }
};

// Over the block, after a barrier of the caller's that ordered *out = its start before.
__device__ __forceinline__ void block_max(uint32_t* out, uint32_t value) {
  value = __reduce_max_sync(kAll, value);
  if (threadIdx.x % 32 == 0 && value) atomicMax(out, value);
}

// Whether every other block of the tensor has arrived; what they wrote before is visible then.
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
  uint32_t bin, next;             // the next bin that holds any; kAll: none
};

// The bin that holds rank `rank`. All threads of the block; ends with a barrier.
template <typename Hist>
__device__ __forceinline__ Picked pick(const Hist& hist, int bins, unsigned long long rank) {
  __shared__ Picked picked;
  __shared__ unsigned long long sums[kWarps];
  const int each = (bins + kThreads - 1) / kThreads, lane = threadIdx.x % 32;
  const int first = min(int(threadIdx.x) * each, bins), last = min(first + each, bins);
  unsigned long long sum = 0;
#pragma unroll 8
  for (int bin = first; bin < last; ++bin) sum += hist(bin);
  unsigned long long upto = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned long long other = __shfl_up_sync(kAll, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) sums[threadIdx.x / 32] = upto;
  if (threadIdx.x == 0) picked.next = kAll;
  __syncthreads();
  for (int warp = 0; warp < int(threadIdx.x) / 32; ++warp) upto += sums[warp];
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

// ---- The threshold ------------------------------------------------------------------------------

__device__ __forceinline__ bool holds_nan(DType dtype, uint32_t greatest_key) {
  switch (dtype) {
    case DType::f32: return greatest_key > Keys<float>::infinity;
    case DType::bf16: return greatest_key > Keys<bf16>::infinity;
    default: return greatest_key > Keys<fp16>::infinity;
  }
}

// From the last digit's bin; `above`: the least key above all of its histogram.
__device__ __forceinline__ uint32_t find_threshold(const Row& row, const Table& table,
                                                   const Picked& picked, uint32_t prefix,
                                                   uint32_t above) {
  const uint32_t low = prefix + picked.bin;
  const uint32_t next = picked.next == kAll ? above : prefix + picked.next;
  const uint32_t high = picked.left + 1 < picked.here ? low : next;
  const float weight = quantile_rank(row.size, table.ratio).weight;
  switch (DType(row.dtype)) {
    case DType::f32: return threshold_key<float>(low, high, weight);
    case DType::bf16: return threshold_key<bf16>(low, high, weight);
    default: return threshold_key<fp16>(low, high, weight);
  }
}

// ---- Kernels ------------------------------------------------------------------------------------

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) count_kernel(const __grid_constant__ Table table) {
  using F = Format<Bits>;
  constexpr int kShift = 8 * int(sizeof(Bits)) - 1 - F::first;
  SharedHist<F::packed> hist{reinterpret_cast<uint32_t*>(dynamic_shared)};
  const Part part = find_part<Bits>(table);
  const Row& row = part.row;
  State& state = row.slot->state;

  hist.zero(F::bins);
  __syncthreads();
  Runs<SharedHist<F::packed>> runs(hist);
  uint32_t greatest = 0;
  read<Bits>(row, part.begin, part.end, [&](const auto& strip, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < kPack<Bits>; ++i)
      if (i < count) {
        greatest = max(greatest, strip.key(i));
        runs.add(strip.key(i) >> kShift);
      }
  });
  runs.flush();
  block_max(&state.greatest, greatest);
  __syncthreads();
  GlobalHist whole(row);
  whole.add(hist, F::bins);
  if (!is_last_block(&state.arrived, part.blocks)) return;

  const Picked picked = pick(whole, F::bins, quantile_rank(row.size, table.ratio).low);
  if (threadIdx.x == 0) {
    const bool all = holds_nan(DType(row.dtype), state.greatest);
    if (kShift == 0) {
      state.threshold = all ? kDropAll : find_threshold(row, table, picked, 0, kAll);
      state.finish = Source::whole;
    } else {
      state.prefix = all ? uint32_t(F::bins) : picked.bin;  // all lie below: partition zeroes them
      state.left = picked.left;
      state.source = all ? Source::nothing
                         : picked.here <= row.room ? Source::list : Source::whole;
      state.finish = state.source;
    }
  }
  if constexpr (sizeof(Bits) == 4) whole.zero((1 << F::second) + (1 << F::third));
}

__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
partition_kernel(const __grid_constant__ Table table) {
  using F = Format<uint32_t>;
  constexpr int kShift = 31 - F::first, kNextShift = F::third, kNextBins = 1 << F::second;
  alignas(16) __shared__ uint32_t words[kNextBins];
  __shared__ uint32_t local[kLocal];
  __shared__ uint32_t found, base;
  const Part part = find_part<uint32_t>(table);
  const Row& row = part.row;
  State& state = row.slot->state;
  SharedHist<false> hist{words};

  hist.zero(kNextBins);
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const uint32_t prefix = state.prefix;
  const bool listing = state.source == Source::list;
  uint32_t not_above = 0;
  Runs<SharedHist<false>> runs(hist);
  const auto sort_in = [&](const auto& strip, int64_t first, int count) {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kPack<uint32_t>; ++i) {
      const uint32_t key = strip.key(i), digit = key >> kShift;
      mask |= uint32_t(digit < prefix) << i;
      if (i >= count) continue;
      if (digit > prefix) not_above = max(not_above, ~key);
      if (digit == prefix) {
        runs.add(key >> kNextShift & (kNextBins - 1));
        if (!listing) continue;
        const uint32_t place = atomicAdd(&found, 1u);
        if (place < kLocal) {
          local[place] = uint32_t(first + i);
        } else {
          const uint32_t at = atomicAdd(&state.listed, 1u);
          if (at < row.room) row.list[at] = uint32_t(first + i);
        }
      }
    }
    return mask;
  };
  clear<uint32_t, kUnroll>(row, part.begin, part.end, sort_in);
  runs.flush();
  block_max(&state.not_above_bin, not_above);
  __syncthreads();
  const uint32_t collected = min(found, uint32_t(kLocal));
  if (threadIdx.x == 0 && collected) base = atomicAdd(&state.listed, collected);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < collected; i += kThreads)
    if (base + i < row.room) row.list[base + i] = local[i];
  GlobalHist whole(row);
  whole.add(hist, kNextBins);
  if (!is_last_block(&state.arrived, part.blocks) || state.source == Source::nothing) return;

  const Picked picked = pick(whole, kNextBins, state.left);
  if (threadIdx.x == 0) {
    state.prefix = prefix << F::second | picked.bin;
    state.left = picked.left;
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
recount_kernel(const __grid_constant__ Table table) {
  using F = Format<uint32_t>;
  constexpr int kBins = 1 << F::third;
  alignas(16) __shared__ uint32_t words[kBins];
  const Part part = find_part<uint32_t>(table);
  const Row& row = part.row;
  State& state = row.slot->state;
  SharedHist<false> hist{words};

  if (state.source == Source::nothing) return;
  const bool listing = state.source == Source::list;
  const uint32_t listed = state.listed;
  const uint32_t blocks =
      listing ? min(part.blocks, (listed + kThreads - 1) / kThreads) : part.blocks;
  if (part.block >= blocks) return;
  hist.zero(kBins);
  __syncthreads();
  const uint32_t prefix = state.prefix;
  uint32_t not_above = 0;
  Runs<SharedHist<false>> runs(hist);
  const auto count_key = [&](uint32_t key) {
    if (key >> F::third == prefix) runs.add(key & (kBins - 1));
    if (key >> F::third > prefix) not_above = max(not_above, ~key);
  };
  if (listing) {
    each_listed<uint32_t>(row, listed, part.block * kThreads + threadIdx.x, blocks * kThreads,
                          [&](uint32_t, uint32_t bits) { count_key(magnitude_key(bits)); });
  } else {
    read<uint32_t>(row, part.begin, part.end, [&](const auto& strip, int64_t, int count) {
#pragma unroll
      for (int i = 0; i < kPack<uint32_t>; ++i)
        if (i < count) count_key(strip.key(i));
    });
  }
  runs.flush();
  block_max(&state.not_above, not_above);
  __syncthreads();
  GlobalHist whole(row);
  whole.words += (1 << F::second) * (whole.wide ? 2 : 1);
  whole.add(hist, kBins);
  if (!is_last_block(&state.arrived, blocks)) return;

  const Picked picked = pick(whole, kBins, state.left);
  if (threadIdx.x == 0) {
    const uint32_t above = min(~state.not_above, ~state.not_above_bin);
    state.threshold = find_threshold(row, table, picked, prefix << F::third, above);
    if (state.threshold >= ~state.not_above_bin) state.finish = Source::whole;
  }
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) finish_kernel(const __grid_constant__ Table table) {
  const Part part = find_part<Bits>(table);
  const Row& row = part.row;
  const State& state = row.slot->state;
  const uint32_t threshold = state.threshold, listed = state.listed;
  if (state.finish == Source::whole) clear_to<Bits>(row, part.begin, part.end, threshold);
  if (state.finish != Source::list) return;
  each_listed<Bits>(row, listed, part.block * kThreads + threadIdx.x, part.blocks * kThreads,
                    [&](uint32_t at, Bits bits) {
                      if (magnitude_key(bits) > threshold) return;
                      static_cast<Bits*>(row.data)[at] = 0;
                      clear_partner(row, at);
                    });
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) small_kernel(const __grid_constant__ Table table) {
  using F = Format<Bits>;
  constexpr int kKeyBits = 8 * int(sizeof(Bits)) - 1;
  __shared__ uint32_t extremes[2];  // greatest key, ~(least key above the prefix)
  SharedHist<F::packed> hist{reinterpret_cast<uint32_t*>(dynamic_shared)};
  const Part part = find_part<Bits>(table);
  const Row& row = part.row;

  unsigned long long left = quantile_rank(row.size, table.ratio).low;
  uint32_t prefix = 0, threshold = kDropAll;
  for (int shift = kKeyBits; shift > 0;) {
    int bits = F::first;
    if constexpr (sizeof(Bits) == 4)
      bits = shift == kKeyBits ? F::first : shift > F::third ? F::second : F::third;
    const int bins = 1 << bits, above = shift;
    shift -= bits;
    hist.zero(bins);
    if (threadIdx.x < 2) extremes[threadIdx.x] = 0;
    __syncthreads();
    Runs<SharedHist<F::packed>> runs(hist);
    uint32_t greatest = 0, not_above = 0;
    read<Bits>(row, 0, row.size, [&](const auto& strip, int64_t, int count) {
#pragma unroll
      for (int i = 0; i < kPack<Bits>; ++i) {
        const uint32_t key = strip.key(i), higher = key >> above;
        if (i >= count) continue;
        greatest = max(greatest, key);
        if (higher == prefix) runs.add(key >> shift & (bins - 1));
        if (higher > prefix) not_above = max(not_above, ~key);
      }
    });
    runs.flush();
    block_max(&extremes[0], greatest);
    block_max(&extremes[1], not_above);
    __syncthreads();
    if (holds_nan(DType(row.dtype), extremes[0])) break;  // of the first round: all threads agree
    const Picked picked = pick(hist, bins, left);
    prefix <<= bits;
    if (shift == 0) threshold = find_threshold(row, table, picked, prefix, ~extremes[1]);
    prefix |= picked.bin;
    left = picked.left;
  }
  clear_to<Bits>(row, 0, row.size, threshold);
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) random_kernel(const __grid_constant__ Table table) {
  const Part part = find_part<Bits>(table);
  const Row& row = part.row;
  const int shift = int(row.first & 3);  // words of a draw that belong to elements before `first`
  clear<Bits, 2>(row, part.begin, part.end, [&](const auto&, int64_t first, int) {
    uint32_t mask = 0;
    const int64_t block = (row.first + first) / 4;  // `first` is a multiple of 4
    Words words = draw(row.seed, kStreamPrune, 0, block);
#pragma unroll
    for (int four = 0; four < kPack<Bits> / 4; ++four) {
      Words next{};
      if (shift || four + 1 < kPack<Bits> / 4)
        next = draw(row.seed, kStreamPrune, 0, block + four + 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t drawn = words.w[i];  // selected by value: no index known only at run time
#pragma unroll
        for (int by = 1; by < 4; ++by)
          if (shift == by) drawn = i + by < 4 ? words.w[(i + by) % 4] : next.w[(i + by) % 4];
        mask |= uint32_t(drawn < table.random_threshold) << (4 * four + i);
      }
      words = next;
    }
    return mask;
  });
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) counts_kernel(const __grid_constant__ Table table) {
  const Part part = find_part<Bits>(table);
  const Row& row = part.row;
  SharedHist<false> hist{reinterpret_cast<uint32_t*>(dynamic_shared)};
  const int bins = 1 << table.bits, above = table.shift + table.bits;
  const int64_t prefix = table.prefixes[row.index];

  hist.zero(bins);
  __syncthreads();
  Runs<SharedHist<false>> runs(hist);
  uint32_t greatest = 0, not_above = 0;
  read<Bits>(row, part.begin, part.end, [&](const auto& strip, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < kPack<Bits>; ++i) {
      const uint32_t key = strip.key(i);
      const int64_t higher = int64_t(key) >> above;
      if (i >= count) continue;
      greatest = max(greatest, key);
      if (higher == prefix) runs.add(uint32_t(key >> table.shift) & uint32_t(bins - 1));
      if (higher > prefix) not_above = max(not_above, ~key);
    }
  });
  runs.flush();
  greatest = __reduce_max_sync(kAll, greatest);
  not_above = __reduce_max_sync(kAll, not_above);
  if (threadIdx.x % 32 == 0) {
    atomicMax(reinterpret_cast<long long*>(&table.highest[row.index]), (long long)greatest);
    if (not_above)
      atomicMin(reinterpret_cast<long long*>(&table.lowest[row.index]), (long long)~not_above);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += kThreads)
    if (const uint32_t count = hist(bin))
      atomicAdd(reinterpret_cast<unsigned long long*>(table.counts) +
                    (int64_t(row.index) << table.bits) + bin,
                (unsigned long long)count);
}

// ---- Launchers ----------------------------------------------------------------------------------

int bytes_of(int64_t dtype) { return DType(dtype) == DType::f32 ? 4 : 2; }
int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }
template <typename Bits>
int64_t blocks_of(int64_t size, int64_t spans) {
  const int64_t span = spans * kSpan<Bits>;
  return (size + span - 1) / span;
}

// Tensors of one element size, in groups of one table each; a group's histograms lie first in the
// workspace, its lists behind them.
struct Group {
  Table table;
  int64_t hist_bytes = 0, bytes = 0;
};

enum class Which { small, large, any };

// Few, so that all multiprocessors have work and end together; many, so that what a block pays for
// itself (a histogram to zero, to add to the tensor's and to wait for) is little beside its elements.
// That is about one span's time: 4070 blocks of one span took 266 us to count 10^8 elements, 255 of 16
// take 113, on an H200 whose memory gives them in 94 (ncu, 2026-11-27).
template <typename Bits>
uint32_t spans_a_block(const Table& table, int slots) {
  uint32_t best = 1;
  int64_t least = INT64_MAX;
  for (uint32_t spans = 1; spans <= kMostSpans<Bits>; ++spans) {
    int64_t blocks = 0;
    for (uint32_t r = 0; r < table.count; ++r)
      blocks += blocks_of<Bits>(table.rows[r].size, spans);
    const int64_t cost = (blocks + slots - 1) / slots * (spans + 1);
    if (cost < least) best = spans, least = cost;
  }
  return best;
}

// Blocks of so many spans.
template <typename Bits>
void lay_out(Table& table, uint32_t spans) {
  table.spans = spans;
  table.blocks = 0;
  for (uint32_t r = 0; r < table.count; ++r) {
    table.rows[r].first_block = table.blocks;
    table.blocks += uint32_t(blocks_of<Bits>(table.rows[r].size, spans));
  }
}

// Blocks that are at work at a time.
cudaError_t find_slots(int* slots) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *slots = kBlocksAnSM * multiprocessors;
  return error;
}

template <typename Bits, typename Run>
cudaError_t for_each_group(const PruneTensor* tensors, int64_t count, Which which, int slots,
                           char* workspace, Run&& run) {
  int64_t listed_bytes = 0;
  for (int64_t i = 0; i < count; ++i)
    listed_bytes += tensors[i].size * bytes_of(tensors[i].dtype) +
                    (tensors[i].partner ? tensors[i].size * bytes_of(tensors[i].partner_dtype) : 0);
  const bool large = which == Which::large;
  const int64_t most_bytes = listed_bytes / kMemoryShare;
  for (int64_t i = 0; i < count;) {
    Group group{};
    Table& table = group.table;
    int64_t blocks = 0;
    for (; i < count && table.count < kRows; ++i) {
      const PruneTensor& t = tensors[i];
      if (bytes_of(t.dtype) != int(sizeof(Bits)) || t.size == 0) continue;
      if (which != Which::any && (t.size <= kSmall) != (which == Which::small)) continue;
      const int64_t its_blocks = which == Which::small ? 1 : blocks_of<Bits>(t.size, 1);
      const bool wide = t.size >= kWideFrom;
      const int64_t hist_bytes =
          large ? rounded(sizeof(Slot) + (wide ? 8 : 4) * int64_t(Format<Bits>::bins)) : 0;
      const int64_t most_room = max((most_bytes - hist_bytes) / 4, int64_t(0));
      const uint32_t room = large && sizeof(Bits) == 4 && !wide
                                ? uint32_t(min(t.size / kRoomShare, most_room))
                                : 0;
      const int64_t its_bytes = hist_bytes + rounded(4 * int64_t(room));
      if (blocks + its_blocks > INT32_MAX) break;
      if (table.count > 0 && group.bytes + its_bytes > most_bytes) break;
      Row& row = table.rows[table.count++];
      row.data = t.data;
      row.partner = t.partner;
      row.size = t.size;
      row.seed = uint64_t(t.seed);
      row.first = t.first;
      row.index = uint32_t(i);
      row.dtype = uint8_t(t.dtype);
      row.partner_bytes = uint8_t(t.partner ? bytes_of(t.partner_dtype) : 0);
      row.room = room;
      row.slot = reinterpret_cast<Slot*>(workspace + group.hist_bytes);
      blocks += its_blocks;
      group.hist_bytes += hist_bytes;
      group.bytes += its_bytes;
    }
    if (table.count == 0) {
      if (i < count) return cudaErrorInvalidConfiguration;  // one tensor of over 10^13 elements
      break;
    }
    char* list = workspace + group.hist_bytes;
    for (uint32_t r = 0; r < table.count; ++r) {
      table.rows[r].list = reinterpret_cast<uint32_t*>(list);
      list += rounded(4 * int64_t(table.rows[r].room));
    }
    if (which == Which::small)
      lay_out<Bits>(table, INT32_MAX / kSpan<Bits>);  // a block each
    else
      lay_out<Bits>(table, spans_a_block<Bits>(table, slots));
    if (const cudaError_t error = run(group)) return error;
  }
  return cudaSuccess;
}

cudaError_t launch(void (*kernel)(Table), const Table& table, int shared_bytes,
                   cudaStream_t stream) {
  if (shared_bytes > 48 * 1024)
    if (const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(table.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, table);
}

template <typename Bits>
cudaError_t prune_sized(const PruneTensor* tensors, int64_t count, double ratio, int slots,
                        char* workspace, cudaStream_t stream) {
  constexpr int kShared = Format<Bits>::shared_bytes;
  cudaError_t error = for_each_group<Bits>(
      tensors, count, Which::large, slots, workspace, [&](Group& group) -> cudaError_t {
        Table& table = group.table;
        table.ratio = ratio;
        if (cudaError_t e = cudaMemsetAsync(workspace, 0, group.hist_bytes, stream)) return e;
        if (cudaError_t e = launch(count_kernel<Bits>, table, kShared, stream)) return e;
        if (sizeof(Bits) == 4) {
          if (cudaError_t e = launch(partition_kernel, table, 0, stream)) return e;
          if (cudaError_t e = launch(recount_kernel, table, 0, stream)) return e;
        }
        return launch(finish_kernel<Bits>, table, 0, stream);
      });
  if (error) return error;
  return for_each_group<Bits>(tensors, count, Which::small, slots, nullptr, [&](Group& group) {
    group.table.ratio = ratio;
    return launch(small_kernel<Bits>, group.table, kShared, stream);
  });
}

}  // namespace

int64_t prune_workspace(const PruneTensor* tensors, int64_t count) {
  int64_t most = 0;
  const auto measure = [&](const Group& group) {
    most = max(most, group.bytes);
    return cudaSuccess;
  };
  for_each_group<uint32_t>(tensors, count, Which::large, 1, nullptr, measure);
  for_each_group<uint16_t>(tensors, count, Which::large, 1, nullptr, measure);
  return most;
}

cudaError_t prune(const PruneTensor* tensors, int64_t count, double ratio, void* workspace,
                  cudaStream_t stream) {
  char* at = static_cast<char*>(workspace);
  int slots;
  cudaError_t error = find_slots(&slots);
  if (!error) error = prune_sized<uint32_t>(tensors, count, ratio, slots, at, stream);
  if (!error) error = prune_sized<uint16_t>(tensors, count, ratio, slots, at, stream);
  return error;
}

cudaError_t prune_random(const PruneTensor* tensors, int64_t count, uint64_t threshold,
                         cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    return [=](Group& group) {
      group.table.random_threshold = threshold;
      return launch(kernel, group.table, 0, stream);
    };
  };
  int slots;
  cudaError_t error = find_slots(&slots);
  if (!error)
    error = for_each_group<uint32_t>(tensors, count, Which::any, slots, nullptr,
                                     run(random_kernel<uint32_t>));
  if (!error)
    error = for_each_group<uint16_t>(tensors, count, Which::any, slots, nullptr,
                                     run(random_kernel<uint16_t>));
  return error;
}

cudaError_t magnitude_counts(const PruneTensor* tensors, int64_t count, const int64_t* prefixes,
                             int shift, int bits, int64_t* counts, int64_t* lowest,
                             int64_t* highest, cudaStream_t stream) {
  if (shift < 0 || bits < 0 || bits > kCountBits || shift + bits > 31)
    return cudaErrorInvalidValue;
  const auto run = [&](auto kernel) {
    return [=](Group& group) {
      Table& table = group.table;
      table.prefixes = prefixes;
      table.counts = counts;
      table.lowest = lowest;
      table.highest = highest;
      table.shift = shift;
      table.bits = bits;
      return launch(kernel, table, max(4 << bits, 16), stream);
    };
  };
  int slots;
  cudaError_t error = find_slots(&slots);
  if (!error)
    error = for_each_group<uint32_t>(tensors, count, Which::any, slots, nullptr,
                                     run(counts_kernel<uint32_t>));
  if (!error)
    error = for_each_group<uint16_t>(tensors, count, Which::any, slots, nullptr,
                                     run(counts_kernel<uint16_t>));
  return error;
}

}  // namespace relora
