// merge.cu's kernel on Hopper: a bf16 W whose rows may start at any address, r <= 128, factors of any strides.
//
// One persistent block per SM, of three warpgroups. A unit of work is 512 columns of a layer and some
// steps of 64 rows; blocks take units from a common counter.
//
//   fill     one warpgroup. Each step: writes lora_B to shared memory, in 16 bits and in the order in which
//            wgmma takes it from registers
//   consume  two warpgroups, 256 columns each. Each unit: writes lora_A for these columns to shared memory.
//            Each step: takes lora_B into registers, multiplies by wgmma, and merges W: a warp's 16 rows
//            arrive by cp.async, chunks ahead and across units, gain their sums in shared memory and go back
//
// Global memory sees whole lines: a warp reads and writes 256 bytes of each of its rows at a time, two rows per
// instruction; straight from wgmma's registers it would be eight. Writing half lines costs a third of the rate.
// Keeping lora_A in shared memory for 512 columns and rereading lora_B takes half the L2 traffic of keeping 256
// rows of lora_B and rereading lora_A (figures: merge.cu).
//
// bf16 factors are used as they are. fp32 factors keep 11 bits: they become fp16, which has tf32's mantissa
// and twice its speed, scaled by a power of two per row of lora_B and per column of lora_A. Elements of at
// least 2^-28 of the largest in their row or column keep 11 bits; smaller ones have an error of up to 2^-39 of
// the largest (numerics.cuh). In rows of lora_B below 2^-81 products of small elements keep less, because float32's
// own range ends and a row's unit carries 1 / kShift.
//
// A row that is not 16-byte aligned lies in shared memory as it does in W, starting at the 16-byte boundary
// before its first element. So all accesses to W are of 16 bytes, except for up to seven elements at both ends
// of a chunk's 128 columns, and at the end of the matrix.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "merge.cuh"
#include "ptx.cuh"
#include "two_segment.h"

namespace relora {
namespace {

using two_segment::kRowBytes;
using two_segment::operand_descriptor;
using two_segment::Ring;
using two_segment::swizzled;

// Units undo the power-of-two scales. A sum of products is at most kMostRank * 2^30, and lora_B below 2^120
// (launch.h), so the sum times its row's unit may reach 2^142, which float32 does not hold. Therefore a row's
// unit is divided by kShift and a column's multiplied by it. The columns' units include the scaling as well: at
// most 2^105 * 2^15 * 2^7 = 2^127, which float32 holds; at least 2^-126 * 2^15 * 2^-16 = 2^-127, a subnormal
// that loses one bit at most.
constexpr float kShift = 0x1p15f;
constexpr float kLeastScaling = 0x1p-16f, kMostScaling = 0x1p7f;

// ---- What is done where -------------------------------------------------------------------------

constexpr int kStepRows = 64, kUnitCols = 512;
constexpr int kConsumers = 2, kOwnCols = kUnitCols / kConsumers;  // kOwnCols: of a consumer warpgroup
constexpr int kWarpRows = 16;                                     // of a warp in a step
constexpr int kPartCols = 64;                                     // of a wgmma
constexpr int kThreadsSm90 = 128 * (1 + kConsumers);
constexpr int kSpanR = 64;  // of r in a row of shared memory
constexpr int kChunkRows = kWarpRows / 2;  // of a chunk, which is copied as one
constexpr int kOddRows = 8;                // from one row of a chunk to the next, in units that are not whole
static_assert(kChunkRows * kOddRows == kStepRows);
constexpr int kMostPitch = 1 << 29;  // elements, so that bytes fit an int

// A layer's units. Those side by side come first, because they share lora_B, then those further down.
struct Cut {
  int blocks, steps;
  __host__ __device__ __forceinline__ explicit Cut(const MergeLayer& layer)
      : blocks(int(ceil_div(layer.k, kUnitCols))), steps(int(ceil_div(layer.n, kStepRows))) {}
};

// Rows of W or of the residual.
struct Sheet {
  bf16* at;
  int64_t pitch;
};

// A unit. W, the residual and lora_B start at its first row; lora_A is the whole layer's.
struct Unit {
  Sheet weight, residual;
  Matrix lora_A, lora_B;
  uint64_t seed;
  int64_t drawn_row;  // the first row's logical number, for the random bits
  int rows, below;    // rows: 0 if there is no unit; below: rows to the layer's end, 2^31 - 1 at most
  int col0, cols;     // cols: the layer's
  int r;
  float scaling;
  bool whole;  // every row of W, and of the residual, starts and ends at a multiple of 16 bytes

