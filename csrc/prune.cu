// Prune a list of tensors in place: each to zero where |t| <= quantile(|t|, ratio), exactly
// (contract: relora_kernels/reference/prune.py), or at random, keyed by logical element.
//
// A radix selection on magnitude keys (numerics.cuh), a few launches for up to kChainRows tensors:
//
//   huge            zero       zero the histograms (a memset does that in the other chains)
//                   sample     2 MB of elements give a window of keys around the quantile
//                   window     count the keys below the window. 32-bit: list the keys in it; if these
//                              include both neighbours of the quantile, count and partition do
//                              nothing. 16-bit: count the keys in it, a bin per key, which gives
//                              the threshold                                           one read
//                   clear      instead of finish: zero what does not exceed the window's
//                              threshold                                       one read, one write
//   large, 32-bit   count      histogram of the keys' upper 13 bits; the last block to arrive picks
//                              the bin that holds the quantile's lower neighbour       one read
//                   partition  zero what is below the bin, list what is in it and count its next
//                              10 bits; the last block picks again             one read, one write
//                   recount    count the listed elements' last 8 bits: the threshold
//                   finish     zero the listed elements up to the threshold
//   large, 16-bit   count      histogram of all 15 bits of the keys: the threshold     one read
//                   finish     zero up to the threshold                        one read, one write
//   held, 32-bit    held       everything, in a cluster of 8 or 16 blocks with up to kMostShare
//                              elements each; from sm_90 on                    one read, one write
//   up to kSmall    small      everything, in one block, whose later reads come from L1 and L2
//
// Kernels: the chains' in prune_chain.cuh, held in prune_held.cuh, the others and all launches here.
// From sm_90 on the blocks of a launch take their places while the launch before it ends: see follow().
//
// If the bin holds more elements than the list has room for (ties, constant tensors), or if rounding lifts
// the threshold to an element above the bin, recount and finish go over the whole tensor. The device decides
// that; the launches are always the same. A NaN makes `partition`, `finish` or `clear` zero everything.
//
// Bytes read and written per element: 12 with 32 bits, 8 if held, 6 with 16 bits, plus 8 or 4 for the partner. From
// ratio 0.95 on the partner of a tensor held whole takes less: what keeps no element is not read. Without a window,
// listed elements are fetched twice more, by sectors of 32 bytes: for 10^8 elements that took 65 us of 412 on an H200
// (ncu, 2026-11-27). A window that fails (ties, few distinct values; with 16 bits a gap around the quantile) costs
// one read more. If the digits then end with a list, `clear` costs another one, because it loads elements before it
// knows whether they are needed.
//
// The list: 13 bits are 8 of exponent and 5 of mantissa, so the bin at x is at most x/32 wide and holds at
// most x p(x) / 32 of the elements. For a normal tensor x p(x) is largest at one standard deviation: 1.51 %,
// and 1.06 % at ratio 0.9. Room for 1/64 = 1.56 % of the elements suffices at any scale and ratio, and costs
// 1.56 % of the tensor's memory. A chain takes as many tensors as have room for lists and histograms (32 KB
// each, 128 KB with 16 bits) in 1.9 % of the memory pruned, partners not counted; the next chains reuse it. One
// tensor is always taken: its histogram may exceed that share, and its list gets what is left.
#include "prune_chain.cuh"
#include "prune_held.cuh"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>
#include <vector>

