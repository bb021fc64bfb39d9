// merge.cu's kernel on Hopper: a bf16 W of rows that begin anywhere, r <= 128, factors of any strides.
//
// A persistent block an SM, of three warpgroups. A unit of work is 512 columns of a layer and some
// steps of 64 rows; blocks take units from a common counter.
//
//   fill     lora_B for a step, 16 bits, as wgmma takes it from registers
//   consume  twice, 256 columns each: lora_A for them, in shared memory for all of a unit; then, a
//            step, lora_B in registers, products by wgmma, and W: a warp's 16 rows come by cp.async,
//            chunks ahead and across units, gain their sums in shared memory and go back
//
// Memory sees whole lines: a warp reads and writes 256 bytes of each of its rows at a time, two rows an
// instruction, where its sums are of eight rows an instruction. Lines written by halves cost a third of the
// rate, and lora_A in shared memory for 512 columns half of what lora_B's rows for as many cost in L2.
//
// bf16 factors are held as they are. Of fp32 factors 11 bits are kept: as fp16, which has tf32's
// mantissa and twice its speed, scaled by a power of two for each row of lora_B and column of lora_A.
// That holds 11 bits of what is 2^-28 of the row's or column's largest or more, and below an error of
// up to 2^-39 of the largest (numerics.cuh); of rows below 2^-90 less, where float32's own range ends.
//
// A row that begins elsewhere than at 16 bytes lies in shared memory as in W, from the 16 bytes before
// its first element on. All accesses to W then are of 16 bytes, but for those of up to seven elements at
// both ends of the 128 columns of a chunk, and at the matrix's end.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "merge.cuh"
#include "ptx.cuh"
#include "two_segment.h"

namespace relora {
namespace {

using two_segment::ceil_div;
using two_segment::kRowBytes;
using two_segment::operand_descriptor;
using two_segment::Ring;
using two_segment::swizzled;

// A sum of products is below kMostRank * 2^30, and lora_B below 2^120 (launch.h): times its row's unit
// it may reach 2^142, which float32 does not hold. So rows are worth less, and columns more; and as much
// as the scaling says, which leaves a unit of up to 2^105 in float32, and of 2^-126 nearly all of it.
constexpr float kShift = 0x1p15f;
constexpr float kLeastScaling = 0x1p-16f, kMostScaling = 0x1p7f;

// ---- What is done where -------------------------------------------------------------------------

constexpr int kStepRows = 64, kUnitCols = 512;
constexpr int kConsumers = 2, kOwnCols = kUnitCols / kConsumers;  // of a warpgroup
constexpr int kWarpRows = 16;                                     // of a step
constexpr int kPartCols = 64;                                     // of a wgmma
constexpr int kThreadsSm90 = 128 * (1 + kConsumers);
constexpr int kSpanR = 64;  // of r in a row of shared memory

// A layer's units: columns beside each other first, for they share lora_B, then further rows.
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

// A unit. Matrices are from its first row on, lora_A is the layer's.
struct Unit {
  Sheet weight, residual;
  Matrix lora_A, lora_B;
  uint64_t seed;
  int64_t drawn_row;  // the first row's number for the random bits
  int rows, below;    // rows: 0, there is no unit; below: rows to the layer's end, 2^31 - 1 at most
  int col0, cols;     // cols: the layer's
  int r;
  float scaling;

