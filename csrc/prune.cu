// Prune a list of tensors in place: each to zero where |t| <= quantile(|t|, ratio), exactly
// (contract: relora_kernels/reference/prune.py), or at random, keyed by logical element.
//
// A radix selection on magnitude keys (numerics.cuh), a few launches for up to kChainRows tensors:
//
//   huge, 32-bit    zero       the histograms; in the other chains a memset does that
//                   sample     of 512 K elements: a window of keys about the quantile
//                   window     count what lies below it, list the keys in it: if it holds both of
//                              the quantile's neighbours, count and partition do nothing    one read
//                   clear      behind recount, in finish's place: zero what the window's threshold
//                              does not exceed                              one read, one write
//   large, 32-bit   count      histogram of the keys' upper 13 bits; the last block to arrive picks
//                              the bin that holds the quantile's lower neighbour       one read
//                   partition  zero what lies below the bin, list what lies in it and count its
//                              next 10 bits; the last block picks again        one read, one write
//                   recount    the listed elements' last 8 bits: the threshold
//                   finish     zero the listed elements up to the threshold
//   large, 16-bit   count      all 15 bits of the keys: the threshold itself           one read
//                   finish     zero up to the threshold                        one read, one write
//   held, 32-bit    held       all of it in a cluster of blocks, up to kMostShare elements each, from
//                              sm_90 on (prune_held.cuh)                                    one write
//   up to kSmall    small      all of it in one block, whose later reads come from L1 and L2
//
// From sm_90 on a launch's blocks take their places while the one before it ends: see follow().
//
// Where the bin holds more than the list has room for (ties, constant tensors), or where rounding
// lifts the threshold to an element above the bin, recount and finish go over the whole tensor: the
// device decides, every launch is the same. A NaN makes `partition`, `finish` or `clear` zero everything.
//
// Bytes an element: 12 in 32 bits, 8 where it is held, 6 in 16, and 8 or 4 for the partner; without a
// window listed elements are fetched again, twice, by sectors of 32 bytes: of 10^8 elements that took 65
// us of 412 on an H200 (ncu, 2026-11-27). A window that fails (ties, few distinct values) costs a read
// more, and where a list takes its place another by `clear`, which asks for elements before it knows.
//
// The list: 13 bits are 8 of exponent and 5 of mantissa, so the bin at x is at most x/32 wide and
// holds at most x p(x) / 32 of the elements: of a normal tensor, where x p(x) is largest at one
// standard deviation, 1.51 %, and 1.06 % at ratio 0.9. Room for 1/64 = 1.56 % holds that at any
// scale and ratio, and costs 1.56 % of the tensor's memory. A chain takes as many tensors as have room
// for lists and histograms (32 KB each, 128 KB in 16 bits) in 1.9 % of the memory pruned, partners not
// counted, and the next chains reuse it. One tensor is always taken: its histogram may be more than that
// share, and of the list it gets what is left.
#include "prune.cuh"
#include "prune_held.cuh"

#include <algorithm>
#include <cmath>
#include <utility>