  __device__ __forceinline__ int steps() const { return int(uint32_t(rows + kStepRows - 1) / kStepRows); }
  // The row of a step that is a wgmma's row `m`. If the unit is not whole, a chunk's rows are kOddRows apart:
  // then all of them start at the same offset from a 16-byte boundary, whatever the pitch.
  __device__ __forceinline__ int row_of(int m) const {
    return whole ? m : m % kChunkRows * kOddRows + m / kChunkRows;
  }
};

// Elements from the last 16-byte boundary to an address.
__device__ __forceinline__ int offset_of(const bf16* at) {
  return int(reinterpret_cast<uintptr_t>(at) / 2 & 7);
}
__device__ __forceinline__ bool is_whole(const Sheet& m, int cols) {
  return ((offset_of(m.at) | int(m.pitch) | cols) & 7) == 0;
}

// Unit `number`; called by a whole warp. `from`: on entry a layer that begins at or before the unit, on return
// the unit's layer. Layers in the kernel's parameters are read from there directly, not through a pointer.
__device__ __forceinline__ Unit unit_of(const MergeTable& table, uint32_t number, int lane, int& from) {
  Unit unit{};
  if (number >= uint32_t(table.units)) return unit;
  int index = from - 1;
  for (int begun = 32; begun == 32;) {  // 32 layers at a time, one per lane, in order
    const int i = index + 1 + lane;
    bool begins = false;
    if (i < table.count)
      begins = (table.layers ? table.layers[i].first_block : table.first[i].first_block) <= number;
    begun = __popc(ptx::ballot(begins));
    index += begun;
  }
  from = index;
  const MergeLayer layer = table.layers ? table.layers[index] : table.first[index];
  const Cut cut(layer);
  const uint32_t within = number - layer.first_block, down = within / uint32_t(cut.blocks);
  const int64_t row0 = int64_t(down) * layer.unit_steps * kStepRows, below = layer.n - row0;
  const auto sheet = [row0](const Matrix& m) {
    return Sheet{static_cast<bf16*>(m.data) + row0 * m.row, m.row};
  };
  unit.weight = sheet(layer.weight), unit.residual = sheet(layer.residual);
  unit.lora_A = layer.lora_A, unit.lora_B = layer.lora_B;
  const int64_t bytes = row0 * layer.lora_B.row * (table.narrow_factors ? 2 : 4);
  unit.lora_B.data = static_cast<char*>(layer.lora_B.data) + bytes;
  unit.seed = layer.seed;
  unit.drawn_row = layer.first_row + row0;
  unit.rows = int(min(below, int64_t(layer.unit_steps) * kStepRows));
  unit.below = int(min(below, int64_t(INT32_MAX)));
  unit.col0 = int(within - down * uint32_t(cut.blocks)) * kUnitCols;
  unit.cols = int(layer.k);
  unit.r = int(layer.r);
  unit.scaling = layer.scaling;
  unit.whole = is_whole(unit.weight, unit.cols) && (table.rounding != Rounding::compensated ||
                                                    is_whole(unit.residual, unit.cols));
  return unit;
}

// ---- Shared memory ------------------------------------------------------------------------------

// A panel: kPartCols columns of lora_A, in wgmma's layout. A span: kSpanR of r of a panel.
constexpr int kPanels = kUnitCols / kPartCols;
constexpr int kPanelSpan = kPartCols * kRowBytes, kPanelBytes = 2 * kPanelSpan;
constexpr int kRowsAt = kPanels * kPanelBytes;
constexpr int kSlotAt = kRowsAt + kStepRows * kMostRank * 2;

// A chunk: what a warp copies at a time of W, and of the residual, into a slot of its own: half of its rows, and
// the columns of two products. It keeps memory's 128-byte lines whole, because asynchronous copies that split a
// line are slow. In odd rows the halves of each line are swapped, so that what eight lanes read together covers
// all banks. After the lines come 16 bytes per row, for the end of a row that is not 16-byte aligned.
constexpr int kChunkCols = 2 * kPartCols, kChunks = 2 * kOwnCols / kChunkCols;
constexpr int kRowStrips = kChunkCols / kStrip;  // strips of a row, and lanes that copy it
constexpr int kRowsAtOnce = 32 / kRowStrips;
constexpr int kPitch = 2 * kChunkCols, kChunkBytes = kChunkRows * (kPitch + 16);
constexpr int kSlotsBytes = 4 * kConsumers * kChunks * kChunkBytes;

// Where a row's strip is in a slot. Strip kRowStrips is the one after the lines.
__device__ __forceinline__ uint32_t place_of(int row, int strip) {
  return strip < kRowStrips ? row * kPitch + (strip ^ row % 2 * 4) * 16 : kChunkRows * kPitch + row * 16;
}

constexpr int kColUnitsAt = kSlotAt + kSlotsBytes;
constexpr int kLargestAt = kColUnitsAt + 4 * kUnitCols;  // a column's largest element, for each half of r
constexpr int kRowUnitsAt = kLargestAt + 4 * kConsumers * 2 * kPartCols;
constexpr int kUnitsAt = kRowUnitsAt + 4 * kStepRows, kUnits = 4;
constexpr int kBarriersAt = kUnitsAt + kUnits * int(sizeof(Unit));
constexpr int kSharedSm90 = kBarriersAt + 16;
static_assert(kSlotAt % 128 == 0 && kChunkBytes % 128 == 0);
static_assert(kBarriersAt % 8 == 0 && kSharedSm90 <= two_segment::kMostShared);

// Every thread arrives, not one per warp: compute-sanitizer's racecheck derives no other ordering from these
// barriers.
__device__ __forceinline__ uint32_t rows_full(uint32_t memory) { return memory + kBarriersAt; }
__device__ __forceinline__ uint32_t rows_empty(uint32_t memory) { return memory + kBarriersAt + 8; }

// The block's unit `i`, counted from 0. `fill` stores it before the first rows of unit i - 1. By then no thread
// is at unit i - 4 any more, whose place it takes.
__device__ __forceinline__ Unit& unit_at(uint32_t memory, uint32_t i) {
  return *ptx::shared_pointer<Unit>(memory + kUnitsAt + i % kUnits * uint32_t(sizeof(Unit)));
}

// Where 16 of r of a step's lora_B are: 16 bytes per thread, in the order in which wgmma takes them from registers.
constexpr int kOf16 = kStepRows * 16 * 2, kSixteens = kMostRank / 16;
__device__ __forceinline__ uint32_t rows_at(uint32_t memory, int sixteen) {
  return memory + kRowsAt + sixteen * kOf16;
}

// The column that a wgmma's column n stands for, permuted within 32. A lane's columns, 2 t and 2 t + 1 of each
// eight, thereby become eight neighbours.
__device__ __forceinline__ int column_of(int n) {
  return n / 32 * 32 + n / 2 % 4 * 8 + n / 8 % 4 * 2 + n % 2;
}

template <typename F>
using HalfOf = std::conditional_t<sizeof(F) == 4, fp16, bf16>;

// Two elements as 16-bit halves of a word. `scale` is for fp32 factors.
__device__ __forceinline__ uint32_t halves(float first, float second, float scale) {
  return pair_nearest<fp16>({scale * first, scale * second}).bits;
}
__device__ __forceinline__ uint32_t halves(bf16 first, bf16 second, float) {
  return first.bits | uint32_t(second.bits) << 16;
}
__device__ __forceinline__ float magnitude(float v) { return fabsf(v); }
__device__ __forceinline__ float magnitude(bf16) { return 0.f; }

// ---- fill ---------------------------------------------------------------------------------------

// A step's lora_B, in flight. Eight lanes share a row. A warp has 16 rows: those that the same warp of each
// consumer warpgroup multiplies.
template <typename F>
struct Rows {
  F v[4][kSixteens][2];

