// The kernels of prune.cu's chains of launches, in their order there.
#pragma once

#include "prune.cuh"

namespace relora {
namespace {

struct Range {
  uint4* fours;
  uint32_t count;
};

struct Sampling {
  Chain table;
  uint32_t ends[kChainRows][2];  // the window's ends, as ranks in the sample
};
static_assert(sizeof(Sampling) <= kParameters, "a kernel's parameters");

// Zeroes a chain's histograms, 16 bytes per thread. Not a memset: no launch could begin before that has ended.
__global__ void __launch_bounds__(kThreads, kBlocksThatClear) zero_kernel(const Range range) {
  let_next_in();
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < range.count) range.fours[i] = {0, 0, 0, 0};
}

// kSampleBlocks blocks per tensor. The window reaches six standard deviations of the sample's quantile to both
// sides, plus a fiftieth of a bin because a bin's keys may not be spread evenly; for 16-bit keys, of which a bin
// has four, it is whole bins. Neighbouring elements may be alike; window_kernel detects a window that is too narrow.
template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
sample_kernel(const __grid_constant__ Sampling sampling) {
  constexpr bool kWhole = sizeof(Bits) == 2;  // bins
  constexpr int kShift = 8 * int(sizeof(Bits)) - 1 - kSampleDigit, kN = kPack<Bits>;
  constexpr int kBins = 1 << kSampleDigit, kEach = kBins / kThreads;
  constexpr uint32_t kSlack = kWhole ? 0 : (1u << kShift) / 50;
  constexpr int64_t kMost = int64_t(kSampleBlocks) * kThreads * kSampleStrips;
  __shared__ uint32_t ends[2];  // keys
  SharedHist<false> hist{counters(dynamic_shared)};
  let_next_in();
  const Row& row = sampling.table.rows[blockIdx.x / kSampleBlocks];
  const uint32_t* const ranks = sampling.ends[blockIdx.x / kSampleBlocks];
  if (!row.sampled) return wait_for_previous();
  State& state = row.slot->state;
  const Bits* const data = static_cast<const Bits*>(row.data);
  const int64_t strips = row.size / kN, taken = min(strips, kMost);
  const uint32_t share = max(uint32_t(strips / kMost), 1u);

  Strip<Bits> sample[kSampleStrips];
  int64_t ids[kSampleStrips];
#pragma unroll
  for (int u = 0; u < kSampleStrips; ++u) {
    ids[u] = (int64_t(blockIdx.x % kSampleBlocks) * kSampleStrips + u) * kThreads + threadIdx.x;
    // Somewhere in its share of the tensor, so that the sample is not always of the same columns of a matrix.
    const uint32_t drawn = uint32_t(ids[u]) * 2654435761u >> 8;
    const int64_t first = strips < kMost ? ids[u] : ids[u] * strips / kMost;
    if (ids[u] < taken) sample[u].load(data + (first + drawn % share) * kN);
  }
  hist.zero(kBins);
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kSampleStrips; ++u)
#pragma unroll
    for (int i = 0; i < kN; ++i)
      if (ids[u] < taken) hist.add(sample[u].key(i) >> kShift, 1);
  __syncthreads();
  wait_for_previous();
  GlobalHist whole(row, false);
  whole.add_dense(hist, kBins);
  if (!is_last_block(&state.arrived, kSampleBlocks)) return;

  // Finds both ends at once, with the bins in registers.
  uint4* const bins = reinterpret_cast<uint4*>(whole.words) + threadIdx.x * (kEach / 4);
  uint32_t count[kEach];
#pragma unroll
  for (int i = 0; i < kEach / 4; ++i) {
    const uint4 four = bins[i];
    count[4 * i] = four.x, count[4 * i + 1] = four.y, count[4 * i + 2] = four.z, count[4 * i + 3] = four.w;
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += count[i];
  const uint32_t before = uint32_t(sum_upto(sum)) - sum;
#pragma unroll
  for (int end = 0; end < 2; ++end) {
    uint32_t left = ranks[end] - before, bin = 0, here = 0;
    if (left >= sum) continue;  // another thread's bins; if rank < before, left has wrapped to a huge number
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (here) continue;
      if (left < count[i]) here = count[i], bin = i;
      else left -= count[i];
    }
    // As if the bin's keys were spread evenly.
    const float part = kWhole ? float(end) : float(left + end) / float(here);
    ends[end] = ((threadIdx.x * kEach + bin) << kShift) + uint32_t(part * float(1 << kShift));
  }
#pragma unroll
  for (int i = 0; i < kEach / 4; ++i) bins[i] = {0, 0, 0, 0};
  __syncthreads();
  if (threadIdx.x) return;
  const uint32_t from = ends[0], to = ends[1];
  state.origin = ranks[0] ? max(from, kSlack) - kSlack : 0;
  state.width = to + kSlack - state.origin;
  bool fails = sampling.table.quantile.ratio == 1;  // the quantile has no neighbour above
  if constexpr (kWhole) {
    fails |= state.width > 1u << kWindowDigit;
  } else {
    // So that the histogram's bins cover the window, and recount has at least four bins of single keys.
    state.shift = max(32 - __clz(state.width - 1) - kWindowDigit, 2);
    // Too wide; or the window ends in the first bin, where zeros are: its keys are not spread evenly.
    fails |= state.shift > kMostShift || to <= 1u << kShift;
  }
  if (fails) state.width = 0;
}