namespace relora {
namespace {

// ---- Kernels of one launch ------------------------------------------------------------------------

template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM) small_kernel(const __grid_constant__ Table table) {
  using F = Format<Bits>;
  constexpr int kKeyBits = 8 * int(sizeof(Bits)) - 1;
  __shared__ uint32_t extremes[2];  // greatest key, ~(least key above the prefix)
  SharedHist<F::packed> hist{counters(dynamic_shared)};
  const Part part = find_part(table);
  const Row& row = part.row;

  unsigned long long left = quantile_rank(row.size, table.quantile).low;
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
    if (holds_nan(DType(row.dtype), extremes[0])) break;  // in the first round; all threads agree
    const Picked picked = pick(hist, bins, left);
    prefix <<= bits;
    if (shift == 0) threshold = find_threshold(row, table.quantile, picked, prefix, ~extremes[1]);
    prefix |= picked.bin;
    left = picked.left;
    __syncthreads();  // all loads from what the next round overwrites come first, even those not used
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
        uint32_t drawn = words.w[i];  // by selects, because registers cannot be indexed at run time
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
  SharedHist<false> hist{counters(dynamic_shared)};
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
  greatest = __reduce_max_sync(kAllLanes, greatest);
  not_above = __reduce_max_sync(kAllLanes, not_above);
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

// Tensors of one element size that share a table. In the workspace a group's histograms come first, then its
// lists.
struct Group {
  Table table;
  int64_t hist_bytes = 0, bytes = 0;
};

struct Workspace {
  char* at;
  int64_t bytes;
};

struct Device {
  int slots;    // blocks that run at a time
  int cluster;  // most blocks of a cluster that holds a tensor; 0: there are no such clusters
};

enum class Which { small, held, large, huge, any };
template <typename Bits>
Which which(const PruneTensor& t, const Device& device) {
  if (t.size <= kSmall) return Which::small;
  if (!is_aligned16(t.data)) return Which::large;
  const bool pair = t.partner && bytes_of(t.partner_dtype) == 4 && is_aligned16(t.partner);
  if (sizeof(Bits) == 4 && t.size <= int64_t(device.cluster) * kMostShare && (pair || !t.partner))
    return Which::held;
  return t.size >= kSampledFrom && t.size < kWideFrom ? Which::huge : Which::large;
}

// Few, so that all multiprocessors have work and end together; many, so that a block's fixed cost (zeroing a
// histogram, adding it to the tensor's, waiting) is little beside its elements. That cost is about one span's
// time: to count 10^8 elements 4070 blocks of one span took 266 us, 255 of 16 take 113, on an H200 whose memory
// delivers them in 94 (ncu, 2026-11-27).
template <typename Bits>
int64_t spans_a_block(const Table& table, int slots) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t spans = 1; spans <= kMostSpans<Bits>; ++spans) {
    int64_t blocks = 0;
    for (uint32_t r = 0; r < table.count; ++r)
      blocks += ceil_div(table.rows[r].size, spans * kSpan<Bits>);
    const int64_t cost = (blocks + slots - 1) / slots * (spans + 1);
    if (cost < least) best = spans, least = cost;
  }
  return best;
}

// Gives each tensor its blocks, of `share` elements.
void lay_out(Table& table, int64_t share) {
  table.share = share;
  table.blocks = 0;
  for (uint32_t r = 0; r < table.count; ++r) {
    table.rows[r].first_block = table.blocks;
    table.blocks += uint32_t(ceil_div(table.rows[r].size, share));
  }
}

// The window's ends, as ranks in the sample.
template <typename Bits>
void find_ends(const Row& row, const Quantile& quantile, uint32_t ends[2]) {
  constexpr int kN = kPack<Bits>;
  const double last = double(kN * min(row.size / kN, int64_t(kSampleBlocks) * kThreads * kSampleStrips) - 1);
  const double below = double(quantile_rank(row.size, quantile).low) / double(row.size - 1);
  const double middle = below * last, margin = 6 * std::sqrt(below * (1 - below) * last) + 1;
  ends[0] = uint32_t(max(middle - margin, 0.));
  ends[1] = uint32_t(min(middle + margin, last));
}

// Gives each tensor its blocks of the pass that counts a window, by size. Together they are whole waves of `slots`
// but for rounding, and no block has more than kMostWindowSpans.
template <typename Bits>
void lay_out_waves(Chain& table, int slots) {
  constexpr int64_t kMost = kMostWindowSpans * kSpan<Bits>;
  int64_t least = 0, total = 0;
  for (uint32_t r = 0; r < table.count; ++r) {
    least += ceil_div(table.rows[r].size, kMost);
    total += table.rows[r].size;
  }
  const double blocks = double(ceil_div(least, slots) * slots);
  table.blocks = 0;
  for (uint32_t r = 0; r < table.count; ++r) {
    const int64_t size = table.rows[r].size, most = ceil_div(size, kSweep<Bits>);
    const int64_t part = int64_t(blocks * (double(size) / double(total)));
    table.rows[r].first_block = table.blocks;
    table.blocks += uint32_t(min(max(part, ceil_div(size, kMost)), most));
  }
}

// Whether follow() waits. That depends on what the kernels were compiled for, not on the device: code for sm_80
// may run on any later one. Such launches can be captured in a graph from CUDA 12.3 on, if the driver is as new.
template <typename Argument>
cudaError_t find_whether_they_follow(void (*kernel)(Argument), bool* follow) {
  cudaFuncAttributes attributes{};
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (!error) error = cudaFuncGetAttributes(&attributes, kernel);
  *follow = CUDART_VERSION >= 12030 && driver >= 12030 && attributes.ptxVersion >= 90;
  return error;
}

// How a kernel is launched. `follows`: it overlaps the launch before, of the same call, and waits for its end itself.
struct Shape {
  uint32_t blocks;
  int shared_bytes = 0;
  bool follows = false;
  int cluster = 1;
};