  __device__ __forceinline__ static int row_of(int i, int thread) {
    return thread / 32 * 16 + i / 2 * 4 + i % 2 * 8 + thread % 32 / 8;
  }

  // Without branches, so that all loads are in flight together. Loads pairs if lora_B's layout allows it.
  __device__ __forceinline__ void load(const Unit& unit, int step, int thread) {
    const Matrix& m = unit.lora_B;
    const int first = thread % 8 * 2;
    const bool pairs = m.col == 1 && ((m.row | unit.r) & 1) == 0 &&
                       reinterpret_cast<uintptr_t>(m.data) % (2 * sizeof(F)) == 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = step * kStepRows + unit.row_of(row_of(i, thread));
      const int count = row < unit.rows ? unit.r - first : 0;
      const F* at = global_memory<const F>(m.data) + row * m.row + first * m.col;
      if (pairs) {
#pragma unroll
        for (int j = 0; j < kSixteens; ++j) load_pair(at + 16 * j, 16 * j < count, v[i][j]);
      } else {
#pragma unroll
        for (int j = 0; j < 2 * kSixteens; ++j, at += j % 2 ? m.col : 15 * m.col)
          v[i][j / 2][j % 2] = j / 2 * 16 + j % 2 < count ? *at : F{};
      }
    }
  }
  __device__ __forceinline__ static void load_pair(const F* at, bool there, F (&pair)[2]) {
    using Pair = std::conditional_t<sizeof(F) == 4, uint2, uint32_t>;
    Pair bits{};
    if (there)
      bits = *static_cast<const Pair*>(
          __builtin_assume_aligned(global_memory<const Pair>(const_cast<F*>(at)), sizeof(Pair)));
    memcpy(pair, &bits, sizeof pair);
  }

  // Writes the rows to shared memory, with their units if the factors are fp32.
  __device__ __forceinline__ void store(uint32_t memory, int thread) const {
    constexpr bool kScaled = sizeof(F) == 4;
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // two rows, 8 apart, which one thread multiplies
      const int row = row_of(i, thread);
      float scales[2] = {1.f, 1.f};
      if (kScaled)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float largest = 0.f;
#pragma unroll
          for (int j = 0; j < 2 * kSixteens; ++j)
            largest = fmaxf(largest, magnitude(v[i + u][j / 2][j % 2]));
#pragma unroll
          for (int by = 1; by < 8; by *= 2)
            largest = fmaxf(largest, bits_float(ptx::shuffle(float_bits(largest), lane ^ by)));
          scales[u] = half_scale(largest);
          if (lane % 8 == 0)
            ptx::store_shared_32(memory + kRowUnitsAt + 4 * (row + 8 * u),
                                 float_bits(half_unit(scales[u]) * (1 / kShift)));
        }
      const int of = thread / 32 * 32 + row % 8 * 4 + lane % 4;  // the thread that multiplies them
#pragma unroll
      for (int j = 0; j < kSixteens; ++j)
        ptx::store_shared_64(rows_at(memory, j) + of * 16 + lane % 8 / 4 * 8,
                             {halves(v[i][j][0], v[i][j][1], scales[0]),
                              halves(v[i + 1][j][0], v[i + 1][j][1], scales[1])});
    }
  }
};

// A step's rows are in flight while the consumers work on the step before. A unit is known before the unit before
// it begins.
template <typename F>
__device__ __forceinline__ void fill(const MergeTable& table, uint32_t memory, int thread) {
  const int lane = thread % 32;
  int layer = 0;
  Ring<1> ring;
  for (uint32_t i = 0;; ++i) {
    if (thread < 32) {
      uint32_t number = i == 0 ? blockIdx.x : uint32_t(table.units);
      if (lane == 0 && i > 0 && table.units > int(gridDim.x))
        number = gridDim.x + atomicAdd(table.taken, 1u);
      const Unit next = unit_of(table, ptx::shuffle(number, 0), lane, layer);
      if (lane == 0) unit_at(memory, i) = next;
    }
    if (i == 0) {
      __syncthreads();
      continue;
    }
    const Unit unit = unit_at(memory, i - 1);
    if (unit.rows == 0) break;
#pragma unroll 1
    for (int step = 0; step < unit.steps(); ++step) {
      Rows<F> rows;
      rows.load(unit, step, thread);
      ptx::wait(rows_empty(memory), ring.phase ^ 1);
      rows.store(memory, thread);
      ptx::arrive(rows_full(memory));
      ring.advance();
    }
    ptx::named_barrier(1, 128);  // the next unit has been stored
  }
}

