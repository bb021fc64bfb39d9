// The two-segment product, out (M, N) = P (M, r) @ B + x (M, K) @ W: what can be decided without a
// GPU. Which block computes which tile, which k-step reads which operand where, the ring's stages
// and phases, the layout of shared memory, the contents of tensor maps and wgmma descriptors. Needs no
// CUDA header, so the tests compile it for the host; kernels and launchers use these same functions.
#pragma once

#include "numerics.cuh"

namespace relora::two_segment {

constexpr int kBlockM = 128;           // rows of a tile: 64 for each consumer warpgroup
constexpr int kBlockK = 64;  // k of a step: 128 bytes of a 16-bit operand, one swizzled row
constexpr int kSpan = 64;              // columns of a box of an operand that is not K-contiguous: likewise
constexpr int kRowBytes = 128;         // a row of either in shared memory
constexpr int kAtomBytes = 8 * kRowBytes;  // the swizzle repeats after eight rows
constexpr int kConsumers = 2;              // warpgroups
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kGroupRows = 8;  // tiles of rows that share a pass over W, so that L2 holds it
constexpr int kMostShared = 232448;  // bytes a block may use on sm_90

// setmaxnreg: the consumers take the registers that the producer gives up, out of 168 per thread at the
// launch. Without the exchange nvcc 13.0 spills a few in the masked 128 x 256 tile.
constexpr int kLaunchRegisters = 168, kProducerRegisters = 56, kConsumerRegisters = 224;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              (1 + kConsumers) * kLaunchRegisters);

// ---- Tiles -------------------------------------------------------------------------------------

// What a block does at a time: a tile, given by its first element, and the k-steps [from, to) of a slab.
struct Work { int row, col, slab, from, to; };

// A cluster of `cluster` blocks takes as many neighbouring tiles of rows in one tile of columns, so
// that one copy of W serves all of them. Unit u of the schedule belongs to cluster u mod the number of
// clusters. Units run down kGroupRows tiles of rows, then to the next columns, so that W and x both stay
// in L2. If the sum is cut into slabs of `slab_steps` k-steps, whole slabs come one after the other.
struct Schedule {
  int row_units, col_units, block_n, cluster, group, steps, slab_steps;

  RELORA_HD Schedule(int64_t m, int64_t n, int steps, int slab_steps, int block_n, int cluster)
      : row_units(int(ceil_div(m, int64_t(kBlockM) * cluster))),
        col_units(int(ceil_div(n, block_n))),
        block_n(block_n),
        cluster(cluster),
        group(kGroupRows / cluster),
        steps(steps),
        slab_steps(slab_steps) {}

  RELORA_HD int64_t tiles() const { return int64_t(row_units) * col_units; }
  RELORA_HD int64_t units() const { return tiles() * ((steps - 1) / slab_steps + 1); }

  // For the block with rank `rank` in its cluster. The last tile may lie entirely beyond M.
  RELORA_HD Work work(int unit, int rank) const {
    const int tiles = row_units * col_units, slab = unit / tiles, from = slab * slab_steps;
    const int tile = unit % tiles, band = group * col_units;
    const int first = tile / band * group, within = tile % band;
    const int height = row_units - first < group ? row_units - first : group;
    return {((first + within % height) * cluster + rank) * kBlockM, within / height * block_n, slab,
            from, steps - from < slab_steps ? steps : from + slab_steps};
  }
};

// Where to fetch a box that starts at `start`, a multiple of 64. No box may start outside its operand, or
// off a 16-byte boundary, where TMA fails with an illegal instruction. The contents of a box beyond the
// end only reach rows or columns that are never stored.
RELORA_HD constexpr int box_start(int start, int extent) {
  return start < extent ? start : (extent - 1) / 8 * 8;
}

// ---- k-steps -----------------------------------------------------------------------------------

struct Step { bool low; int k; };  // which segment, and the first k within it

// The low-rank segment first: in dx its sum is masked before anything is added to it.
struct Steps {
  int low, total, block_k;
  RELORA_HD Steps(int64_t r, int64_t k, int block_k = kBlockK)
      : low(int(ceil_div(r, block_k))), total(low + int(ceil_div(k, block_k))), block_k(block_k) {}
  RELORA_HD Step at(int step) const {
    return {step < low, (step < low ? step : step - low) * block_k};
  }
};

// ---- Pairs -------------------------------------------------------------------------------------

// x W (m, n) and x^T P (k, n) in one launch, slab by slab of x's rows: first the tiles of x W in a slab,
// then the sums over the slab. They are independent of each other.
//
// Q and dB of 16384 x 4096, r = 128, on an H200, estimated and not measured: with a launch each, dy's
// 134 MB come from HBM twice, 63 us at 4.3 TB/s. 34 GFLOP take 44 us. 32 KB per step of a 128 x 128 tile
// are 537 MB through L2, 70 us at some 7.5 TB/s, but 54 us if two blocks share a tile of W or P. So a
// pair in clusters of two may gain 16 us, 2 % of the backward; without clusters it gains nothing.
//
// A tile of x W takes all columns. With k / 64 steps for units of either kind, that is, slabs of k rows,
// 132 blocks go through 132 x 128 k bytes of dy, 69 MB, some by rows and others by columns. So on average
// a third of that lies between two reads of an element, in an L2 of 50 MB, or 25 if both of its halves
// hold a line. Smaller slabs change nothing. Two launches per slab of 16 MB would leave 16 tiles of Q for
// 132 blocks; cut over k, these would write and read float32 sums of half of dy's bytes.
struct Pair {
  Schedule across, down;  // of x W, of x^T P
  int per_slab;           // units of x W in a slab