  __device__ __forceinline__ int steps() const { return int(uint32_t(rows + kStepRows - 1) / kStepRows); }
};

// By a whole warp. `from`: the index of a layer that begins at or before it; then of the unit's. Few layers
// are read from the launch's arguments as such, not through a pointer.
__device__ __forceinline__ Unit unit_of(const MergeTable& table, uint32_t number, int lane, int& from) {
  Unit unit{};
  if (number >= uint32_t(table.units)) return unit;
  int index = from - 1;
  for (int begun = 32; begun == 32;) {  // a layer a lane, in their order
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
  return unit;
}

// ---- Shared memory ------------------------------------------------------------------------------

// A panel: kPartCols columns of lora_A, as wgmma takes them; a span: kSpanR of r of one.
constexpr int kPanels = kUnitCols / kPartCols;
constexpr int kPanelSpan = kPartCols * kRowBytes, kPanelBytes = 2 * kPanelSpan;
constexpr int kRowsAt = kPanels * kPanelBytes;
constexpr int kSlotAt = kRowsAt + kStepRows * kMostRank * 2;

// A chunk: what a warp copies at a time of W, and of the residual, into a slot of its own: half of its
// rows, and the columns of two products. Lines of 128 bytes as in memory: asynchronous copies that part
// a line are slow; of each line, halves of odd rows are swapped, so that what eight lanes read together
// lies in all banks. Behind them 16 bytes a row, for what a row has beyond them that begins elsewhere
// than at a multiple of 16 bytes.
constexpr int kChunkRows = kWarpRows / 2, kChunkCols = 2 * kPartCols, kChunks = 2 * kOwnCols / kChunkCols;
constexpr int kRowStrips = kChunkCols / kStrip;  // of a row, and lanes that copy it
constexpr int kRowsAtOnce = 32 / kRowStrips;
constexpr int kPitch = 2 * kChunkCols, kChunkBytes = kChunkRows * (kPitch + 16);
constexpr int kSlotsBytes = 4 * kConsumers * kChunks * kChunkBytes;

// Of a strip of a row in a slot; the kRowStrips-th is the one behind.
__device__ __forceinline__ uint32_t place_of(int row, int strip) {
  return strip < kRowStrips ? row * kPitch + (strip ^ row % 2 * 4) * 16 : kChunkRows * kPitch + row * 16;
}

constexpr int kColUnitsAt = kSlotAt + kSlotsBytes;
constexpr int kLargestAt = kColUnitsAt + 4 * kUnitCols;  // of a column, of each half of r
constexpr int kRowUnitsAt = kLargestAt + 4 * kConsumers * 2 * kPartCols;
constexpr int kUnitsAt = kRowUnitsAt + 4 * kStepRows, kUnits = 4;
constexpr int kBarriersAt = kUnitsAt + kUnits * int(sizeof(Unit));
constexpr int kSharedSm90 = kBarriersAt + 16;
static_assert(kSlotAt % 128 == 0 && kChunkBytes % 128 == 0);
static_assert(kBarriersAt % 8 == 0 && kSharedSm90 <= two_segment::kMostShared);

// Arrivals are of every thread: compute-sanitizer's racecheck knows no other order by them.
__device__ __forceinline__ uint32_t rows_full(uint32_t memory) { return memory + kBarriersAt; }
__device__ __forceinline__ uint32_t rows_empty(uint32_t memory) { return memory + kBarriersAt + 8; }

// The block's unit `i`, counted from 0. `fill` has it there with the first rows of the unit before it,
// when nobody is at the unit three before that any more, whose place it takes.
__device__ __forceinline__ Unit& unit_at(uint32_t memory, uint32_t i) {
  return *ptx::shared_pointer<Unit>(memory + kUnitsAt + i % kUnits * uint32_t(sizeof(Unit)));
}

// Where 16 of r of a step's lora_B are: 16 bytes for each thread, as wgmma takes them from its registers.
constexpr int kOf16 = kStepRows * 16 * 2, kSixteens = kMostRank / 16;
__device__ __forceinline__ uint32_t rows_at(uint32_t memory, int sixteen) {
  return memory + kRowsAt + sixteen * kOf16;
}

// Which column of 32 a wgmma's column n stands for: a lane, which has columns 2 t and the next of each
// eight, so has eight neighbours.
__device__ __forceinline__ int column_of(int n) {
  return n / 32 * 32 + n / 2 % 4 * 8 + n / 8 % 4 * 2 + n % 2;
}

template <typename F>
using HalfOf = std::conditional_t<sizeof(F) == 4, fp16, bf16>;

// `scale`: of fp32.
__device__ __forceinline__ uint32_t halves(float first, float second, float scale) {
  return pair_nearest<fp16>({scale * first, scale * second}).bits;
}
__device__ __forceinline__ uint32_t halves(bf16 first, bf16 second, float) {
  return first.bits | uint32_t(second.bits) << 16;
}
__device__ __forceinline__ float magnitude(float v) { return fabsf(v); }
__device__ __forceinline__ float magnitude(bf16) { return 0.f; }

// ---- fill ---------------------------------------------------------------------------------------

// A step's lora_B, under way. Eight lanes have a row; a warp 16, those that its like among the consumers
// multiply.
template <typename F>
struct Rows {
  F v[4][kSixteens][2];

  __device__ __forceinline__ static int row_of(int i, int thread) {
    return thread / 32 * 16 + i / 2 * 4 + i % 2 * 8 + thread % 32 / 8;
  }

  // Without branches: all loads are under way together. Pairs where lora_B lies as it usually does.
  __device__ __forceinline__ void load(const Unit& unit, int step, int thread) {
    const Matrix& m = unit.lora_B;
    const int first = thread % 8 * 2;
    const bool pairs = m.col == 1 && ((m.row | unit.r) & 1) == 0 &&
                       reinterpret_cast<uintptr_t>(m.data) % (2 * sizeof(F)) == 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = step * kStepRows + row_of(i, thread), count = row < unit.rows ? unit.r - first : 0;
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

  // To shared memory, of fp32 their units, too.
  __device__ __forceinline__ void store(uint32_t memory, int thread) const {
    constexpr bool kScaled = sizeof(F) == 4;
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // rows 8 apart, which one thread multiplies
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

// A step's rows are on their way while the consumers are at the one before; a unit is known before the
// one before it begins.
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
    ptx::named_barrier(1, 128);  // the next unit is there
  }
}

// ---- consume: lora_A ----------------------------------------------------------------------------

// A panel, by a warpgroup: a thread has a column and half of r. Without branches, as above.
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

// A warpgroup's panels, when its warps are done with the last unit's.
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

// Elements from the last multiple of 16 bytes to an address.
__device__ __forceinline__ int offset_of(const bf16* at) {
  return int(reinterpret_cast<uintptr_t>(at) / 2 & 7);
}

// Elements `by` to by + 7 of sixteen; by <= 8.
__device__ __forceinline__ uint4 shifted(uint4 first, uint4 second, int by) {
  uint32_t w[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int words = 4; words > 0; words /= 2)
    if (by & 2 * words)
#pragma unroll
      for (int i = 0; i + words < 8; ++i) w[i] = w[i + words];
  if (by & 1)
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
  return {w[0], w[1], w[2], w[3]};
}

// A chunk of a matrix. A lane copies and stores kCount strips of it, in rows kRowsAtOnce apart.
struct Piece {
  static constexpr int kCount = kChunkRows / kRowsAtOnce;
  bf16* at;  // its first element
  int64_t pitch;
  int rows, cols;  // that there are: at most kChunkRows and kChunkCols, none or less beyond the matrix
  bool whole;      // every row begins and ends at a multiple of 16 bytes
  bool last;       // what surrounds its rows may lie beyond the matrix

  // `chunk` of a unit's step, for the warp `warp` of `warpgroup`.
  __device__ __forceinline__ Piece(const Unit& unit, const Sheet& m, int step, int chunk, int warpgroup,
                                   int warp) {
    const int row = step * kStepRows + warp * kWarpRows + chunk % 2 * kChunkRows;
    const int col = unit.col0 + warpgroup * kOwnCols + chunk / 2 * kChunkCols;
    pitch = m.pitch;
    at = global_memory<bf16>(m.at) + row * pitch + col;
    rows = min(unit.rows - row, kChunkRows), cols = min(unit.cols - col, kChunkCols);
    whole = ((offset_of(at) | int(pitch) | cols) & 7) == 0;
    last = (unit.below - row - rows) * pitch + unit.cols - col < kChunkCols + kStrip;
  }

  __device__ __forceinline__ int offset(int row) const { return offset_of(at + row * pitch); }

  // Asynchronously, each row from the 16 bytes on in which it begins. What surrounds it in memory up to
  // multiples of 16 bytes comes along.
  __device__ __forceinline__ void copy(uint32_t slot, int lane) const {
    const int strip = lane % kRowStrips, first = strip * kStrip;
    int row = lane / kRowStrips;
    if (last && !whole) return copy_last(slot, row, strip, lane);
    const bf16* from = at + row * pitch + first;
    const uint32_t to = slot + place_of(row, strip);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int before = offset_of(from);
      ptx::copy_16<true>(to + further(i), from - before, row < rows && first - before < cols ? 16 : 0);
      row += kRowsAtOnce, from += kRowsAtOnce * pitch;
    }
    if (whole || lane >= rows) return;
    const int before = offset(lane);
    if (kChunkCols - before < cols)
      ptx::copy_16<true>(slot + place_of(lane, kRowStrips), at + lane * pitch + kChunkCols - before, 16);
  }
  // From a lane's first strip to its i-th: rows as odd as its first.
  __device__ __forceinline__ static constexpr uint32_t further(int i) {
    return i * kRowsAtOnce * kPitch;
  }

  // By elements, but for nothing that lies beyond a row.
  __device__ __forceinline__ void copy_last(uint32_t slot, int row, int strip, int lane) const {
#pragma unroll 1
    for (; row < rows; row += kRowsAtOnce) copy_strip(slot, row, strip);
    if (lane < rows) copy_strip(slot, lane, kRowStrips);
  }
  __device__ __forceinline__ void copy_strip(uint32_t slot, int row, int strip) const {
    const int begin = strip * kStrip - offset(row);
#pragma unroll 1
    for (int i = max(0, -begin); i < min(kStrip, cols - begin); ++i)
      ptx::store_shared_16(slot + place_of(row, strip) + 2 * i,
                           global_memory<bf16>(at + row * pitch + begin)[i].bits);
  }

  // From rows of shared memory that begin with their first elements. Of whole ones a lane reads what it
  // has copied itself, and may copy over then.
  __device__ __forceinline__ void store(uint32_t slot, int lane) const {
    if (rows <= 0 || cols <= 0) return;
    const int row = lane / kRowStrips, strip = lane % kRowStrips, first = strip * kStrip;
    const uint32_t from = slot + place_of(row, strip), left = slot + place_of(row, max(strip - 1, 0));
    bf16* to = at + row * pitch + first;
    if (whole) {
      uint4 strips[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) strips[i] = ptx::load_shared_128(from + further(i));
#pragma unroll
      for (int i = 0; i < kCount; ++i, to += kRowsAtOnce * pitch)
        if (row + i * kRowsAtOnce < rows && first < cols) store_16(to, strips[i]);
      return;
    }
#pragma unroll 2
    for (int i = 0; i < kCount; ++i, to += kRowsAtOnce * pitch) {
      const int before = offset_of(to);
      const uint4 eight = shifted(ptx::load_shared_128(left + further(i)),
                                  ptx::load_shared_128(from + further(i)), kStrip - before);
      if (row + i * kRowsAtOnce < rows && first >= before && first - before + kStrip <= cols)
        store_16(to - before, eight);
    }
    if (lane < 2 * kChunkRows) store_end(slot, lane % kChunkRows, lane < kChunkRows);
    ptx::sync_warp();  // others copy to where these lie
  }

  // A row's first elements, up to a multiple of 16 bytes, or its last ones, from one on.
  __device__ __forceinline__ void store_end(uint32_t slot, int row, bool first) const {
    const int before = offset(row), end = (before + cols) / kStrip;
    if (row >= rows || (first && (before == 0 || end == 0))) return;
    const int strip = first ? 0 : end, from = strip == 0 ? before : 0;
    const int to = first ? kStrip : (before + cols) % kStrip;
    uint4 eight = shifted(ptx::load_shared_128(slot + place_of(row, max(strip - 1, 0))),
                          ptx::load_shared_128(slot + place_of(row, strip)), kStrip - before);
    bf16* const begin = global_memory<bf16>(at + row * pitch + strip * kStrip - before);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool low = from <= 2 * i && 2 * i < to, high = from <= 2 * i + 1 && 2 * i + 1 < to;
      if (low && high)
        *static_cast<uint32_t*>(__builtin_assume_aligned(begin + 2 * i, 4)) = word(eight, i);
      else if (low || high)
        begin[2 * i + high].bits = uint16_t(word(eight, i) >> (high ? 16 : 0));
    }
  }

  __device__ __forceinline__ static void store_16(bf16* to, uint4 v) {
    *static_cast<uint4*>(__builtin_assume_aligned(global_memory<bf16>(to), 16)) = v;
  }
};

// A lane's strips of a unit, step by step, where every row of W, and of the residual, begins and ends at a
// multiple of 16 bytes.
template <bool kCompensated>
struct Whole {
  static constexpr int kMostPitch = 1 << 23;  // so that a step's offsets have 32 bits
  static constexpr int kSheets = kCompensated ? 2 : 1;
  const Unit& unit;
  char* at[kSheets];  // the lane's first strip in the step
  int rows, cols;     // that there are from there on: may be none
  bool is;