// ---- consume: lora_A ----------------------------------------------------------------------------

// Writes a panel to shared memory; called by a warpgroup. A thread has a column and half of r. Without branches,
// as in Rows::load.
template <typename F>
__device__ __forceinline__ void fill_panel(const Unit& unit, uint32_t memory, int warpgroup, int panel,
                                           int thread) {
  constexpr bool kScaled = sizeof(F) == 4;
  const Matrix& m = unit.lora_A;
  const int n = thread % kPartCols, half = thread / kPartCols;
  const int own = panel * kPartCols + column_of(n), col = unit.col0 + own;
  const int rows = unit.r - half * kSpanR;
  const bool inside = col < unit.cols;
  F v[kSpanR];
  const F* at = ptx::further(global_memory<const F>(m.data),
                             inside && rows > 0 ? half * kSpanR * m.row + col * m.col : int64_t(0));
#pragma unroll
  for (int i = 0; i < kSpanR; ++i, at = ptx::further(at, m.row)) v[i] = inside && i < rows ? *at : F{};
  float scale = 1.f;
  if (kScaled) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kSpanR; ++i) largest = fmaxf(largest, magnitude(v[i]));
    const uint32_t both = memory + kLargestAt + 4 * (warpgroup * 2 * kPartCols + n);
    ptx::store_shared_32(both + 4 * half * kPartCols, float_bits(largest));
    ptx::named_barrier(2 + warpgroup, 128);
    scale = half_scale(fmaxf(bits_float(ptx::load_shared_32(both)),
                             bits_float(ptx::load_shared_32(both + 4 * kPartCols))));
    ptx::named_barrier(2 + warpgroup, 128);
    if (half == 0)
      ptx::store_shared_32(memory + kColUnitsAt + 4 * own,
                           float_bits(half_unit(scale) * kShift * unit.scaling));
  }
  const uint32_t to = memory + panel * kPanelBytes + half * kPanelSpan;
#pragma unroll
  for (int chunk = 0; chunk < 8; ++chunk) {
    const F* const eight = v + 8 * chunk;
    ptx::store_shared_128(
        to + swizzled(n, chunk),
        {halves(eight[0], eight[1], scale), halves(eight[2], eight[3], scale),
         halves(eight[4], eight[5], scale), halves(eight[6], eight[7], scale)});
  }
}

// Writes a warpgroup's panels, once all its warps are done with the last unit's.
template <typename F>
__device__ __forceinline__ void fill_panels(const Unit& unit, uint32_t memory, int warpgroup,
                                            int warp) {
  const int thread = warp * 32 + lane_id();
  ptx::named_barrier(2 + warpgroup, 128);
#pragma unroll 1
  for (int i = 0; i < kPanels / kConsumers; ++i)
    fill_panel<F>(unit, memory, warpgroup, warpgroup * (kPanels / kConsumers) + i, thread);
  ptx::fence_async_shared();
  ptx::named_barrier(2 + warpgroup, 128);
}

// ---- consume: W, and the residual, to and from shared memory ------------------------------------

// Shifts two adjacent strips: `strips` gets their eight elements from the `by`-th on, by <= 8. `by` is the same
// for all of a warp, so a branch is cheaper than selects.
template <int kWords, int kCount>
__device__ __forceinline__ void turn_words(uint4 (&strips)[kCount], uint4 (&right)[kCount], int bits) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const auto either = [&](int i) { return i < 4 ? word(strips[n], i) : word(right[n], i % 4); };
    strips[n] = {ptx::funnel(either(kWords), either(kWords + 1), bits),
                 ptx::funnel(either(kWords + 1), either(kWords + 2), bits),
                 ptx::funnel(either(kWords + 2), either(kWords + 3), bits),
                 ptx::funnel(either(kWords + 3), either(kWords + 4), bits)};
  }
}
template <int kCount>
__device__ __forceinline__ void turn(uint4 (&strips)[kCount], uint4 (&right)[kCount], int by) {
  const int bits = by % 2 * 16;
  switch (by / 2) {
    case 0: return turn_words<0>(strips, right, bits);
    case 1: return turn_words<1>(strips, right, bits);
    case 2: return turn_words<2>(strips, right, bits);
    case 3: return turn_words<3>(strips, right, bits);
    default:
#pragma unroll
      for (int n = 0; n < kCount; ++n) strips[n] = right[n];
  }
}

__device__ __forceinline__ void store_16(bf16* to, uint4 v) {
  *static_cast<uint4*>(__builtin_assume_aligned(global_memory<bf16>(to), 16)) = v;
}

// A lane's strips of a unit, step by step: kCount of each chunk, kRowsAtOnce of the chunk's rows apart. In memory
// strips start at 16-byte boundaries. If a chunk's row starts `before` > 0 elements after a boundary, it has one
// strip more, which the row's last lane copies.
template <bool kCompensated>
struct Strips {
  static constexpr int kSheets = kCompensated ? 2 : 1, kCount = kChunkRows / kRowsAtOnce;
  static constexpr int kApart = kOddRows * kRowsAtOnce;  // rows between two strips, if the unit is not whole
  const Unit& unit;
  char* at[kSheets];  // the lane's first elements in the step
  int rows, cols;     // from there to the end; may be 0 or less
  const bool whole;