namespace relora {
namespace {

// ---- Kernels ------------------------------------------------------------------------------------

struct Range {
  uint4* fours;
  uint32_t count;
};

struct Sampling {
  Chain table;
  uint32_t ends[kChainRows][2];  // ranks in the sample, which the window is to hold
};

// A chain's histograms, 16 bytes a thread: a memset's node lets no launch begin before it has ended.
__global__ void __launch_bounds__(kThreads, kBlocksThatClear) zero_kernel(const Range range) {
  let_next_in();
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i < range.count) range.fours[i] = {0, 0, 0, 0};
}

// kSampleBlocks for every tensor. The window: six standard deviations of the sample's quantile, and a
// fiftieth of a bin for keys that do not lie evenly in it. Neighbours may be alike; a window that is too
// narrow is found out.
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
sample_kernel(const __grid_constant__ Sampling sampling) {
  using F = Format<uint32_t>;
  constexpr int kShift = 31 - F::first, kN = kPack<uint32_t>, kEach = F::bins / kThreads;
  constexpr uint32_t kSlack = (1u << kShift) / 50;
  constexpr int64_t kMost = int64_t(kSampleBlocks) * kThreads * kSampleStrips;
  __shared__ uint32_t ends[2];  // keys
  SharedHist<false> hist{reinterpret_cast<uint32_t*>(dynamic_shared)};
  let_next_in();
  const Row& row = sampling.table.rows[blockIdx.x / kSampleBlocks];
  const uint32_t* const ranks = sampling.ends[blockIdx.x / kSampleBlocks];
  if (!row.sampled) return wait_for_previous();
  State& state = row.slot->state;
  const uint32_t* const data = static_cast<const uint32_t*>(row.data);
  const int64_t strips = row.size / kN, taken = min(strips, kMost);
  const uint32_t share = max(uint32_t(strips / kMost), 1u);

  Strip<uint32_t> sample[kSampleStrips];
  int64_t ids[kSampleStrips];
#pragma unroll
  for (int u = 0; u < kSampleStrips; ++u) {
    ids[u] = (int64_t(blockIdx.x % kSampleBlocks) * kSampleStrips + u) * kThreads + threadIdx.x;
    // Somewhere in its share of the tensor: columns of a matrix are not always the same ones.
    const uint32_t drawn = uint32_t(ids[u]) * 2654435761u >> 8;
    const int64_t first = strips < kMost ? ids[u] : ids[u] * strips / kMost;
    if (ids[u] < taken) sample[u].load(data + (first + drawn % share) * kN);
  }
  hist.zero(F::bins);
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kSampleStrips; ++u)
#pragma unroll
    for (int i = 0; i < kN; ++i)
      if (ids[u] < taken) hist.add(sample[u].key(i) >> kShift, 1);
  __syncthreads();
  wait_for_previous();
  GlobalHist whole(row, false);
  whole.add_dense(hist, F::bins);
  if (!is_last_block(&state.arrived, kSampleBlocks)) return;

  // Both ends at once, of bins in registers.
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
    if (left >= sum) continue;  // another thread's: where rank < before it is huge
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (here) continue;
      if (left < count[i]) here = count[i], bin = i;
      else left -= count[i];
    }
    // As if the bin's keys lay evenly in it.
    const float part = float(left + end) / float(here);
    ends[end] = ((threadIdx.x * kEach + bin) << kShift) + uint32_t(part * float(1 << kShift));
  }
#pragma unroll
  for (int i = 0; i < kEach / 4; ++i) bins[i] = {0, 0, 0, 0};
  __syncthreads();
  if (threadIdx.x) return;
  const uint32_t from = ends[0], to = ends[1];
  state.origin = ranks[0] ? max(from, kSlack) - kSlack : 0;
  state.width = to + kSlack - state.origin;
  // So that the histogram's bins cover it, and are four at least where recount counts keys.
  state.shift = max(32 - __clz(state.width - 1) - F::second, 2);
  // Too wide; zeros, of which the bin's keys are not spread; no neighbour above.
  const bool fails = state.shift > kMostShift || to <= 1u << kShift || sampling.table.ratio == 1;
  if (fails) state.width = 0;
}

__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
window_kernel(const __grid_constant__ Chain table) {
  constexpr int kBins = 1 << Format<uint32_t>::second;
  alignas(16) __shared__ uint32_t words[kBins];
  __shared__ uint32_t local[kLocal];
  __shared__ uint32_t found, below;
  let_next_in();
  const Part part = find_part(table);
  const Row& row = part.row;
  State& state = row.slot->state;
  if (!row.sampled) return wait_for_previous();
  SharedHist<false> hist{words};

  // The blocks side by side from the tensor's start to its end, which L2 then holds for the last pass: it
  // is to forget the rest. The first loads are under way while the sample is not yet.
  constexpr int kN = kPack<uint32_t>, kAhead = kThreads * kN;
  constexpr uint32_t kKeptSweeps = kKept / (4 * kSweep<uint32_t>);
  const uint32_t* const data = static_cast<const uint32_t*>(row.data);
  const uint32_t sweeps = uint32_t(row.size / kSweep<uint32_t>);
  const uint32_t* mine = data + int64_t(part.block) * kSweep<uint32_t> + threadIdx.x * kN;
  const int64_t step = int64_t(part.blocks) * kSweep<uint32_t>;
  Strip<uint32_t> strips[kUnroll];
  if (part.block < sweeps)
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) strips[u].load_once(mine + u * kAhead);
  hist.zero(kBins);
  if (threadIdx.x == 0) found = below = 0;
  __syncthreads();
  wait_for_previous();
  if (state.width == 0) return;
  const uint32_t origin = state.origin, width = state.width, shift = state.shift;
  uint32_t greatest = 0, mine_below = 0, wanted = width;
  const uint32_t one = 1 + threadIdx.z;  // or nvcc gathers the lanes of a warp first: few are here at a time
  const auto look_at = [&](const auto& strip, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < kPack<uint32_t>; ++i) {
      if (i >= count) continue;
      const uint32_t key = strip.key(i);
      greatest = max(greatest, key);
      mine_below += (key - origin) >> 31;  // both are of 31 bits
      if (key - origin >= wanted) continue;
      const uint32_t place = atomicAdd(&found, one);
      if (place < kLocal) local[place] = key;
      else wanted = 0;  // the window fails: equal elements need not all queue up
      hist.add((key - origin) >> shift, 1);
    }
  };
  const L2Policy once = leave_first(), kept = stay();