  __device__ __forceinline__ Whole(const Unit& unit, int warpgroup, int warp, int lane) : unit(unit) {
    const int row = warp * kWarpRows + lane / kRowStrips;
    const int col = unit.col0 + warpgroup * kOwnCols + lane % kRowStrips * kStrip;
    is = true;
#pragma unroll
    for (int i = 0; i < kSheets; ++i) {
      const Sheet& m = sheet(i);
      is = is && ((offset_of(m.at) | int(m.pitch) | unit.cols) & 7) == 0 && m.pitch <= kMostPitch;
      at[i] = ptx::rows_further(reinterpret_cast<char*>(m.at + col), row, pitch(i));
    }
    rows = unit.rows - row, cols = unit.cols - col;
  }
  __device__ __forceinline__ const Sheet& sheet(int i) const { return i ? unit.residual : unit.weight; }
  __device__ __forceinline__ int pitch(int i) const { return 2 * int(sheet(i).pitch); }  // bytes

  // visit(strip, where it is, whether it is there) for the lane's strips of `chunk`, `further` rows on.
  template <typename Visit>
  __device__ __forceinline__ void each(int of, int chunk, int further, Visit&& visit) const {
    const bool inside = chunk / 2 * kChunkCols < cols;
    const int row = further + chunk % 2 * kChunkRows;
    char* to = ptx::rows_further(at[of] + chunk / 2 * kPitch, row, pitch(of));
#pragma unroll
    for (int i = 0; i < Piece::kCount; ++i) {
      visit(i, global_memory<bf16>(to), inside && row + i * kRowsAtOnce < rows);
      to = ptx::rows_further(to, kRowsAtOnce, pitch(of));
    }
  }