  __device__ __forceinline__ Strips(const Unit& unit, int warpgroup, int warp, int lane)
      : unit(unit), whole(unit.whole) {
    const int row = unit.row_of(warp * kWarpRows + lane / kRowStrips);
    const int col = unit.col0 + warpgroup * kOwnCols + lane % kRowStrips * kStrip;
#pragma unroll
    for (int i = 0; i < kSheets; ++i)
      at[i] = ptx::rows_further(reinterpret_cast<char*>(sheet(i).at + col), row, pitch(i));
    rows = unit.rows - row, cols = unit.cols - col;
  }
  __device__ __forceinline__ const Sheet& sheet(int i) const { return i ? unit.residual : unit.weight; }
  __device__ __forceinline__ int pitch(int i) const { return 2 * int(sheet(i).pitch); }  // bytes
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int of = 0; of < kSheets; ++of) at[of] = ptx::rows_further(at[of], kStepRows, pitch(of));
    rows -= kStepRows;
  }

  // From a lane's first strip to its i-th in a slot. Their rows are both even or both odd.
  __device__ __forceinline__ static constexpr uint32_t further(int i) {
    return i * kRowsAtOnce * kPitch;
  }

  // visit(number of the strip, its address, whether it is inside) for the lane's strips of `chunk`, `further`
  // rows on. For whole units.
  template <typename Visit>
  __device__ __forceinline__ void each(int of, int chunk, int further, Visit&& visit) const {
    const bool inside = chunk / 2 * kChunkCols < cols;
    const int row = further + chunk % 2 * kChunkRows;
    const int by = pitch(of);  // loaded once: to the compiler, a copy may overwrite what this is loaded from
    char* to = ptx::rows_further(at[of] + chunk / 2 * kPitch, row, by);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      visit(i, global_memory<bf16>(to), inside && row + i * kRowsAtOnce < rows);
      to = ptx::rows_further(to, kRowsAtOnce, by);
    }
  }
  // The lane's first elements of a chunk. For units that are not whole.
  __device__ __forceinline__ char* odd(int of, int chunk, int further) const {
    return ptx::rows_further(at[of] + chunk / 2 * kPitch, further + chunk % 2, pitch(of));
  }
  __device__ __forceinline__ int before(int of, int chunk) const {
    return offset_of(reinterpret_cast<const bf16*>(odd(of, chunk, 0)));
  }

  // Copies `chunk` of the step that is `further` rows on into `slot`, asynchronously.
  __device__ __forceinline__ void copy(int chunk, int further, uint32_t slot, int lane) const {
#pragma unroll
    for (int of = 0; of < kSheets; ++of, slot += kChunkBytes) {
      const uint32_t place = slot + place_of(lane / kRowStrips, lane % kRowStrips);
      if (whole)
        each(of, chunk, further, [&](int i, const bf16* from, bool there) {
          ptx::copy_16<true>(place + Strips::further(i), from, there ? 16 : 0);
        });
      else
        copy_odd(of, chunk, further, place, slot + place_of(lane / kRowStrips, kRowStrips), lane % kRowStrips);
    }
    ptx::copy_commit();
  }
  // Copies whole 16-byte strips, including what surrounds a row in memory up to the next boundaries.
  __device__ __forceinline__ void copy_odd(int of, int chunk, int further, uint32_t place, uint32_t behind,
                                           int strip) const {
    char* from = odd(of, chunk, further);
    const int before = offset_of(reinterpret_cast<const bf16*>(from));
    const int there = rows - further - chunk % 2, left = cols - chunk / 2 * kChunkCols;
    const bool last = strip == kRowStrips - 1 && before > 0;
    const int by = pitch(of);
    // Rows where two strips may reach beyond the matrix are copied by elements: the last row, or more if rows are
    // short. No zeros are copied to these places asynchronously, because they might arrive after the elements.
    const int ends = 2 * kStrip <= left + before ? 0 : by < 2 * 2 * kStrip ? 2 * kStrip : 1;
    const int safe = min(there, unit.below - unit.rows + there - ends);
    const int own = 0 < left + before ? safe : 0, more = last && kStrip < left + before ? safe : 0;
    from -= 2 * before;
    char* next = from;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i * kApart < own) ptx::copy_16<true>(place + Strips::further(i), next, 16);
      if (i * kApart < more) ptx::copy_16<true>(behind + i * kRowsAtOnce * 16, next + 16, 16);
      next = ptx::rows_further(next, kApart, by);
    }
    if (safe == there) return;