// A shape and a stream as `config`, which is valid as long as this object lives.
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
cudaError_t launch(void (*kernel)(Argument), const Argument& argument, const Shape& shape,
                   cudaStream_t stream) {
  if (shape.shared_bytes > 48 * 1024)
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       shape.shared_bytes))
      return error;
  const Launch with(shape, stream);
  return cudaLaunchKernelEx(&with.config, kernel, argument);
}

// Most blocks of a cluster that holds a tensor: the device must have room for it, and the code must be compiled for
// clusters.
cudaError_t find_cluster(int* cluster) {
  *cluster = 0;
  int device = 0, major = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error || major < 9) return error;
  error = cudaFuncGetAttributes(&attributes, held_kernel);
  if (error || attributes.ptxVersion < 90) return error;
  int most = 0;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error || most < kHeldShared) return error;
  const std::pair<cudaFuncAttribute, int> settings[] = {
      {cudaFuncAttributeNonPortableClusterSizeAllowed, 1},
      {cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared},
      {cudaFuncAttributeMaxDynamicSharedMemorySize, kHeldShared}};
  // A device that refuses a setting, or all cluster sizes, gets no clusters. The chains do not need them.
  for (const auto& [attribute, value] : settings)
    if (cudaFuncSetAttribute(held_kernel, attribute, value)) {
      cudaGetLastError();
      return cudaSuccess;
    }
  for (int blocks = kMostCluster; !*cluster && blocks >= kLeastCluster; blocks /= 2) {
    int at_a_time = 0;
    const Launch with({uint32_t(blocks), kHeldShared, false, blocks}, nullptr);
    if (cudaOccupancyMaxActiveClusters(&at_a_time, held_kernel, &with.config)) cudaGetLastError();
    else if (at_a_time) *cluster = blocks;
  }
  return cudaSuccess;
}

cudaError_t find_slots(int* slots) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *slots = kBlocksAnSM * multiprocessors;
  return error;
}