#pragma unroll 1
  for (uint32_t sweep = part.block; sweep < sweeps;) {
    sweep += part.blocks;
    mine += step;
    const L2Policy policy = sweep + kKeptSweeps < sweeps ? once : kept;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Strip<uint32_t> strip = strips[u];
      if (sweep < sweeps) strips[u].load(mine + u * kAhead, policy);
      look_at(strip, 0, kN);
    }
  }
  if (part.block == sweeps % part.blocks)  // whose turn the rest would be
#pragma unroll 1
    for (int64_t at = int64_t(sweeps) * kSweep<uint32_t> + threadIdx.x * kN; at < row.size; at += kAhead) {
      const int count = int(min(row.size - at, int64_t(kN)));
      strips[0].load_some(data + at, count);
      look_at(strips[0], at, count);
    }
  atomicAdd(&below, mine_below);
  grid_max(&state.greatest, greatest);
  if (threadIdx.x == 0) {
    atomicAdd(&state.below, (unsigned long long)below);
    if (found > kLocal) atomicMax(&state.overflowed, 1u);
  }
  GlobalHist whole(row, false);
  whole.add_dense(hist, kBins);
  hand_over(row, local, found > kLocal ? 0 : found);
  if (!is_last_block(&state.arrived, part.blocks)) return;

  const unsigned long long rank = quantile_rank(row.size, table.ratio).low, first = state.below;
  const bool all = holds_nan(DType(row.dtype), state.greatest);
  const bool holds = first <= rank && rank + 1 < first + state.listed && state.listed <= row.room &&
                     !state.overflowed;
  Picked picked{};
  if (holds) picked = pick(whole, kBins, rank - first);
  else whole.zero(kBins);
  __syncthreads();
  if (threadIdx.x) return;
  state.settled = all || holds;
  state.finish = Source::whole;
  state.source = all ? Source::nothing : Source::list;
  state.threshold = kDropAll;  // with a NaN; else recount's
  state.prefix = picked.bin;
  state.left = picked.left;
  if (!state.settled) state.listed = 0;
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
count_kernel(const __grid_constant__ Chain table) {
  using F = Format<Bits>;
  constexpr int kShift = 8 * int(sizeof(Bits)) - 1 - F::first;
  SharedHist<F::packed> hist{reinterpret_cast<uint32_t*>(dynamic_shared)};
  follow();
  const Part part = find_part(table);
  const Row& row = part.row;
  State& state = row.slot->state;
  if (state.settled) return;

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

  const Picked picked = pick(whole, F::bins, quantile_rank(row.size, table.ratio).low);
  if (threadIdx.x == 0) {
    const bool all = holds_nan(DType(row.dtype), state.greatest);
    if (kShift == 0) {
      state.threshold = all ? kDropAll : find_threshold(row, table.ratio, picked, 0, kAll);
      state.finish = Source::whole;
    } else {
      state.prefix = all ? uint32_t(F::bins) : picked.bin;  // all lie below: partition zeroes them
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
    state.threshold = find_threshold(row, table.ratio, picked, origin + (prefix << shift), above);
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
  // From the end, which L2 may still hold of the pass before.
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

// The same of one huge tensor, from its end: a strip a thread, so that what is under way at a time lies
// together in memory. An in-place pass of 2.4 GB runs so at 4.21 TB/s on an H200, and at 3.9 in blocks that
// stay and go through many (2026-11-27). What comes before the loads adds to every block's time: few
// instructions, and the elements are asked for before it is known what to do with them.
__global__ void __launch_bounds__(kThreads, kBlocksThatClear) clear_kernel(const __grid_constant__ Row row) {
  constexpr int kN = kPack<uint32_t>;
  wait_for_previous();
  const uint32_t strip = (gridDim.x - 1 - blockIdx.x) * kThreads + threadIdx.x;
  uint32_t* const data = static_cast<uint32_t*>(row.data) + int64_t(strip) * kN;
  const bool full = strip < uint32_t(row.size / kN);
  Strip<uint32_t> mine, other;
  if (full) mine.load_once(data);
  const State& state = row.slot->state;
  const uint32_t threshold = state.threshold;
  const Source source = state.finish;
  uint32_t* const partner = static_cast<uint32_t*>(row.partner) + int64_t(strip) * kN;
  const bool pair = row.partner_bytes == 4 && is_wide(row.partner);
  if (full && pair) other.load(partner);
  if (source == Source::whole) {
    if (full && (pair || row.partner_bytes == 0)) {
      const uint32_t mask = not_above(mine, threshold);
      mine.clear(mask);
      mine.store_once(data);
      if (!pair) return;
      other.clear(mask);
      other.store_once(partner);
    } else if (int64_t(strip) * kN < row.size) {
      clear_some<uint32_t>(row, int64_t(strip) * kN, full ? kN : int(row.size % kN),
                           [=](const auto& strip, int64_t, int) { return not_above(strip, threshold); });
    }
    return;
  }
  static_assert(kRoomShare > kN, "a thread for every listed element");
  if (source != Source::list || strip >= state.listed) return;
  const uint32_t listed = row.list[strip];
  uint32_t* const there = static_cast<uint32_t*>(row.data) + listed;
  if (magnitude_key(*there) > threshold) return;
  *there = 0;
  clear_partner(row, listed);
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) small_kernel(const __grid_constant__ Table table) {
  using F = Format<Bits>;
  constexpr int kKeyBits = 8 * int(sizeof(Bits)) - 1;
  __shared__ uint32_t extremes[2];  // greatest key, ~(least key above the prefix)
  SharedHist<F::packed> hist{reinterpret_cast<uint32_t*>(dynamic_shared)};
  const Part part = find_part(table);
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
    if (shift == 0) threshold = find_threshold(row, table.ratio, picked, prefix, ~extremes[1]);
    prefix |= picked.bin;
    left = picked.left;
    __syncthreads();  // what the next round begins with is read before it, by whatever loads
  }
  clear_to<Bits>(row, 0, row.size, threshold);
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) random_kernel(const __grid_constant__ Table table) {
  const Part part = find_part(table);
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
  const Part part = find_part(table);
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
int64_t blocks_of(int64_t size, int64_t share) { return (size + share - 1) / share; }

// Tensors of one element size, in groups of one table each; a group's histograms lie first in the
// workspace, its lists behind them.
struct Group {
  Table table;
  int64_t hist_bytes = 0, bytes = 0;
};

struct Device {
  int slots;    // blocks that are at work at a time
  int cluster;  // blocks of a cluster that holds a tensor; 0: none can
};

enum class Which { small, held, large, huge, any };
template <typename Bits>
Which which(const PruneTensor& t, const Device& device) {
  if (t.size <= kSmall) return Which::small;
  if (sizeof(Bits) != 4 || !is_wide(t.data)) return Which::large;
  const bool pair = t.partner && bytes_of(t.partner_dtype) == 4 && is_wide(t.partner);
  if (t.size <= int64_t(device.cluster) * kMostShare && (pair || !t.partner)) return Which::held;
  return t.size >= kSampledFrom && t.size < kWideFrom ? Which::huge : Which::large;
}

// Few, so that all multiprocessors have work and end together; many, so that what a block pays for
// itself (a histogram to zero, to add to the tensor's and to wait for) is little beside its elements.
// That is about one span's time: 4070 blocks of one span took 266 us to count 10^8 elements, 255 of 16
// take 113, on an H200 whose memory gives them in 94 (ncu, 2026-11-27).
template <typename Bits>
int64_t spans_a_block(const Table& table, int slots) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t spans = 1; spans <= kMostSpans<Bits>; ++spans) {
    int64_t blocks = 0;
    for (uint32_t r = 0; r < table.count; ++r)
      blocks += blocks_of(table.rows[r].size, spans * kSpan<Bits>);
    const int64_t cost = (blocks + slots - 1) / slots * (spans + 1);
    if (cost < least) best = spans, least = cost;
  }
  return best;
}

// Blocks of so many elements.
void lay_out(Table& table, int64_t share) {
  table.share = share;
  table.blocks = 0;
  for (uint32_t r = 0; r < table.count; ++r) {
    table.rows[r].first_block = table.blocks;
    table.blocks += uint32_t(blocks_of(table.rows[r].size, share));
  }
}

// Of the sample, for the window.
void find_ends(const Row& row, double ratio, uint32_t ends[2]) {
  constexpr int kN = kPack<uint32_t>;
  const double last = double(kN * min(row.size / kN, int64_t(kSampleBlocks) * kThreads * kSampleStrips) - 1);
  const double below = double(quantile_rank(row.size, ratio).low) / double(row.size - 1);
  const double middle = below * last, margin = 6 * std::sqrt(below * (1 - below) * last) + 1;
  ends[0] = uint32_t(max(middle - margin, 0.));
  ends[1] = uint32_t(min(middle + margin, last));
}

// Blocks of the pass that lists a window: in whole waves of `slots` but for what rounding leaves, and none of
// more than kMostSpans. Each tensor has its part of them.
void lay_out_waves(Chain& table, int slots) {
  constexpr int64_t kMost = kMostSpans<uint32_t> * kSpan<uint32_t>;
  int64_t least = 0, total = 0;
  for (uint32_t r = 0; r < table.count; ++r) {
    least += blocks_of(table.rows[r].size, kMost);
    total += table.rows[r].size;
  }
  const double blocks = double(blocks_of(least, slots) * slots);
  table.blocks = 0;
  for (uint32_t r = 0; r < table.count; ++r) {
    const int64_t size = table.rows[r].size, most = blocks_of(size, kSweep<uint32_t>);
    const int64_t part = int64_t(blocks * (double(size) / double(total)));
    table.rows[r].first_block = table.blocks;
    table.blocks += uint32_t(min(max(part, blocks_of(size, kMost)), most));
  }
}

// Whether follow() waits. What the kernels were compiled for decides, not the device: code for sm_80 may
// run on any later one. Such launches can be captured from CUDA 12.3 on.
template <typename Argument>
cudaError_t find_whether_they_follow(void (*kernel)(Argument), bool* follow) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *follow = CUDART_VERSION >= 12030 && attributes.ptxVersion >= 90;
  return error;
}