#pragma unroll 1
    for (int i = (max(safe, 0) + kApart - 1) / kApart; i < kCount && i * kApart < there; ++i) {
      const bf16* const row = global_memory<bf16>(ptx::rows_further(from, i * kApart, by));
#pragma unroll 1
      for (int e = 0; e < min(last ? kStrip + before : kStrip, left + before); ++e)
        ptx::store_shared_16(e < kStrip ? place + Strips::further(i) + 2 * e
                                        : behind + i * kRowsAtOnce * 16 + 2 * (e - kStrip),
                             row[e].bits);
    }
  }

  // Writes a chunk of the step from `slot` to memory. In the slot rows now start with their first elements. In a
  // whole unit a lane reads only what it copied itself, so it may copy over it next; otherwise this returns when
  // all lanes have read.
  __device__ __forceinline__ void store(int chunk, uint32_t slot, int lane) const {
    const int row = lane / kRowStrips, strip = lane % kRowStrips;
#pragma unroll
    for (int of = 0; of < kSheets; ++of, slot += kChunkBytes) {
      const uint32_t place = slot + place_of(row, strip);
      if (whole) {
        uint4 strips[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) strips[i] = ptx::load_shared_128(place + further(i));
        each(of, chunk, 0, [&](int i, bf16* to, bool there) {
          if (there) store_16(to, strips[i]);
        });
      } else {
        store_odd(of, chunk, slot + place_of(row, max(strip - 1, 0)), place, strip);
        store_ends(of, chunk, slot, lane);
      }
    }
    if (!whole) ptx::sync_warp();
  }
  __device__ __forceinline__ void store_odd(int of, int chunk, uint32_t left_place, uint32_t place,
                                            int strip) const {
    char* to = odd(of, chunk, 0);
    const int before = offset_of(reinterpret_cast<const bf16*>(to)), left = cols - chunk / 2 * kChunkCols;
    const int there = (strip > 0 || before == 0) && kStrip <= left + before ? rows - chunk % 2 : 0;
    to -= 2 * before;
#pragma unroll
    for (int first = 0; first < kCount; first += 2) {  // the registers hold both sides of two strips
      uint4 strips[2], right[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        strips[i] = ptx::load_shared_128(left_place + further(first + i));
        right[i] = ptx::load_shared_128(place + further(first + i));
      }
      turn(strips, right, kStrip - before);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((first + i) * kApart < there) store_16(reinterpret_cast<bf16*>(to), strips[i]);
        to = ptx::rows_further(to, kApart, pitch(of));
      }
    }
  }
  // Writes a row's first elements up to a 16-byte boundary, and its last ones from one on; four lanes per row.
  __device__ __forceinline__ void store_ends(int of, int chunk, uint32_t slot, int lane) const {
    const int strip = lane % kRowStrips, row = lane / 4;
    const int down = (row - lane / kRowStrips) * kOddRows;
    const int left = min(cols + strip * kStrip - chunk / 2 * kChunkCols, kChunkCols);
    if (rows - chunk % 2 <= down || left <= 0) return;
    const int begin = min(-before(of, chunk) & (kStrip - 1), left), ends = begin + (left - begin) % kStrip;
    bf16* const to = global_memory<bf16>(
        ptx::rows_further(odd(of, chunk, 0) - strip * 2 * kStrip, down, pitch(of)));
    const auto col_of = [&](int i) { return uint32_t(i < begin ? i : left - ends + i); };
    const auto load = [&](uint32_t col) {
      return ptx::load_shared_16(slot + place_of(row, int(col / kStrip)) + col % kStrip * 2);
    };
#pragma unroll 1
    for (int i = lane % 4; i < ends; i += 8) {  // a full chunk has eight, two per lane, loaded together
      const uint32_t col = col_of(i), other = col_of(min(i + 4, ends - 1));
      const uint16_t bits = load(col), bits_other = load(other);
      to[col].bits = bits;
      if (i + 4 < ends) to[other].bits = bits_other;
    }
  }
};

// ---- consume: the sums --------------------------------------------------------------------------

constexpr int kSums = kPartCols / 2;

// sums (kStepRows, kPartCols) = lora_B's rows @ a panel.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[kSums], const uint32_t (&left)[kSixteens][4],
                                         uint32_t panel) {
  constexpr uint64_t kConstant = operand_descriptor<true>(0, 0);
  // In units of 16 bytes, so offsets can be added.
  const uint32_t first = uint32_t(operand_descriptor<true>(panel, 0));
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kMostRank; k += 16)
    ptx::wgmma<T, true>(sums, left[k / 16],
                        kConstant | (first + (k / kSpanR * kPanelSpan + k % kSpanR * 2) / 16), k > 0);
  ptx::wgmma_commit();
}

struct Update {
  const Unit& unit;
  float row_unit;
  int row;                 // the lane's, counted from the unit's first
  bool late;               // whether rows may start late in shared memory, after a 16-byte boundary
  int weight_by, rest_by;  // by how many elements
};

// Adds a part's sums to half of W's rows in shared memory, and updates the residual after it: sums[16 g + 4 m +
// 2 v + e] is of row lane / 4 + 8 v and column 32 g + 8 (lane % 4) + 2 m + e of the chunk's part p. Rows that
// start late move to their places from left to right, so that nothing is overwritten that is still needed.
// `first`: the place of the lane's first strip in `slot`.
template <Rounding kRounding, bool kScaled>
__device__ __forceinline__ void add_sums(const float (&sums)[kSums], int v, const Update& update, int col,
                                         uint32_t slot, uint32_t first, int p, uint32_t col_units) {
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  uint4 units[2][2] = {}, w[2], kept[2] = {};  // all in flight together
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const uint32_t place = (first + 2 * p * kPartCols) ^ 64 * g;  // g = 1: the line's other half
    w[g] = ptx::load_shared_128(place);
    if (kCompensated) kept[g] = ptx::load_shared_128(place + kChunkBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (kScaled) units[g][i] = ptx::load_shared_128(col_units + 128 * g + 16 * i);
  }
  if (update.late) {
    const auto turn_late = [&](uint4 (&strips)[2], uint32_t of, int by) {
      uint4 right[2];
#pragma unroll
      for (int g = 0; g < 2; ++g)
        right[g] = ptx::load_shared_128(of + place_of(lane_id() / 4, 8 * p + 4 * g + lane_id() % 4 + 1));
      turn(strips, right, by);
    };
    turn_late(w, slot, update.weight_by);
    if (kCompensated) turn_late(kept, slot + kChunkBytes, update.rest_by);
    ptx::sync_warp();
  }
  Words words[2] = {};
  if (kRounding == Rounding::stochastic)
    draw(words, update.unit.seed, kStreamRound, update.unit.drawn_row + update.row, col >> 3, 32 >> 3);
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const auto scaled = [&](int i) {
      const float sum = sums[16 * g + 4 * (i / 2) + 2 * v + i % 2];
      return kScaled ? __fmul_rn(__fmul_rn(sum, update.row_unit), bits_float(word(units[g][i / 4], i % 4)))
                     : __fmul_rn(sum, update.unit.scaling);
    };
    Neighbours<bf16> pairs[kStrip / 2], rest[kStrip / 2];
    Neighbours<float> updates[kStrip / 2];
#pragma unroll
    for (int i = 0; i < kStrip / 2; ++i) {
      pairs[i] = {word(w[g], i)}, rest[i] = {word(kept[g], i)};
      updates[i] = {scaled(2 * i), scaled(2 * i + 1)};
    }
    merge_pairs<kRounding>(pairs, rest, updates, words[g].w);
#pragma unroll
    for (int i = 0; i < kStrip / 2; ++i) {
      word(w[g], i) = pairs[i].bits;
      if (kCompensated) word(kept[g], i) = rest[i].bits;
    }
    const uint32_t place = (first + 2 * p * kPartCols) ^ 64 * g;
    ptx::store_shared_128(place, w[g]);
    if (kCompensated) ptx::store_shared_128(place + kChunkBytes, kept[g]);
  }
}