  // As Piece's. `place`: the lane's first strip in the slot.
  __device__ __forceinline__ void store(int chunk, uint32_t place) const {
#pragma unroll
    for (int of = 0; of < kSheets; ++of) {
      uint4 strips[Piece::kCount];
#pragma unroll
      for (int i = 0; i < Piece::kCount; ++i)
        strips[i] = ptx::load_shared_128(place + of * kChunkBytes + Piece::further(i));
      each(of, chunk, 0, [&](int i, bf16* to, bool there) {
        if (there) Piece::store_16(to, strips[i]);
      });
    }
  }
  // Of the unit: `chunk` of the step that is `further` rows on.
  __device__ __forceinline__ void copy(int chunk, int further, uint32_t place) const {
#pragma unroll
    for (int of = 0; of < kSheets; ++of)
      each(of, chunk, further, [&](int i, const bf16* from, bool there) {
        ptx::copy_16<true>(place + of * kChunkBytes + Piece::further(i), from, there ? 16 : 0);
      });
    ptx::copy_commit();
  }
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int of = 0; of < kSheets; ++of) at[of] = ptx::rows_further(at[of], kStepRows, pitch(of));
    rows -= kStepRows;
  }
};

// A chunk of W, and of the residual: a group of copies, of no unit an empty one.
template <bool kCompensated>
__device__ __forceinline__ void copy_chunk(const Unit& unit, int step, int chunk, uint32_t slot,
                                           int warpgroup, int warp) {
  const Piece weight(unit, unit.weight, step, chunk, warpgroup, warp);
  if (weight.rows > 0 && weight.cols > 0) {
    weight.copy(slot, lane_id());
    if (kCompensated)
      Piece(unit, unit.residual, step, chunk, warpgroup, warp).copy(slot + kChunkBytes, lane_id());
  }
  ptx::copy_commit();
}