// How a kernel is launched. `follows`: another launch of this call, whose end it waits for by itself.
struct Shape {
  uint32_t blocks;
  int shared_bytes = 0;
  bool follows = false;
  int cluster = 1;
};

// What shape, stream and attributes make, for as long as this lives.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  Launch(const Shape& shape, cudaStream_t stream) {
    config.gridDim = dim3(shape.blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(shape.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (shape.follows) {
      cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = unsigned(shape.cluster);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
  }
  Launch(const Launch&) = delete;
};

template <typename Argument>
cudaError_t launch(void (*kernel)(Argument), const Argument& argument, const Shape& shape, cudaStream_t stream) {
  if (shape.shared_bytes > 48 * 1024)
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       shape.shared_bytes))
      return error;
  const Launch with(shape, stream);
  return cudaLaunchKernelEx(&with.config, kernel, argument);
}

// Blocks of a cluster that holds a tensor: as many as a device has room for, and code was compiled for.
cudaError_t find_cluster(int* cluster) {
  *cluster = 0;
  int device = 0, major = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error || major < 9) return error;
  error = cudaFuncGetAttributes(&attributes, held_kernel);
  if (error || attributes.ptxVersion < 90) return error;
  const std::pair<cudaFuncAttribute, int> settings[] = {
      {cudaFuncAttributeNonPortableClusterSizeAllowed, 1},
      {cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared},
      {cudaFuncAttributeMaxDynamicSharedMemorySize, kHeldShared}};
  int most = 0;
  if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (most < kHeldShared) return error;
  for (const auto& [attribute, value] : settings)
    if (!error) error = cudaFuncSetAttribute(held_kernel, attribute, value);
  for (int blocks = kMostCluster; !error && !*cluster && blocks >= kLeastCluster; blocks /= 2) {
    int at_a_time = 0;
    const Launch with({uint32_t(blocks), kHeldShared, false, blocks}, nullptr);
    error = cudaOccupancyMaxActiveClusters(&at_a_time, held_kernel, &with.config);
    if (at_a_time) *cluster = blocks;
  }
  return error;
}