template <Rounding kRounding, typename F>
__device__ __forceinline__ void consume(uint32_t memory, int warpgroup, int thread) {
  constexpr bool kScaled = sizeof(F) == 4, kCompensated = kRounding == Rounding::compensated;
  constexpr int kParts = kOwnCols / kPartCols, kSlots = kCompensated ? kChunks / 2 : kChunks;
  constexpr int kSlotBytes = kChunks / kSlots * kChunkBytes;
  const int warp = thread / 32;
  const uint32_t slots = memory + kSlotAt + (warpgroup * 4 + warp) * kChunks * kChunkBytes;
#pragma unroll 1
  for (int i = 0; i < kSlots; ++i)
    Strips<kCompensated>(unit_at(memory, 0), warpgroup, warp, lane_id())
        .copy(i, 0, slots + i * kSlotBytes, lane_id());
  Ring<1> ring;
  uint32_t left[kSixteens][4];
  float sums[2][kSums], row_units[2] = {}, next_units[2] = {};
  const auto take_rows = [&] {  // of the next step
    ptx::wait(rows_full(memory), ring.phase);
#pragma unroll
    for (int j = 0; j < kSixteens; ++j) {
      uint4 four = ptx::load_shared_128(rows_at(memory, j) + thread * 16);
#pragma unroll
      for (int e = 0; e < 4; ++e) left[j][e] = word(four, e);
    }
    if (kScaled)
#pragma unroll
      for (int v = 0; v < 2; ++v)
        next_units[v] = bits_float(ptx::load_shared_32(
            memory + kRowUnitsAt + 4 * (warp * kWarpRows + lane_id() / 4 + 8 * v)));
    ptx::arrive(rows_empty(memory));
    ring.advance();
  };
  const auto start = [&](int part, int of_pair) {
    multiply<HalfOf<F>>(sums[of_pair], left,
                        memory + (warpgroup * kParts + part + of_pair) * kPanelBytes);
  };
  for (uint32_t i = 0; unit_at(memory, i).rows > 0; ++i) {
    fill_panels<F>(unit_at(memory, i), memory, warpgroup, warp);
    Strips<kCompensated> strips(unit_at(memory, i), warpgroup, warp, lane_id());
    const int all_steps = unit_at(memory, i).steps();
    take_rows();
    start(0, 0);
    start(0, 1);
#pragma unroll 1
    for (int step = 0; step < all_steps; ++step) {
      row_units[0] = next_units[0], row_units[1] = next_units[1];
      // Two parts at a time. Once their sums are added, the next two parts' products start in the same registers,
      // at the end of a step those of the next one. After a unit's last step these products are not used.
#pragma unroll 1
      for (int half = 0; half < kParts / 2; ++half) {
        const int pair = 2 * half;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const int chunk = pair + v, lane = lane_id();  // read anew, so that nothing derived from it is kept
          const uint32_t slot = slots + chunk % kSlots * kSlotBytes;
          Update update{unit_at(memory, i), row_units[v], 0, !strips.whole, 0, 0};
          update.row = step * kStepRows + unit_at(memory, i).row_of(warp * kWarpRows + lane / 4 + 8 * v);
          if (update.late) {
            update.weight_by = strips.before(0, chunk);
            if (kCompensated) update.rest_by = strips.before(1, chunk);
          }
          const int own_col = warpgroup * kOwnCols + pair * kPartCols;
          const int col = unit_at(memory, i).col0 + own_col + lane % 4 * kStrip;
          ptx::copy_wait<kSlots - 1>();
          ptx::sync_warp();
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            if (v == 0) {
              if (p == 0) ptx::wgmma_wait<1>();
              else ptx::wgmma_wait<0>();
              ptx::hold(sums[p]);
            }
            add_sums<kRounding, kScaled>(
                sums[p], v, update, col + p * kPartCols, slot, slot + place_of(lane / 4, lane % 4), p,
                memory + kColUnitsAt + 4 * (own_col + p * kPartCols + lane % 4 * kStrip));
            if (v == 1) start((pair + 2) % kParts, p);
          }
          if (v == 0 && pair + 2 == kParts && step + 1 < all_steps) take_rows();
          ptx::sync_warp();
          strips.store(chunk, slot, lane_id());
          // Then the slot takes the chunk that is kSlots further on.
          const int next = (chunk + kSlots) % kChunks, steps = (chunk + kSlots) / kChunks;
          if (step + steps < all_steps)
            strips.copy(next, steps * kStepRows, slot, lane_id());
          else
            Strips<kCompensated>(unit_at(memory, i + 1), warpgroup, warp, lane_id())
                .copy(next, 0, slot, lane_id());
        }
      }
      strips.advance();
    }
    ptx::wgmma_wait<0>();
    ptx::hold(sums[0]);
    ptx::hold(sums[1]);
  }
  ptx::copy_wait<0>();
}