// ---- consume: the sums --------------------------------------------------------------------------

constexpr int kSums = kPartCols / 2;

// sums (kStepRows, kPartCols) = lora_B's rows @ a panel.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[kSums], const uint32_t (&left)[kSixteens][4],
                                         uint32_t panel) {
  constexpr uint64_t kConstant = operand_descriptor<true>(0, 0);
  // In units of 16 bytes; what is further adds up.
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
  int row;                 // the lane's, from the unit's first on
  int weight_by, rest_by;  // by how many elements its row begins late in shared memory
  bool late;               // whether any lane's does
};

// A part's sums, to half of W's rows in shared memory, and to the residual behind it: sums[16 g + 4 m +
// 2 v + e] is of row lane / 4 + 8 v and column 32 g + 8 (lane % 4) + 2 m + e of the chunk's part p. Rows
// that begin late take their places from left to right, where nobody needs any more what lies there.
// `first`: of the lane's first strip in `slot`.
template <Rounding kRounding, bool kScaled>
__device__ __forceinline__ void add_sums(const float (&sums)[kSums], int v, const Update& update, int col,
                                         uint32_t slot, uint32_t first, int p, uint32_t col_units) {
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  constexpr bool kUnitsLater = kRounding == Rounding::stochastic;  // its random bits need their registers
  uint4 units[2][2] = {}, w[2], kept[2] = {};  // all on their way together
  const auto load_units = [&](int g) {
#pragma unroll
    for (int i = 0; i < 2; ++i) units[g][i] = ptx::load_shared_128(col_units + 128 * g + 16 * i);
  };
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const uint32_t place = (first + 2 * p * kPartCols) ^ 64 * g;  // 1: the line's other half
    w[g] = ptx::load_shared_128(place);
    if (kCompensated) kept[g] = ptx::load_shared_128(place + kChunkBytes);
    if (kScaled && !kUnitsLater) load_units(g);
  }
  if (update.late) {
    const int lane = lane_id();
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const uint32_t right = slot + place_of(lane / 4, 8 * p + 4 * g + lane % 4 + 1);
      w[g] = shifted(w[g], ptx::load_shared_128(right), update.weight_by);
      if (kCompensated)
        kept[g] = shifted(kept[g], ptx::load_shared_128(right + kChunkBytes), update.rest_by);
    }
    ptx::sync_warp();
  }
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    Words words{};
    if (kRounding == Rounding::stochastic)
      words = draw(update.unit.seed, kStreamRound, update.unit.drawn_row + update.row,
                   (col + 32 * g) >> 3);
    if (kScaled && kUnitsLater) load_units(g);
    const auto scaled = [&](int i) {
      const float sum = sums[16 * g + 4 * (i / 2) + 2 * v + i % 2];
      return kScaled ? __fmul_rn(__fmul_rn(sum, update.row_unit), bits_float(word(units[g][i / 4], i % 4)))
                     : __fmul_rn(sum, update.unit.scaling);
    };