// What a thread of window_kernel sees: how many keys are below the window, and which are in it. `greatest` is above
// infinity's key if and only if there is a NaN (with 32 bits it is the greatest key).
template <typename Bits>
struct Seen;

// 32 bits: keys in the window are listed, and counted in bins of 2^shift keys.
template <>
struct Seen<uint32_t> {
  SharedHist<false> hist;
  uint32_t* local;
  uint32_t* found;
  uint32_t origin, shift, wanted, greatest = 0, below = 0;
  const uint32_t one = 1 + threadIdx.z;  // 1, but nvcc would combine a warp's atomics if it knew: few lanes get here

  __device__ __forceinline__ Seen(const Row& row, SharedHist<false> hist, uint32_t* local, uint32_t* found)
      : hist(hist), local(local), found(found), origin(row.slot->state.origin), shift(row.slot->state.shift),
        wanted(row.slot->state.width) {}

  __device__ __forceinline__ void add_some(const Strip<uint32_t>& strip, int count) {
#pragma unroll
    for (int i = 0; i < kPack<uint32_t>; ++i) {
      if (i >= count) continue;
      const uint32_t key = strip.key(i);
      greatest = max(greatest, key);
      below += (key - origin) >> 31;  // both have 31 bits
      if (key - origin >= wanted) continue;
      const uint32_t place = atomicAdd(found, one);
      if (place < kLocal) local[place] = key;
      else wanted = 0;  // the window fails, so equal elements need not all queue up here
      hist.add((key - origin) >> shift, 1);
    }
  }
  __device__ __forceinline__ void add(const Strip<uint32_t>& strip) { add_some(strip, kPack<uint32_t>); }
  __device__ __forceinline__ void finish() {}
};

// 16 bits: keys in the window are counted, with a bin for each key.
template <>
struct Seen<uint16_t> {
  Runs<SharedHist<false>> runs;
  // from, to, past_infinity: in both halves of a word.
  uint32_t origin, width, from, to, past_infinity, nans = 0, greatest = 0, below = 0;

  __device__ __forceinline__ Seen(const Row& row, SharedHist<false> hist, uint32_t*, uint32_t*)
      : runs(hist), origin(row.slot->state.origin), width(row.slot->state.width), from(twice(origin)),
        to(twice(origin + width)),
        past_infinity(twice((DType(row.dtype) == DType::bf16 ? Keys<bf16>::infinity : Keys<fp16>::infinity) + 1)) {
    hold(from), hold(to), hold(past_infinity), hold_shared(runs.hist.words);
  }