  struct Unit { bool down; int unit; };

  // Slabs are whole units of x W: slab_steps is a multiple of kBlockM / kBlockK * cluster.
  RELORA_HD Pair(int64_t m, int64_t n, int64_t k, int slab_steps, int block_n, int cluster)
      : across(m, n, Steps(0, k).total, Steps(0, k).total, block_n, cluster),
        down(k, n, Steps(0, m).total, slab_steps, block_n, cluster),
        per_slab(int(across.tiles())) {
    const int rows = slab_steps / (kBlockM / kBlockK * cluster);  // of units
    if (rows < across.row_units) per_slab = rows * across.col_units;
  }

  RELORA_HD int64_t units() const { return across.units() + down.units(); }

  RELORA_HD Unit at(int unit) const {
    const int tiles = int(down.tiles()), slab = unit / (per_slab + tiles);
    const int within = unit % (per_slab + tiles), first = slab * per_slab;
    const int left = int(across.tiles()) - first, count = left < per_slab ? left : per_slab;
    return within < count ? Unit{false, first + within} : Unit{true, slab * tiles + within - count};
  }
};

// ---- The ring ----------------------------------------------------------------------------------

// A position in the ring. Consumers wait for the stage's "full" barrier to leave phase `phase`, the
// producer for its "empty" barrier to leave the phase before, which in the first round is already over.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  RELORA_HD void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// Bytes from the start of shared memory, which is a multiple of kAtomBytes.
template <int kBlockN, int kStages>
struct Layout {
  static constexpr int left_bytes = kBlockM * kRowBytes;
  static constexpr int right_bytes = kBlockN * kRowBytes;  // K- or N-contiguous: 64 x kBlockN x 2
  static constexpr int stage_bytes = left_bytes + right_bytes;
  static constexpr int buffer_bytes = kBlockM / kConsumers * kRowBytes;  // 64 x 64 of the output
  // As many output buffers per warpgroup as fit, up to the whole tile.
  static constexpr int room =
      (kMostShared - kStages * stage_bytes - 16 * kStages) / (kConsumers * buffer_bytes);
  static constexpr int buffers = room < kBlockN / kSpan ? room : kBlockN / kSpan;
  static constexpr int output = kStages * stage_bytes;
  static constexpr int full =
      output + kConsumers * buffers * buffer_bytes;  // barriers, 8 bytes each
  static constexpr int empty = full + 8 * kStages;
  static constexpr int bytes = empty + 8 * kStages;
  static_assert(buffers >= 1 && bytes <= kMostShared);
};

// 128-byte swizzle: the 16-byte chunk's number is xored with the row's number mod 8, that is, address
// bits 4-6 with bits 7-9. TMA writes and reads this layout, wgmma reads it, and the epilogue has to
// write it.
RELORA_HD constexpr int swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// ---- wgmma's descriptors of shared memory ------------------------------------------------------

// Start address, leading and stride byte offsets in units of 16 bytes; bits 62-63 = 1: 128-byte
// swizzle.
RELORA_HD constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading,
                                               uint32_t stride) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// K-contiguous: a row has 64 k, the stride leads to the next eight rows, the leading offset is unused,
// and 16 k further are 32 bytes. Otherwise blocks of 64 columns, 64 k high: the stride leads to the next
// eight k, the leading offset to the next block, and 16 k further are 16 rows.
template <bool kContiguousK>
RELORA_HD constexpr uint64_t operand_descriptor(uint32_t address, int k) {
  return !kContiguousK ? matrix_descriptor(address + k * kRowBytes, kBlockK * kRowBytes, kAtomBytes)
                       : matrix_descriptor(address + k * 2, 0, kAtomBytes);
}

// ---- Tensor maps -------------------------------------------------------------------------------

// cuTensorMapEncodeTiled's arguments for a matrix of 16-bit elements; dimension 0 is contiguous.
struct MapSpec {
  void* data;
  uint64_t extent[2];
  uint64_t pitch;  // bytes from row to row
  uint32_t box[2];
};

inline MapSpec map_spec(void* data, int64_t rows, int64_t cols, int64_t pitch, int box_rows) {
  return {data, {uint64_t(cols), uint64_t(rows)}, uint64_t(pitch) * 2, {kSpan, uint32_t(box_rows)}};
}

// TMA requires multiples of 16 bytes and at most 256 box rows. Null, empty and overlapping operands
// have no map either.
inline bool has_map(const MapSpec& s) {
  return s.data && reinterpret_cast<uintptr_t>(s.data) % 16 == 0 && s.pitch % 16 == 0 &&
         s.pitch >= 2 * s.extent[0] && s.pitch < uint64_t(1) << 40 && s.extent[0] >= 1 &&
         s.extent[1] >= 1 && s.extent[0] <= INT32_MAX && s.extent[1] <= INT32_MAX &&
         s.box[0] * 2 <= kRowBytes && s.box[1] >= 1 && s.box[1] <= 256;
}

}  // namespace relora::two_segment