cudaError_t find_device(Device* found) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  found->slots = kBlocksAnSM * multiprocessors;
  return error ? error : find_cluster(&found->cluster);
}

template <typename Bits, typename Run>
cudaError_t for_each_group(const PruneTensor* tensors, int64_t count, Which of, const Device& device,
                           char* workspace, Run&& run) {
  int64_t listed_bytes = 0;
  for (int64_t i = 0; i < count; ++i) listed_bytes += tensors[i].size * bytes_of(tensors[i].dtype);
  const bool large = of == Which::large || of == Which::huge;
  const int64_t most_bytes = listed_bytes / kMemoryShare;
  for (int64_t i = 0; i < count;) {
    Group group{};
    Table& table = group.table;
    int64_t blocks = 0;
    const uint32_t most_rows = large ? kChainRows : kRows;
    for (; i < count && table.count < most_rows; ++i) {
      const PruneTensor& t = tensors[i];
      if (bytes_of(t.dtype) != int(sizeof(Bits)) || t.size == 0) continue;
      if (of != Which::any && of != which<Bits>(t, device)) continue;
      const int64_t its_blocks = of == Which::small  ? 1
                                 : of == Which::held ? device.cluster
                                                     : blocks_of(t.size, kSpan<Bits>);
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
      row.sampled = room > 0 && of == Which::huge;
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
    if (of == Which::small) lay_out(table, kSmall);  // a block each
    else if (of != Which::held) lay_out(table, kSpan<Bits> * spans_a_block<Bits>(table, device.slots));
    if (const cudaError_t error = run(group)) return error;
  }
  return cudaSuccess;
}

// The launches for the tensors of `group`, of which `table` holds the rows.
template <typename Bits, bool kHuge>
cudaError_t run_chain(const Group& group, const Device& device, char* workspace, cudaStream_t stream) {
  constexpr int kShared = Format<Bits>::shared_bytes;
  Chain table{};
  std::copy_n(group.table.rows, group.table.count, table.rows);
  table.count = group.table.count;
  table.blocks = group.table.blocks;
  table.share = group.table.share;
  table.ratio = group.table.ratio;
  bool follow = false, follows = false;  // the first launch does not
  cudaError_t failed = cudaSuccess;
  if constexpr (kHuge) {
    const uint32_t fours = uint32_t(group.hist_bytes / 16);
    failed = launch(zero_kernel, Range{reinterpret_cast<uint4*>(workspace), fours},
                    {(fours + kThreads - 1) / kThreads}, stream);
  } else {
    failed = cudaMemsetAsync(workspace, 0, group.hist_bytes, stream);
  }
  if (!failed) failed = find_whether_they_follow(count_kernel<Bits>, &follow);
  if (kHuge && !failed) follows = follow;
  const auto run = [&](auto* kernel, const auto& argument, uint32_t blocks, int shared_bytes = 0) {
    if (!failed) failed = launch(kernel, argument, {blocks, shared_bytes, follows}, stream);
    follows = follow;
  };
  if constexpr (kHuge) {
    Sampling sampling{table, {}};
    for (uint32_t r = 0; r < table.count; ++r) find_ends(table.rows[r], table.ratio, sampling.ends[r]);
    Chain waves = table;
    lay_out_waves(waves, device.slots);
    run(sample_kernel, sampling, table.count * kSampleBlocks, kShared);
    run(window_kernel, waves, waves.blocks);
  }
  run(count_kernel<Bits>, table, table.blocks, kShared);
  if constexpr (sizeof(Bits) == 4) {
    run(partition_kernel, table, table.blocks);
    run(recount_kernel, table, table.blocks);
  }
  if constexpr (kHuge)
    for (uint32_t r = 0; r < table.count; ++r)
      run(clear_kernel, table.rows[r], uint32_t(blocks_of(table.rows[r].size, kSweep<Bits, 1>)));
  else
    run(finish_kernel<Bits>, table, table.blocks);
  return failed;
}

// By clusters: the larger ones first, so that all end together.
cudaError_t run_held(Table& table, int cluster, cudaStream_t stream) {
  int64_t largest = 0;
  for (uint32_t r = 0; r < table.count; ++r) largest = max(largest, table.rows[r].size);
  std::partition(table.rows, table.rows + table.count, [=](const Row& row) { return row.size > largest / 2; });
  return launch(held_kernel, table, {table.count * uint32_t(cluster), kHeldShared, false, cluster}, stream);
}

template <typename Bits>
cudaError_t prune_sized(const PruneTensor* tensors, int64_t count, double ratio, const Device& device,
                        char* workspace, cudaStream_t stream) {
  const auto each = [&](Which of, auto&& run) {
    return for_each_group<Bits>(tensors, count, of, device, workspace, [&](Group& group) {
      group.table.ratio = ratio;
      return run(group);
    });
  };
  cudaError_t error = cudaSuccess;
  if constexpr (sizeof(Bits) == 4) {
    error = each(Which::huge, [&](const Group& group) {
      return run_chain<Bits, true>(group, device, workspace, stream);
    });
    if (!error)
      error = each(Which::held, [&](Group& group) { return run_held(group.table, device.cluster, stream); });
  }
  if (!error)
    error = each(Which::large, [&](const Group& group) {
      return run_chain<Bits, false>(group, device, workspace, stream);
    });
  if (!error)
    error = each(Which::small, [&](const Group& group) {
      return launch(small_kernel<Bits>, group.table, {group.table.blocks, Format<Bits>::shared_bytes}, stream);
    });
  return error;
}

// One launch a group of all tensors, whatever their sizes; `prepare` sets the kernel's arguments.
template <typename Prepare>
cudaError_t for_all(const PruneTensor* tensors, int64_t count, void (*of_32)(Table),
                    void (*of_16)(Table), int shared_bytes, cudaStream_t stream, Prepare&& prepare) {
  const auto run = [&](void (*kernel)(Table)) {
    return [&, kernel](Group& group) {
      prepare(group.table);
      return launch(kernel, group.table, {group.table.blocks, shared_bytes}, stream);
    };
  };
  Device device{};
  cudaError_t error = find_device(&device);
  if (!error)
    error = for_each_group<uint32_t>(tensors, count, Which::any, device, nullptr, run(of_32));
  if (!error)
    error = for_each_group<uint16_t>(tensors, count, Which::any, device, nullptr, run(of_16));
  return error;
}

}  // namespace