  __device__ __forceinline__ void add_some(const Strip<uint16_t>& strip, int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) add_key(key_of(strip, i));
  }
  __device__ __forceinline__ void add_key(uint32_t key) {
    greatest = max(greatest, key);
    below += (key - origin) >> 31;
    if (key - origin < width) runs.add(key - origin);
  }
  // The same for a whole strip, two keys at a time. Few of them are in the window.
  __device__ __forceinline__ void add(const Strip<uint16_t>& strip) {
    uint32_t inside[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = strip.w[2 * i], second = strip.w[2 * i + 1];
      const auto reach = [&](uint32_t least) {
        return top_bits(at_least(first, least), at_least(second, least));
      };
      const uint32_t not_below = reach(from);
      inside[i] = not_below & ~reach(to);
      below = uint32_t(__dp4a(int(~not_below), -1, int(below)));
      nans |= at_least(first, past_infinity) | at_least(second, past_infinity);
    }
    // Bit 8 e + f is the strip's element e + 4 f.
    uint32_t hits = (inside[0] & 0x01010101u) | (inside[1] & 0x02020202u);
#pragma unroll 1
    while (hits) {
      const uint32_t hit = 31 - __clz(int(hits));
      hits ^= 1u << hit;
      runs.add(key_of(strip, hit / 8 + hit % 8 * 4) - origin);
    }
  }
  // By selects, because registers cannot be indexed at run time.
  __device__ __forceinline__ static uint32_t key_of(const Strip<uint16_t>& strip, uint32_t i) {
    const uint32_t first = i & 2 ? strip.w[1] : strip.w[0], second = i & 2 ? strip.w[3] : strip.w[2];
    return magnitude_key(uint16_t((i & 4 ? second : first) >> i % 2 * 16));
  }
  __device__ __forceinline__ void finish() {
    runs.flush();
    if (nans & 0x80008000u) greatest = kAll;
  }
};

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
window_kernel(const __grid_constant__ Chain table) {
  constexpr bool kLists = sizeof(Bits) == 4;
  constexpr int kBins = 1 << kWindowDigit;
  __shared__ uint32_t local[kLists ? kLocal : 1];
  __shared__ uint32_t found, below;
  let_next_in();
  const Part part = find_part(table);
  const Row& row = part.row;
  State& state = row.slot->state;
  if (!row.sampled) return wait_for_previous();
  SharedHist<false> hist{counters(dynamic_shared)};

  // The blocks go side by side from the tensor's start to its end. L2 keeps the end for the last pass; the rest is
  // loaded to be evicted first. The first loads are in flight before the sample is finished.
  constexpr int kN = kPack<Bits>, kAhead = kThreads * kN;
  constexpr uint32_t kKeptSweeps = kKept / (int(sizeof(Bits)) * kSweep<Bits>);
  const Bits* const data = static_cast<const Bits*>(row.data);
  const uint32_t sweeps = uint32_t(row.size / kSweep<Bits>);
  const Bits* mine = data + int64_t(part.block) * kSweep<Bits> + threadIdx.x * kN;
  const int64_t step = int64_t(part.blocks) * kSweep<Bits>;
  Strip<Bits> strips[kUnroll];
  if (part.block < sweeps)
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) strips[u].load_once(mine + u * kAhead);
  hist.zero(kBins);
  if (threadIdx.x == 0) found = below = 0;
  __syncthreads();
  wait_for_previous();
  if (state.width == 0) return;
  Seen<Bits> seen(row, hist, local, &found);
  const L2Policy once = leave_first(), kept = stay();
#pragma unroll 1
  for (uint32_t sweep = part.block; sweep < sweeps;) {
    sweep += part.blocks;
    mine += step;
    hold(mine);
    L2Policy policy = sweep + kKeptSweeps < sweeps ? once : kept;
    hold(policy);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Strip<Bits> strip = strips[u].taken();
      if (sweep < sweeps) strips[u].load(mine + u * kAhead, policy);
      seen.add(strip);
    }
  }
  if (part.block == sweeps % part.blocks)  // the block whose turn it would be takes the rest
#pragma unroll 1
    for (int64_t at = int64_t(sweeps) * kSweep<Bits> + threadIdx.x * kN; at < row.size; at += kAhead) {
      const int count = int(min(row.size - at, int64_t(kN)));
      strips[0].load_some(data + at, count);
      seen.add_some(strips[0], count);
    }
  seen.finish();
  atomicAdd(&below, seen.below);
  grid_max(&state.greatest, seen.greatest);
  if (threadIdx.x == 0) {
    atomicAdd(&state.below, (unsigned long long)below);
    if (found > kLocal) atomicMax(&state.overflowed, 1u);
  }
  GlobalHist whole(row, false);
  whole.add_dense(hist, kBins);
  if constexpr (kLists) hand_over(row, local, found > kLocal ? 0 : found);
  if (!is_last_block(&state.arrived, part.blocks)) return;

  const unsigned long long rank = quantile_rank(row.size, table.quantile).low, first = state.below;
  const bool all = holds_nan(DType(row.dtype), state.greatest);
  if constexpr (!kLists) {
    static_assert(kBins == 2 * kThreads, "two bins a thread");
    const unsigned long long upto = sum_upto(whole.words[threadIdx.x] + whole.words[threadIdx.x + kThreads]);
    if (threadIdx.x == kThreads - 1) found = uint32_t(upto);
    __syncthreads();
  }
  const uint32_t inside = kLists ? state.listed : found;
  const bool holds = first <= rank && rank + 1 < first + inside &&
                     (!kLists || (state.listed <= row.room && !state.overflowed));
  Picked picked{};
  if (holds) picked = pick(whole, kBins, rank - first);
  else whole.zero(kBins);
  __syncthreads();
  if (threadIdx.x) return;
  state.settled = all || holds;
  state.finish = Source::whole;
  state.threshold = kDropAll;  // for a NaN; otherwise set below (16 bits) or by recount (32 bits)
  if constexpr (kLists) {
    state.source = all ? Source::nothing : Source::list;
    state.prefix = picked.bin;
    state.left = picked.left;
    if (!state.settled) state.listed = 0;
  } else if (holds && !all) {
    state.threshold = find_threshold(row, table.quantile, picked, state.origin, kAll);
  }
}