// ---- The kernel ---------------------------------------------------------------------------------

template <Rounding kRounding, typename F>
__global__ void __launch_bounds__(kThreadsSm90, 1)
    merge_sm90_kernel(const __grid_constant__ MergeTable table) {
  const uint32_t memory = ptx::shared_memory();
  if (threadIdx.x == 0) {
    ptx::barrier_init(rows_full(memory), 128);
    ptx::barrier_init(rows_empty(memory), 128 * kConsumers);
  }
  const int warpgroup = int(ptx::shuffle(threadIdx.x / 128, 0));  // known to be the same for all of a warp
  const int thread = int(threadIdx.x) % 128;
  if (warpgroup == kConsumers) {
    fill<F>(table, memory, thread);
  } else {
    __syncthreads();  // the barriers are initialised, and the first unit has been stored
    consume<kRounding, F>(memory, warpgroup, thread);
  }
}

template <typename F>
constexpr void (*kKernels[3])(MergeTable) = {merge_sm90_kernel<Rounding::nearest, F>,
                                             merge_sm90_kernel<Rounding::stochastic, F>,
                                             merge_sm90_kernel<Rounding::compensated, F>};

// ---- The launch ---------------------------------------------------------------------------------

bool can_be_sm90(const MergeLayer& layer, Rounding rounding) {
  const auto near = [](const Matrix& m) { return m.col == 1 && m.row <= kMostPitch; };
  const float scaling = std::fabs(layer.scaling);
  const bool scaled = scaling == 0 || (kLeastScaling <= scaling && scaling < kMostScaling);
  return near(layer.weight) && layer.r <= kMostRank && layer.k <= kMostPitch && scaled &&
         layer.n <= int64_t(INT32_MAX) * kStepRows &&
         (rounding != Rounding::compensated || near(layer.residual));
}

bool has_work(const MergeLayer& layer) { return layer.r != 0 && layer.n != 0 && layer.k != 0; }

// The length of units, in steps, with which all layers take the least time. Time, also in steps, is counted as
// rounds of all blocks, each as long as the longest unit plus one step, for loading lora_A. Of equal times that of
// the longer units is taken. `blocks`: a layer's steps -> 512-column blocks of all layers with as many.
struct Even {
  int64_t time;
  int steps;
};
Even even_steps(const std::map<int, int64_t>& blocks, int multiprocessors) {
  constexpr int kMost = 4096;
  Even found{INT64_MAX, 1};
  for (int steps = 1; steps <= kMost;) {
    int64_t units = 0;
    int longest = 0, next = INT32_MAX;  // next: the next length with which some layer has fewer units
    for (const auto& [height, of_height] : blocks) {
      const int down = (height - 1) / steps + 1;
      units += of_height * down;
      longest = std::max(longest, (height - 1) / down + 1);
      if (down > 1) next = std::min(next, (height - 1) / (down - 1) + 1);
    }
    const int64_t time = ceil_div(units, multiprocessors) * (longest + 1);
    if (time <= found.time) found = {time, steps};
    steps = next;
  }
  return found;
}

}  // namespace

// Cuts layers into units. Long units are better, because each of them reloads lora_A. Short lists get units of about
// equal length that take the least time (even_steps; 4096 x 11008: one round), as do lists for which this takes
// little more time than the steps alone. In other lists units shrink towards the end, so that blocks end together.
cudaError_t sm90_merge(MergeLayer* layers, int count, bool narrow_factors, Rounding rounding,
                       int multiprocessors, MergeTable& table, MergeKernel& kernel) {
  constexpr int64_t kMostSteps = 96, kLeastSteps = 4;
  constexpr int kFew = 8;
  int64_t left = 0;  // steps of 512 columns
  int with_work = 0;
  std::map<int, int64_t> blocks;
  for (int i = 0; i < count; ++i) {
    if (!can_be_sm90(layers[i], rounding)) return cudaErrorInvalidValue;
    if (!has_work(layers[i])) continue;
    const Cut cut(layers[i]);
    left += int64_t(cut.blocks) * cut.steps;
    blocks[cut.steps] += cut.blocks;
    ++with_work;
  }
  const Even even = even_steps(blocks, multiprocessors);
  const bool alike = with_work <= kFew || (even.time - 5) * multiprocessors <= left + left / 20;
  int64_t units = 0;
  for (int i = 0; i < count; ++i) {
    MergeLayer& layer = layers[i];
    layer.first_block = uint32_t(units);
    layer.unit_steps = 1;
    if (!has_work(layer)) continue;
    const Cut cut(layer);
    const int64_t most = alike ? even.steps : std::clamp(left / multiprocessors, kLeastSteps, kMostSteps);
    layer.unit_steps = uint32_t(ceil_div(cut.steps, ceil_div(cut.steps, most)));  // units of about equal length
    units += cut.blocks * ceil_div(cut.steps, layer.unit_steps);
    left -= int64_t(cut.blocks) * cut.steps;
    if (units > INT32_MAX) return cudaErrorInvalidConfiguration;
  }
  table.units = int(units);
  table.narrow_factors = narrow_factors;
  kernel = {(narrow_factors ? kKernels<bf16> : kKernels<float>)[int(rounding)], kSharedSm90,
            kThreadsSm90};
  return cudaSuccess;
}

}  // namespace relora