#pragma unroll
    for (int i = 0; i < kStrip / 2; ++i) {
      Neighbours<bf16> pair{word(w[g], i)}, rest{word(kept[g], i)};
      merge_pair<kRounding>(pair, rest, {scaled(2 * i), scaled(2 * i + 1)}, words.w[i]);
      word(w[g], i) = pair.bits;
      if (kCompensated) word(kept[g], i) = rest.bits;
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
    copy_chunk<kCompensated>(unit_at(memory, 0), 0, i, slots + i * kSlotBytes, warpgroup, warp);
  Ring<1> ring;
  uint32_t left[kSixteens][4];
  float sums[2][kSums], row_units[2] = {}, next_units[2] = {};
  const auto take_rows = [&] {  // of the step that comes
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
    Whole<kCompensated> whole(unit_at(memory, i), warpgroup, warp, lane_id());
    take_rows();
    start(0, 0);
    start(0, 1);
#pragma unroll 1
    for (int step = 0; step < unit_at(memory, i).steps(); ++step) {
      row_units[0] = next_units[0], row_units[1] = next_units[1];
      // Two parts at a time. Sums that were added make room for the next two parts', of the next step's in
      // the end; behind a unit's last step these are products that nobody wants.
#pragma unroll 1
      for (int half = 0; half < kParts / 2; ++half) {
        const int pair = 2 * half;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const int chunk = pair + v, lane = lane_id();  // anew: what follows from it is not kept
          const uint32_t slot = slots + chunk % kSlots * kSlotBytes;
          const auto piece = [&](const Sheet& m) {
            return Piece(unit_at(memory, i), m, step, chunk, warpgroup, warp);
          };
          Update update{unit_at(memory, i), row_units[v], 0, 0, 0, false};
          update.row = step * kStepRows + warp * kWarpRows + lane / 4 + 8 * v;
          if (!whole.is) {
            const Piece weight = piece(unit_at(memory, i).weight);
            const Piece rest = piece(kCompensated ? unit_at(memory, i).residual : unit_at(memory, i).weight);
            update.late = !weight.whole || !rest.whole;
            update.weight_by = weight.offset(lane / 4);
            update.rest_by = rest.offset(lane / 4);
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
          if (v == 0 && pair + 2 == kParts && step + 1 < unit_at(memory, i).steps()) take_rows();
          ptx::sync_warp();
          const uint32_t own = slot + place_of(lane / kRowStrips, lane % kRowStrips);
          if (whole.is) {
            whole.store(chunk, own);
          } else {
            piece(unit_at(memory, i).weight).store(slot, lane_id());
            if (kCompensated) piece(unit_at(memory, i).residual).store(slot + kChunkBytes, lane_id());
          }
          // The chunk that is kSlots further follows.
          const int next = (chunk + kSlots) % kChunks, steps = (chunk + kSlots) / kChunks;
          const bool same = step + steps < unit_at(memory, i).steps();
          if (whole.is && same)
            whole.copy(next, steps * kStepRows, own);
          else
            copy_chunk<kCompensated>(unit_at(memory, same ? i : i + 1), same ? step + steps : 0, next, slot,
                                     warpgroup, warp);
        }
      }
      whole.advance();
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
  const int warpgroup = int(ptx::shuffle(threadIdx.x / 128, 0));  // known to be one for a warp
  const int thread = int(threadIdx.x) % 128;
  if (warpgroup == kConsumers) {
    fill<F>(table, memory, thread);
  } else {
    __syncthreads();  // the barriers are initialised, and the first unit is there
    consume<kRounding, F>(memory, warpgroup, thread);
  }
}

template <typename F>
constexpr void (*kKernels[3])(MergeTable) = {merge_sm90_kernel<Rounding::nearest, F>,
                                             merge_sm90_kernel<Rounding::stochastic, F>,
                                             merge_sm90_kernel<Rounding::compensated, F>};

// ---- The launch ---------------------------------------------------------------------------------

bool can_be_sm90(const MergeLayer& layer, Rounding rounding) {
  const int64_t most = INT32_MAX - kUnitCols;  // columns are 32-bit, past a row's end too
  const float scaling = std::fabs(layer.scaling);
  const bool scaled = scaling == 0 || (kLeastScaling <= scaling && scaling < kMostScaling);
  return layer.weight.col == 1 && layer.r <= kMostRank && layer.k <= most && scaled &&
         layer.n <= int64_t(INT32_MAX) * kStepRows &&
         (rounding != Rounding::compensated || layer.residual.col == 1);
}

bool has_work(const MergeLayer& layer) { return layer.r != 0 && layer.n != 0 && layer.k != 0; }

}  // namespace

// A unit's steps: many, since each unit begins with lora_A, and fewer towards the list's end, for the
// blocks to end together.
cudaError_t sm90_merge(MergeLayer* layers, int count, bool narrow_factors, Rounding rounding,
                       int multiprocessors, MergeTable& table, MergeKernel& kernel) {
  constexpr int64_t kMostSteps = 48, kLeastSteps = 4;
  int64_t left = 0;  // steps of 512 columns
  for (int i = 0; i < count; ++i) {
    if (!can_be_sm90(layers[i], rounding)) return cudaErrorInvalidValue;
    const Cut cut(layers[i]);
    if (has_work(layers[i])) left += int64_t(cut.blocks) * cut.steps;
  }
  const int64_t least = std::clamp(ceil_div(left, multiprocessors), int64_t(1), kLeastSteps);
  int64_t units = 0;
  for (int i = 0; i < count; ++i) {
    MergeLayer& layer = layers[i];
    layer.first_block = uint32_t(units);
    layer.unit_steps = 1;
    if (!has_work(layer)) continue;
    const Cut cut(layer);
    const int64_t most = std::clamp(left / (2 * multiprocessors), least, kMostSteps);
    layer.unit_steps = uint32_t(ceil_div(cut.steps, ceil_div(cut.steps, most)));  // much the same each
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