// The barriers of is_last_block() separate one part from the next.
template <typename Bits>
__device__ __forceinline__ void count_part(const Chain& table, const Part& part) {
  using F = Format<Bits>;
  constexpr int kShift = 8 * int(sizeof(Bits)) - 1 - F::first;
  SharedHist<F::packed> hist{counters(dynamic_shared)};
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
  grid_max(&state.greatest, greatest);
  GlobalHist whole(row);
  whole.add(hist, F::bins);
  if (!is_last_block(&state.arrived, part.blocks)) return;

  const Picked picked = pick(whole, F::bins, quantile_rank(row.size, table.quantile).low);
  if (threadIdx.x == 0) {
    const bool all = holds_nan(DType(row.dtype), state.greatest);
    if (kShift == 0) {
      state.threshold = all ? kDropAll : find_threshold(row, table.quantile, picked, 0, kAll);
      state.finish = Source::whole;
    } else {
      state.prefix = all ? uint32_t(F::bins) : picked.bin;  // all digits are below bins: partition zeroes them
      state.left = picked.left;
      state.origin = 0;
      state.shift = Format<uint32_t>::third;
      state.source = all ? Source::nothing
                         : picked.here <= row.room ? Source::list : Source::whole;
      state.finish = state.source;
    }
  }
  if constexpr (sizeof(Bits) == 4) whole.zero((1 << F::second) + (1 << F::third));
}