// Looks for clusters only if a tensor needs one: that takes some ten calls of the driver.
cudaError_t find_device(const PruneTensor* tensors, int64_t count, Device* device) {
  device->cluster = 0;
  const cudaError_t error = find_slots(&device->slots);
  const bool asks = std::any_of(tensors, tensors + count, [](const PruneTensor& t) {
    return bytes_of(t.dtype) == 4 && which<uint32_t>(t, {0, kMostCluster}) == Which::held;
  });
  return error || !asks ? error : find_cluster(&device->cluster);
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
                                                     : ceil_div(t.size, kSpan<Bits>);
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
      row.sampled = of == Which::huge && (sizeof(Bits) == 2 || room > 0);
      row.slot = reinterpret_cast<Slot*>(workspace + group.hist_bytes);
      blocks += its_blocks;
      group.hist_bytes += hist_bytes;
      group.bytes += its_bytes;
    }
    if (table.count == 0) {
      if (i < count) return cudaErrorInvalidConfiguration;  // one tensor of over 5 * 10^13 elements
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

// The launches for the tensors of `group`.
template <typename Bits, bool kHuge>
cudaError_t run_chain(const Group& group, const Device& device, const Workspace& workspace,
                      cudaStream_t stream) {
  constexpr int kShared = Format<Bits>::shared_bytes;
  if (group.bytes > workspace.bytes) return cudaErrorInvalidValue;
  Chain table{};
  std::copy_n(group.table.rows, group.table.count, table.rows);
  table.count = group.table.count;
  table.blocks = group.table.blocks;
  table.share = group.table.share;
  table.quantile = group.table.quantile;
  bool follow = false, follows = false;  // the first launch does not
  cudaError_t failed = cudaSuccess;
  if constexpr (kHuge) {
    const uint32_t fours = uint32_t(group.hist_bytes / 16);
    failed = launch(zero_kernel, Range{reinterpret_cast<uint4*>(workspace.at), fours},
                    {(fours + kThreads - 1) / kThreads}, stream);
  } else {
    failed = cudaMemsetAsync(workspace.at, 0, group.hist_bytes, stream);
  }
  if (!failed) failed = find_whether_they_follow(count_kernel<Bits>, &follow);
  if (kHuge && !failed) follows = follow;
  const auto run = [&](auto* kernel, const auto& argument, uint32_t blocks, int shared_bytes = 0) {
    if (!failed) failed = launch(kernel, argument, {blocks, shared_bytes, follows}, stream);
    follows = follow;
  };
  if constexpr (kHuge) {
    Sampling sampling{table, {}};
    for (uint32_t r = 0; r < table.count; ++r) find_ends<Bits>(table.rows[r], table.quantile, sampling.ends[r]);
    Chain waves = table;
    lay_out_waves<Bits>(waves, device.slots);
    run(sample_kernel<Bits>, sampling, table.count * kSampleBlocks, 4 << kSampleDigit);
    run(window_kernel<Bits>, waves, waves.blocks, 4 << kWindowDigit);
  }
  const uint32_t most = kHuge ? uint32_t(device.slots) : table.blocks;
  run(count_kernel<Bits>, table, min(table.blocks, most), kShared);
  if constexpr (sizeof(Bits) == 4) {
    run(partition_kernel, table, table.blocks);
    run(recount_kernel, table, table.blocks);
  }
  if constexpr (kHuge)
    for (uint32_t r = 0; r < table.count; ++r)
      run(clear_kernel<Bits>, table.rows[r], uint32_t(ceil_div(table.rows[r].size, kSweep<Bits, 1>)));
  else
    run(finish_kernel<Bits>, table, table.blocks);
  return failed;
}

// Puts larger tensors between the others: clusters with tensors of one size would load, count and clear in step, and
// leave memory idle in step. No large one is among the last, because multiprocessors would be idle beside it.
void mix_sizes(Table& table) {
  int64_t largest = 0;
  for (uint32_t r = 0; r < table.count; ++r) largest = max(largest, table.rows[r].size);
  std::vector<Row> large, others;
  std::partition_copy(table.rows, table.rows + table.count, std::back_inserter(large), std::back_inserter(others),
                      [=](const Row& row) { return row.size > largest / 2; });
  const size_t among = 7 * others.size() / 8;
  Row* to = table.rows;
  size_t next = 0;
  for (size_t i = 0; i < large.size(); ++i) {
    for (; next < i * among / large.size(); ++next) *to++ = others[next];
    *to++ = large[i];
  }
  std::copy(others.begin() + next, others.end(), to);
}

// Blocks per cluster for these tensors. The fewest, if such clusters can take them all, hold at least half of the
// elements in tensors that they hold whole, and there are more tensors than three rounds of large clusters take.
// Then more tensors are in progress at a time; small ones mostly wait for the cluster's other blocks.
int find_blocks(const Table& table, const Device& device) {
  int64_t largest = 0, all = 0, whole = 0;
  for (uint32_t r = 0; r < table.count; ++r) {
    const int64_t size = table.rows[r].size;
    largest = max(largest, size);
    all += size;
    if (size <= kLeastCluster * int64_t(kHeldShare)) whole += size;
  }
  const bool many = int64_t(table.count) * device.cluster > 3 * int64_t(device.slots);
  const bool fit = largest <= kLeastCluster * int64_t(kMostShare) && whole >= all / 2;
  return many && fit ? kLeastCluster : device.cluster;
}

cudaError_t run_held(Table& table, const Device& device, cudaStream_t stream) {
  const int blocks = find_blocks(table, device);
  mix_sizes(table);
  return launch(held_kernel, table, {table.count * uint32_t(blocks), kHeldShared, false, blocks}, stream);
}

template <typename Bits>
cudaError_t prune_sized(const PruneTensor* tensors, int64_t count, const Quantile& quantile, const Device& device,
                        const Workspace& workspace, cudaStream_t stream) {
  const auto each = [&](Which of, auto&& run) {
    return for_each_group<Bits>(tensors, count, of, device, workspace.at, [&](Group& group) {
      group.table.quantile = quantile;
      return run(group);
    });
  };
  cudaError_t error = each(Which::huge, [&](const Group& group) {
    return run_chain<Bits, true>(group, device, workspace, stream);
  });
  if constexpr (sizeof(Bits) == 4)
    if (!error)
      error = each(Which::held, [&](Group& group) { return run_held(group.table, device, stream); });
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

// One launch per group, for tensors of any size. `prepare` sets the kernel's arguments.
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
  cudaError_t error = find_slots(&device.slots);
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
  cudaError_t error = find_device(tensors, count, &device);
  for (const Which of : {Which::huge, Which::large}) {
    if (!error) error = for_each_group<uint32_t>(tensors, count, of, device, nullptr, measure);
    if (!error) error = for_each_group<uint16_t>(tensors, count, of, device, nullptr, measure);
  }
  return error;
}

cudaError_t prune(const PruneTensor* tensors, int64_t count, double ratio, int64_t float_ranks, void* workspace,
                  int64_t bytes, cudaStream_t stream) {
  const Quantile quantile{ratio, float_ranks};
  const Workspace space{static_cast<char*>(workspace), bytes};
  Device device{};
  cudaError_t error = find_device(tensors, count, &device);
  if (!error) error = prune_sized<uint32_t>(tensors, count, quantile, device, space, stream);
  if (!error) error = prune_sized<uint16_t>(tensors, count, quantile, device, space, stream);
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