cudaError_t prune_workspace(const PruneTensor* tensors, int64_t count, int64_t* bytes) {
  *bytes = 0;
  const auto measure = [&](const Group& group) {
    *bytes = max(*bytes, group.bytes);
    return cudaSuccess;
  };
  Device device{};
  cudaError_t error = find_device(&device);
  for (const Which of : {Which::huge, Which::large})
    if (!error) error = for_each_group<uint32_t>(tensors, count, of, device, nullptr, measure);
  if (!error) error = for_each_group<uint16_t>(tensors, count, Which::large, device, nullptr, measure);
  return error;
}

cudaError_t prune(const PruneTensor* tensors, int64_t count, double ratio, void* workspace,
                  cudaStream_t stream) {
  char* at = static_cast<char*>(workspace);
  Device device{};
  cudaError_t error = find_device(&device);
  if (!error) error = prune_sized<uint32_t>(tensors, count, ratio, device, at, stream);
  if (!error) error = prune_sized<uint16_t>(tensors, count, ratio, device, at, stream);
  return error;
}

cudaError_t prune_random(const PruneTensor* tensors, int64_t count, uint64_t threshold,
                         cudaStream_t stream) {
  return for_all(tensors, count, random_kernel<uint32_t>, random_kernel<uint16_t>, 0, stream,
                 [=](Table& table) { table.random_threshold = threshold; });
}

cudaError_t magnitude_counts(const PruneTensor* tensors, int64_t count, const int64_t* prefixes,
                             int shift, int bits, int64_t* counts, int64_t* lowest,
                             int64_t* highest, cudaStream_t stream) {
  if (shift < 0 || bits < 0 || bits > kCountBits || shift + bits > 31)
    return cudaErrorInvalidValue;
  return for_all(tensors, count, counts_kernel<uint32_t>, counts_kernel<uint16_t>,
                 max(4 << bits, 16), stream, [=](Table& table) {
                   table.prefixes = prefixes;
                   table.counts = counts;
                   table.lowest = lowest;
                   table.highest = highest;
                   table.shift = shift;
                   table.bits = bits;
                 });
}

}  // namespace relora