// There may be fewer blocks than parts of tensors: if windows have settled them, more blocks would only come and go.
template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
count_kernel(const __grid_constant__ Chain table) {
  follow();
#pragma unroll 1
  for (uint32_t at = blockIdx.x; at < table.blocks; at += gridDim.x) {
    const Part part = find_part(table, at);
    if (!part.row.slot->state.settled) count_part<Bits>(table, part);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
partition_kernel(const __grid_constant__ Chain table) {
  using F = Format<uint32_t>;
  constexpr int kShift = 31 - F::first, kNextShift = F::third, kNextBins = 1 << F::second;
  alignas(16) __shared__ uint32_t words[kNextBins];
  __shared__ uint32_t local[kLocal];
  __shared__ uint32_t found;
  follow();
  const Part part = find_part(table);
  const Row& row = part.row;
  State& state = row.slot->state;
  if (state.settled) return;
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
  grid_max(&state.not_above_bin, not_above);
  hand_over(row, local, min(found, uint32_t(kLocal)));
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
recount_kernel(const __grid_constant__ Chain table) {
  using F = Format<uint32_t>;
  alignas(16) __shared__ uint32_t words[1 << kMostShift];
  follow();
  const Part part = find_part(table);
  const Row& row = part.row;
  State& state = row.slot->state;
  SharedHist<false> hist{words};

  if (state.source == Source::nothing) return;
  const bool listing = state.source == Source::list;
  const uint32_t listed = state.listed;
  const uint32_t blocks =
      listing ? min(part.blocks, (listed + kThreads - 1) / kThreads) : part.blocks;
  if (part.block >= blocks) return;
  const uint32_t prefix = state.prefix, origin = state.origin, shift = state.shift;
  const uint32_t bins = 1u << shift;
  hist.zero(bins);
  __syncthreads();
  uint32_t not_above = 0;
  Runs<SharedHist<false>> runs(hist);
  const auto count_key = [&](uint32_t key) {
    const uint32_t above = (key - origin) >> shift;
    if (above == prefix) runs.add((key - origin) & (bins - 1));
    if (above > prefix) not_above = max(not_above, ~key);
  };
  if (state.settled) {
    const uint32_t step = blocks * kThreads;
#pragma unroll 1
    for (uint32_t i = part.block * kThreads + threadIdx.x; i < listed; i += 8 * step) {
      uint32_t keys[8];
#pragma unroll
      for (int u = 0; u < 8; ++u) keys[u] = i + u * step < listed ? row.list[i + u * step] : origin;
#pragma unroll
      for (int u = 0; u < 8; ++u)
        if (i + u * step < listed) count_key(keys[u]);
    }
  } else if (listing) {
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
  grid_max(&state.not_above, not_above);
  GlobalHist whole(row);
  whole.words += (1 << F::second) * (whole.wide ? 2 : 1);
  whole.add(hist, int(bins));
  if (!is_last_block(&state.arrived, blocks)) return;

  const uint32_t above = min(~state.not_above, ~state.not_above_bin);
  const Picked picked = pick(whole, int(bins), state.left);
  if (threadIdx.x == 0) {
    state.threshold = find_threshold(row, table.quantile, picked, origin + (prefix << shift), above);
    if (state.threshold >= ~state.not_above_bin) state.finish = Source::whole;
  }
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) finish_kernel(const __grid_constant__ Chain table) {
  wait_for_previous();
  const Part part = find_part(table);
  const Row& row = part.row;
  const State& state = row.slot->state;
  const uint32_t threshold = state.threshold, listed = state.listed;
  // From the end, which L2 may still hold from the pass before.
  if (state.finish == Source::whole)
#pragma unroll 1
    for (int64_t end = part.end; end > part.begin;) {
      const int64_t begin = part.begin + (end - 1 - part.begin) / kSpan<Bits> * kSpan<Bits>;
      clear_to<Bits>(row, begin, end, threshold);
      end = begin;
    }
  if (state.finish != Source::list) return;
  each_listed<Bits>(row, listed, part.block * kThreads + threadIdx.x, part.blocks * kThreads,
                    [&](uint32_t at, Bits bits) {
                      if (magnitude_key(bits) > threshold) return;
                      static_cast<Bits*>(row.data)[at] = 0;
                      clear_partner(row, at);
                    });
}

// The same for one huge tensor, from its end, with one strip per thread, so that what is in flight at a time is
// contiguous in memory. On an H200 an in-place pass over 2.4 GB runs at 4.21 TB/s this way, and at 3.9 with
// persistent blocks that go through many strips (2026-11-27). What precedes the loads adds to every block's time.
// So only few instructions do, and elements are loaded before it is known what to do with them.
template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksThatClear) clear_kernel(const __grid_constant__ Row row) {
  constexpr int kN = kPack<Bits>;
  wait_for_previous();
  const uint32_t strip = (gridDim.x - 1 - blockIdx.x) * kThreads + threadIdx.x;
  Bits* const data = static_cast<Bits*>(row.data) + int64_t(strip) * kN;
  const bool full = strip < uint32_t(row.size / kN);
  Strip<Bits> mine, other;
  {
    const PerhapsUnused loads;
    if (full) mine.load_once(data);
  }
  const State& state = row.slot->state;
  const uint32_t threshold = state.threshold;
  const Source source = kN == 8 ? Source::whole : state.finish;  // with 16 bits nothing is listed
  Bits* const partner = static_cast<Bits*>(row.partner) + int64_t(strip) * kN;
  const bool pair = row.partner_bytes == sizeof(Bits) && is_aligned16(row.partner);
  {
    const PerhapsUnused loads;
    if (full && pair) other.load(partner);
  }
  if (source == Source::whole) {
    if (full && (pair || row.partner_bytes == 0)) {
      const uint4 kept = mine.above(threshold);
      mine.keep(kept);
      mine.store_once(data);
      if (!pair) return;
      other.keep(kept);
      other.store_once(partner);
    } else if (int64_t(strip) * kN < row.size) {
      clear_some<Bits>(row, int64_t(strip) * kN, full ? kN : int(row.size % kN),
                           [=](const auto& strip, int64_t, int) { return not_above(strip, threshold); });
    }
    return;
  }
  static_assert(kRoomShare > kN, "a thread for every listed element");
  if (source != Source::list || strip >= state.listed) return;
  const uint32_t listed = row.list[strip];
  Bits* const there = static_cast<Bits*>(row.data) + listed;
  if (magnitude_key(*there) > threshold) return;
  *there = 0;
  clear_partner(row, listed);
}

}  // namespace
}  // namespace relora
