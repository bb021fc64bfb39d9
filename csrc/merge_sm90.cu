// merge.cu's kernel on Hopper: a bf16 W of rows that begin anywhere, r <= 128, factors of any strides.
//
// A persistent block an SM, of three warpgroups. A strip is 256 rows of W, a step 64 columns of it.
//
//   fill     lora_A for a step, 16 bits, as wgmma takes it, into a ring of panels; beside it, a part a
//            step, lora_B for the strip that comes next
//   consume  twice, 128 rows each: lora_B of a strip in registers for all of its steps; products by
//            wgmma; W comes by cp.async, steps ahead and across strips, each lane's elements to a
//            place of its own, so that nobody waits for anybody's; sums go straight back to memory
//
// bf16 factors are held as they are. Of fp32 factors 11 bits are kept: as fp16, which has tf32's
// mantissa and twice its speed, scaled by a power of two for each row of lora_B and column of lora_A.
// That holds 11 bits of what is 2^-28 of the row's or column's largest or more, and below an error of
// up to 2^-39 of the largest (numerics.cuh); of rows below 2^-90 less, where float32's own range ends.
//
// Where a row's pitch is no multiple of 16 bytes, a strip takes every second, fourth or eighth row of W:
// these begin at one offset from 16 bytes, and steps begin as many columns earlier. All accesses then
// are of 16 bytes, but for a row's first and last.
#include <algorithm>
#include <iterator>

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
// it may reach 2^142, which float32 does not hold. So rows are worth less, and columns more.
constexpr float kShift = 0x1p15f;

// ---- What is done where -------------------------------------------------------------------------

constexpr int kStripRows = 256, kStepCols = 64;
constexpr int kConsumers = 2, kOwnRows = kStripRows / kConsumers;  // of a warpgroup
constexpr int kHalfRows = 64;                                      // of a wgmma
constexpr int kThreadsSm90 = 128 * (1 + kConsumers);
constexpr int kSpanR = 64;  // of r in a row of shared memory

// The logarithm of how many rows of W further one is a multiple of 16 bytes further.
__host__ __device__ __forceinline__ int log_period_of(const Matrix& weight) {
  const int odd = int(weight.row & 7);
  return odd == 0 ? 0 : odd == 4 ? 1 : odd % 2 == 0 ? 2 : 3;
}
// Elements from the last multiple of 16 bytes to a row's first.
__host__ __device__ __forceinline__ int offset_of(const Matrix& weight, int64_t row) {
  return int((reinterpret_cast<uintptr_t>(weight.data) / 2 + uint64_t(row) * uint64_t(weight.row)) & 7);
}

// A layer's units: strips beside each other first, for they share lora_A, then further columns.
struct Cut {
  int log_period, strips, steps;
  __host__ __device__ __forceinline__ explicit Cut(const MergeLayer& layer)
      : log_period(log_period_of(layer.weight)) {
    strips = int(ceil_div(every(layer.n), kStripRows)) << log_period;
    const bool shifted = log_period > 0 || offset_of(layer.weight, 0);
    steps = int(ceil_div(layer.k + (shifted ? kStrip - 1 : 0), kStepCols));
  }
  // How many rows there are in `rows` if they follow a period apart.
  __host__ __device__ __forceinline__ int64_t every(int64_t rows) const {
    return (rows + (1 << log_period) - 1) >> log_period;
  }
  __host__ __device__ __forceinline__ int64_t units(int steps_a_unit) const {
    return strips * ceil_div(steps, steps_a_unit);
  }
};

// The layer's numbers are here for once: behind the instructions that speak of shared memory they would
// be read again for each piece.
struct Unit {
  int index;  // the layer's
  Matrix weight, residual, lora_A, lora_B;
  int64_t row0;      // the first row; the others follow `period` apart
  int rows, period;  // rows: may be none
  int r;
  int col0, steps;   // col0: may lie up to 7 before the row
  int cols;
  float scaling;
  uint64_t seed;
  int64_t drawn_row0;  // row0 for the random bits
};

// `from`: the index of a layer that begins at or before it. What travels as an argument is read as one.
__device__ __forceinline__ Unit unit_of(const MergeTable& table, int64_t number, int lane, int from) {
  Unit unit;
  unit.index = from - 1;
  for (int begun = 32; begun == 32;) {  // a layer a lane, in their order
    const int i = unit.index + 1 + lane;
    bool begins = false;
    if (i < table.count)
      begins = (table.layers ? table.layers[i].first_block : table.first[i].first_block) <= number;
    begun = __popc(ptx::ballot(begins));
    unit.index += begun;
  }
  const MergeLayer layer = table.layers ? table.layers[unit.index] : table.first[unit.index];
  const Cut cut(layer);
  const uint32_t within = uint32_t(number) - layer.first_block, chunk = within / uint32_t(cut.strips);
  const int strip = int(within - chunk * uint32_t(cut.strips));
  const int first_step = int(chunk) * table.unit_steps;
  unit.weight = layer.weight, unit.residual = layer.residual;
  unit.lora_A = layer.lora_A, unit.lora_B = layer.lora_B;
  unit.period = 1 << cut.log_period;
  unit.row0 = (strip & (unit.period - 1)) +
              (int64_t(strip >> cut.log_period) * kStripRows << cut.log_period);
  unit.rows = int(min(cut.every(max(layer.n - unit.row0, int64_t(0))), int64_t(kStripRows)));
  unit.r = int(layer.r);
  unit.col0 = first_step * kStepCols - offset_of(layer.weight, unit.row0);
  unit.steps = min(cut.steps - first_step, table.unit_steps);
  unit.cols = int(layer.k);
  unit.scaling = layer.scaling;
  unit.seed = layer.seed;
  unit.drawn_row0 = layer.first_row + unit.row0;
  return unit;
}

// ---- Shared memory ------------------------------------------------------------------------------

constexpr int kPanels = 2, kSlots = 4;
constexpr int kPanelSpan = kStepCols * kRowBytes, kPanelBytes = 2 * kPanelSpan;  // a span: kSpanR of r
constexpr int kSlotBytes = kStripRows * kStepCols * 2;  // a step of W, or of the residual
constexpr int kPanelAt = kStripRows * kMostRank * 2;    // lora_B comes first
constexpr int kSlotAt = kPanelAt + kPanels * kPanelBytes;
constexpr int kRowUnitsAt = kSlotAt + kSlots * kSlotBytes;
constexpr int kColUnitsAt = kRowUnitsAt + 4 * kStripRows;
constexpr int kLargestAt = kColUnitsAt + 4 * kPanels * kStepCols;  // of a column, of each half of r
constexpr int kBarriersAt = kLargestAt + 4 * kPanels * 2 * kStepCols;
constexpr int kSharedSm90 = kBarriersAt + 8 * (2 * kPanels + 2);
static_assert(kSharedSm90 <= two_segment::kMostShared);

struct Barriers {
  uint32_t memory;
  __device__ __forceinline__ uint32_t full(int panel) const { return memory + kBarriersAt + 8 * panel; }
  __device__ __forceinline__ uint32_t empty(int panel) const { return full(panel + kPanels); }
  __device__ __forceinline__ uint32_t rows_full() const { return full(2 * kPanels); }
  __device__ __forceinline__ uint32_t rows_empty() const { return full(2 * kPanels + 1); }
};

// Where 16 of r and a band of kHalfRows rows of lora_B are: 16 bytes for each thread, as wgmma takes
// them from its registers.
constexpr int kOf16 = kHalfRows * 16 * 2, kSixteens = kMostRank / 16;
__device__ __forceinline__ uint32_t rows_at(uint32_t memory, int band, int sixteen) {
  return memory + (band * kSixteens + sixteen) * kOf16;
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

// A thread has a column and half of r. Without branches: 64 loads are under way together.
template <typename F>
__device__ __forceinline__ void fill_panel(const Unit& unit, uint32_t memory, int col0, Ring<kPanels>& ring,
                                           int thread) {
  constexpr bool kScaled = sizeof(F) == 4;
  const Barriers barriers{memory};
  const Matrix& m = unit.lora_A;
  const int n = thread % kStepCols, half = thread / kStepCols, col = col0 + column_of(n);
  const int rows = unit.r - half * kSpanR;
  const F* const first = global_memory<const F>(m.data);
  F v[kSpanR];
  const bool inside = col >= 0 && col < unit.cols;
  const F* at = ptx::further(first, inside && rows > 0 ? half * kSpanR * m.row + col * m.col : int64_t(0));
#pragma unroll
  for (int i = 0; i < kSpanR; ++i, at = ptx::further(at, m.row)) v[i] = inside && i < rows ? *at : F{};
  float scale = 1.f;
  if (kScaled) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kSpanR; ++i) largest = fmaxf(largest, magnitude(v[i]));
    const uint32_t mine = memory + kLargestAt + 4 * (thread + ring.stage * 2 * kStepCols);
    ptx::store_shared_32(mine, float_bits(largest));
    ptx::named_barrier(1, 128);
    const uint32_t other = half ? mine - 4 * kStepCols : mine + 4 * kStepCols;
    scale = half_scale(fmaxf(largest, bits_float(ptx::load_shared_32(other))));
  }
  ptx::wait(barriers.empty(ring.stage), ring.phase ^ 1);
  const uint32_t panel = memory + kPanelAt + ring.stage * kPanelBytes + half * kPanelSpan;
#pragma unroll
  for (int chunk = 0; chunk < 8; ++chunk) {
    const F* const eight = v + 8 * chunk;
    ptx::store_shared_128(
        panel + swizzled(n, chunk),
        {halves(eight[0], eight[1], scale), halves(eight[2], eight[3], scale),
         halves(eight[4], eight[5], scale), halves(eight[6], eight[7], scale)});
  }
  if (kScaled && half == 0)
    ptx::store_shared_32(memory + kColUnitsAt + 4 * (ring.stage * kStepCols + column_of(n)),
                         float_bits(half_unit(scale) * kShift));
  ptx::fence_async_shared();
  ptx::sync_warp();
  if (thread % 32 == 0) ptx::arrive(barriers.full(ring.stage));
  ring.advance();
}

// kCount of a strip's kParts of lora_B, under way. A part: eight of a band's 16 rows that are the warp's,
// four and those eight further. Eight lanes have a row.
constexpr int kParts = 2 * kStripRows / kHalfRows;
template <typename F, int kCount>
struct Rows {
  F v[kCount][2][kSixteens][2];

  // The first of part `part`, of the strip.
  __device__ __forceinline__ static int row_of(int part, int thread) {
    return part / 2 * kHalfRows + thread / 32 * 16 + part % 2 * 4 + thread % 32 / 8;
  }

  __device__ __forceinline__ void load(const Unit& unit, int part, int thread) {
    const Matrix& m = unit.lora_B;
    const int first = thread % 8 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      const int row = row_of(part + i / 2, thread) + i % 2 * 8;
      const F* at = global_memory<const F>(m.data) +
                    (unit.row0 + int64_t(row) * unit.period) * m.row + first * m.col;
#pragma unroll
      for (int j = 0; j < 2 * kSixteens; ++j, at += j % 2 ? m.col : 15 * m.col)
        v[i / 2][i % 2][j / 2][j % 2] =
            row < unit.rows && j / 2 * 16 + first + j % 2 < unit.r ? *at : F{};
    }
  }

  // To shared memory, of fp32 their units, too.
  __device__ __forceinline__ void store(uint32_t memory, int part, int thread) const {
    constexpr bool kScaled = sizeof(F) == 4;
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = row_of(part + i, thread);
      float scales[2] = {1.f, 1.f};
      if (kScaled)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float largest = 0.f;
#pragma unroll
          for (int j = 0; j < 2 * kSixteens; ++j)
            largest = fmaxf(largest, magnitude(v[i][u][j / 2][j % 2]));
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
        ptx::store_shared_64(rows_at(memory, (part + i) / 2, j) + of * 16 + lane % 8 / 4 * 8,
                             {halves(v[i][0][j][0], v[i][0][j][1], scales[0]),
                              halves(v[i][1][j][0], v[i][1][j][1], scales[1])});
    }
  }
};

// A strip's lora_A, and the next one's lora_B, as soon as the consumers have the strip's own in their
// registers: not before they are at work on it, which a panel beyond the ring's first says. Of a block's
// first strip they fetch that themselves.
template <typename F>
__device__ __forceinline__ void fill(const MergeTable& table, uint32_t memory, int thread) {
  const Barriers barriers{memory};
  const int lane = thread % 32;
  Ring<kPanels> ring;
  Ring<1> rows;
  Unit unit, next = unit_of(table, blockIdx.x, lane, 0);
  for (int64_t number = blockIdx.x; number < table.units;) {
    unit = next;
    number += gridDim.x;
    int part = number < table.units ? 0 : kParts;
#pragma unroll 1
    for (int step = 0; step < unit.steps || part < kParts; ++step) {
      const bool with_rows = part < kParts && (step >= kPanels || step >= unit.steps);
      Rows<F, 1> under_way;
      if (with_rows) {
        if (part == 0) next = unit_of(table, number, lane, unit.index);
        under_way.load(next, part, thread);
      }
      if (step < unit.steps)
        fill_panel<F>(unit, memory, unit.col0 + step * kStepCols, ring, thread);
      if (!with_rows) continue;
      if (part == 0) ptx::wait(barriers.rows_empty(), rows.phase);
      under_way.store(memory, part, thread);
      if (++part < kParts) continue;
      ptx::sync_warp();
      if (lane == 0) ptx::arrive(barriers.rows_full());
      rows.advance();
    }
  }
}

// ---- consume ------------------------------------------------------------------------------------

// A lane has, of both halves, rows 16 * warp + lane / 4 and 8 further, eight columns in each 32.
constexpr int kPieces = 8;
__device__ __forceinline__ constexpr int piece_row(int piece) {
  return piece / 4 * kHalfRows + piece / 2 % 2 * 8;
}
__device__ __forceinline__ constexpr int piece_col(int piece) { return piece % 2 * 32; }

// Where a lane's pieces of a matrix are, and how many rows there are from its first on.
struct Pieces {
  bf16* at;
  int64_t pitch;
  int rows;
  Pieces() = default;
  __device__ __forceinline__ Pieces(const Unit& unit, const Matrix& m, int row, int col)
      : at(global_memory<bf16>(m.data) + (unit.row0 + int64_t(row) * unit.period) * m.row + col),
        pitch(m.row * unit.period),
        rows(unit.rows - row) {}
  __device__ __forceinline__ bool has(int piece) const { return piece_row(piece) < rows; }
  __device__ __forceinline__ bf16* of(int piece) const {
    return global_memory<bf16>(at + piece_row(piece) * pitch + piece_col(piece));
  }
};

// W, and the residual, on their way to shared memory: a group of copies for each step, beyond the last
// one an empty one.
template <bool kCompensated>
struct Incoming {
  static constexpr int kStages = kCompensated ? kSlots / 2 : kSlots;
  int64_t number;  // the unit's
  int step = 0, stage = 0;
  Unit unit{};
  int left = 0;  // columns, from the lane's first on
  Pieces weight{}, rest{};

  // At a row's left end a lane reads all of 16 bytes, too: what lies before is another row's end.
  __device__ __forceinline__ void copy(Pieces& from, uint32_t to) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int count = max(0, min(left - piece_col(piece), kStrip));
      ptx::copy_16<true>(to + piece * (kSlotBytes / kPieces), from.of(piece),
                         from.has(piece) ? count * 2 : 0);
    }
    from.at += kStepCols;
  }

  // `place`: of the lane's first piece in the first slot. `row`: its first, of the strip.
  __device__ __forceinline__ void next(const MergeTable& table, uint32_t place, int row, int lane) {
    if (number < table.units) {
      if (step == 0) {
        unit = unit_of(table, number, lane, unit.index);
        const int col = unit.col0 + lane % 4 * kStrip;
        left = unit.cols - col;
        weight = Pieces(unit, unit.weight, row, col);
        if (kCompensated) rest = Pieces(unit, unit.residual, row, col);
      }
      const uint32_t to = place + stage * (kCompensated ? 2 : 1) * kSlotBytes;
      copy(weight, to);
      if (kCompensated) copy(rest, to + kSlotBytes);
      left -= kStepCols;
      if (++step == unit.steps) step = 0, number += gridDim.x;
    }
    ptx::copy_commit();
    stage = (stage + 1) % kStages;
  }
};

// The random bits of eight neighbours from `col` on, two to a word. A draw serves eight columns from a
// multiple of eight on: elsewhere they are the end of one and the beginning of the next.
__device__ __forceinline__ Words bits_of_eight(uint64_t seed, int64_t row, int col) {
  Words words = draw(seed, kStreamRound, row, col >> 3);
  const int skip = col & 7;
  if (skip) {
    Words more = draw(seed, kStreamRound, row, (col >> 3) + 1);
    uint32_t all[8] = {words.w[0], words.w[1], words.w[2], words.w[3],
                       more.w[0],  more.w[1],  more.w[2],  more.w[3]};
#pragma unroll
    for (int by = 4; by > 1; by /= 2)
      if (skip & by)
#pragma unroll
        for (int i = 0; i + by / 2 < 8; ++i) all[i] = all[i + by / 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) words.w[i] = skip & 1 ? all[i] >> 16 | all[i + 1] << 16 : all[i];
  }
  return words;
}

// Of eight neighbours from `first` on: whether a row has them all.
__device__ __forceinline__ bool is_whole(int first, int cols) {
  return first >= 0 && first + kStrip <= cols;
}

// The ends of rows, an element at a time, from where add_sums() has left them.
__device__ __forceinline__ void store_ends(const Pieces& to, int col, int cols, uint32_t slot) {
#pragma unroll 1
  for (int piece = 0; piece < kPieces; ++piece) {
    const int first = col + piece_col(piece);
    if (!to.has(piece) || is_whole(first, cols)) continue;
#pragma unroll 1
    for (int i = max(0, -first); i < min(kStrip, cols - first); ++i)
      to.of(piece)[i].bits = ptx::load_shared_16(slot + piece * (kSlotBytes / kPieces) + 2 * i);
  }
}

// A chunk of a step: half of its rows and of its columns.
constexpr int kChunkCols = kStepCols / 2, kSums = kChunkCols / 2;

// sums (kHalfRows, kChunkCols) = a band of lora_B @ `right`, the chunk's columns of a panel.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[kSums], const uint32_t (&left)[kSixteens][4],
                                         uint32_t right) {
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kMostRank; k += 16)
    ptx::wgmma<T, true>(
        sums, left[k / 16],
        operand_descriptor<true>(right + k / kSpanR * kPanelSpan, k % kSpanR), k > 0);
  ptx::wgmma_commit();
}

// Rows `half` and columns `g`: sums[4 m + 2 v + e] is element 2 m + e of piece (v, g).
template <Rounding kRounding, bool kScaled>
__device__ __forceinline__ void add_sums(const float (&sums)[kSums], int half, int g, const Unit& unit,
                                         const Pieces& weight, const Pieces& rest, int row, int col,
                                         uint32_t slot, const float (&row_units)[4],
                                         uint32_t col_units) {
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  uint4 units[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (kScaled) units[i] = ptx::load_shared_128(col_units + 4 * (kChunkCols * g + 4 * i));
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const int piece = 4 * half + 2 * v + g, first = col + piece_col(piece);
    const uint32_t place = slot + piece * (kSlotBytes / kPieces);
    uint4 w = ptx::load_shared_128(place), kept{};
    if (kCompensated) kept = ptx::load_shared_128(place + kSlotBytes);
    if (!weight.has(piece)) continue;
    Words words{};
    if (kRounding == Rounding::stochastic)
      words = bits_of_eight(unit.seed,
                            unit.drawn_row0 + int64_t(row + piece_row(piece)) * unit.period, first);
    const auto scaled = [&](int i) {
      const float sum = sums[4 * (i / 2) + 2 * v + i % 2];
      return kScaled ? __fmul_rn(__fmul_rn(sum, row_units[2 * half + v]),
                                 bits_float(word(units[i / 4], i % 4)))
                     : sum;
    };
#pragma unroll
    for (int i = 0; i < kStrip / 2; ++i) {
      Neighbours<bf16> pair{word(w, i)}, rest_pair{word(kept, i)};
      merge_pair<kRounding>(pair, rest_pair, {scaled(2 * i), scaled(2 * i + 1)}, unit.scaling,
                            words.w[i]);
      word(w, i) = pair.bits;
      if (kCompensated) word(kept, i) = rest_pair.bits;
    }
    if (is_whole(first, unit.cols)) {
      *reinterpret_cast<uint4*>(weight.of(piece)) = w;
      if (kCompensated) *reinterpret_cast<uint4*>(rest.of(piece)) = kept;
    } else {
      ptx::store_shared_128(place, w);
      if (kCompensated) ptx::store_shared_128(place + kSlotBytes, kept);
    }
  }
  ptx::sync_warp();
}

template <Rounding kRounding, typename F>
__device__ __forceinline__ void consume(const MergeTable& table, uint32_t memory, int warpgroup,
                                        int thread) {
  using Copies = Incoming<kRounding == Rounding::compensated>;
  constexpr bool kScaled = sizeof(F) == 4, kCompensated = kRounding == Rounding::compensated;
  const Barriers barriers{memory};
  const int lane = thread % 32, row = warpgroup * kOwnRows + thread / 32 * 16 + lane / 4;
  const uint32_t place = memory + kSlotAt + (warpgroup * 128 + thread) * 16;
  Copies incoming{int64_t(blockIdx.x)};
#pragma unroll 1
  for (int i = 0; i < Copies::kStages; ++i) incoming.next(table, place, row, lane);
  Ring<kPanels> ring;
  Ring<1> rows;
  Unit unit{};
  for (int64_t number = blockIdx.x; number < table.units; number += gridDim.x) {
    unit = unit_of(table, number, lane, unit.index);
    uint32_t left[2][kSixteens][4];
    float row_units[4] = {};
    if (number == blockIdx.x) {
#pragma unroll 1
      for (int part = 0; part < kParts / kConsumers; part += 2) {
        Rows<F, 2> own;
        own.load(unit, warpgroup * kParts / kConsumers + part, thread);
        own.store(memory, warpgroup * kParts / kConsumers + part, thread);
      }
      ptx::sync_warp();  // a warp has fetched its own rows
    } else {
      ptx::wait(barriers.rows_full(), rows.phase);
      rows.advance();
    }
#pragma unroll
    for (int i = 0; i < 2 * kSixteens; ++i) {
      const uint32_t at = rows_at(memory, warpgroup * 2 + i / kSixteens, i % kSixteens);
      uint4 four = ptx::load_shared_128(at + thread * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) left[i / kSixteens][i % kSixteens][j] = word(four, j);
    }
    if (kScaled)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        row_units[i] =
            bits_float(ptx::load_shared_32(memory + kRowUnitsAt + 4 * (row + piece_row(2 * i))));
    ptx::sync_warp();
    if (lane == 0) ptx::arrive(barriers.rows_empty());
    int col = unit.col0 + lane % 4 * kStrip;
    Pieces weight(unit, unit.weight, row, col), rest{};
    if (kCompensated) rest = Pieces(unit, unit.residual, row, col);
#pragma unroll 1
    for (int step = 0; step < unit.steps; ++step) {
      float sums[2][kSums];  // of two chunks: one is added while the other is multiplied
      const uint32_t panel = memory + kPanelAt + ring.stage * kPanelBytes;
      const auto start = [&](int chunk) {
        multiply<HalfOf<F>>(sums[chunk % 2], left[chunk / 2],
                            panel + chunk % 2 * kChunkCols * kRowBytes);
      };
      ptx::wait(barriers.full(ring.stage), ring.phase);
      start(0);
      start(1);
      ptx::copy_wait<Copies::kStages - 1>();
      const uint32_t slot = place + incoming.stage * (kCompensated ? 2 : 1) * kSlotBytes;
      const uint32_t col_units =
          memory + kColUnitsAt + 4 * (ring.stage * kStepCols + lane % 4 * kStrip);
#pragma unroll
      for (int chunk = 0; chunk < 4; ++chunk) {
        if (chunk < 3) ptx::wgmma_wait<1>();
        else ptx::wgmma_wait<0>();
        ptx::hold(sums[chunk % 2]);
        add_sums<kRounding, kScaled>(sums[chunk % 2], chunk / 2, chunk % 2, unit, weight, rest, row,
                                     col, slot, row_units, col_units);
        if (chunk < 2) start(chunk + 2);
      }
      if (lane == 0) ptx::arrive(barriers.empty(ring.stage));
      ring.advance();
      if (col < 0 || col + piece_col(1) + kStrip > unit.cols) {
        store_ends(weight, col, unit.cols, slot);
        if (kCompensated) store_ends(rest, col, unit.cols, slot + kSlotBytes);
      }
      incoming.next(table, place, row, lane);
      col += kStepCols, weight.at += kStepCols, rest.at += kStepCols;
    }
  }
  ptx::copy_wait<0>();
}

// ---- The kernel ---------------------------------------------------------------------------------

template <Rounding kRounding, typename F>
__global__ void __launch_bounds__(kThreadsSm90, 1)
    merge_sm90_kernel(const __grid_constant__ MergeTable table) {
  const uint32_t memory = ptx::shared_memory();
  const Barriers barriers{memory};
  if (threadIdx.x == 0) {
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::barrier_init(barriers.full(panel), 4);                // warps
      ptx::barrier_init(barriers.empty(panel), 4 * kConsumers);
    }
    ptx::barrier_init(barriers.rows_full(), 4);
    ptx::barrier_init(barriers.rows_empty(), 4 * kConsumers);
  }
  __syncthreads();
  const int warpgroup = int(ptx::shuffle(threadIdx.x / 128, 0));  // known to be one for a warp
  const int thread = int(threadIdx.x) % 128;
  if (warpgroup == kConsumers) {
    fill<F>(table, memory, thread);
  } else {
    consume<kRounding, F>(table, memory, warpgroup, thread);
  }
}

template <typename F>
constexpr void (*kKernels[3])(MergeTable) = {merge_sm90_kernel<Rounding::nearest, F>,
                                             merge_sm90_kernel<Rounding::stochastic, F>,
                                             merge_sm90_kernel<Rounding::compensated, F>};

// ---- The launch ---------------------------------------------------------------------------------

bool can_be_sm90(const MergeLayer& layer, Rounding rounding) {
  const Matrix &weight = layer.weight, &rest = layer.residual;
  const bool alike = rest.col == 1 && ((rest.row - weight.row) & 7) == 0 &&
                     offset_of(rest, 0) == offset_of(weight, 0);
  const int64_t most = INT32_MAX - 3 * kStepCols;  // columns are 32-bit, past a row's end too
  return weight.col == 1 && layer.r <= kMostRank && layer.k <= most &&
         (rounding != Rounding::compensated || alike);
}

}  // namespace

// Steps of a unit: so many that the blocks end together and do not begin a strip too often. That takes
// the consumers half a step, and in units of few steps `fill` has parts of lora_B left to fetch, for two
// steps or more: both by an estimate from the machine code, not measured.
cudaError_t sm90_merge(MergeLayer* layers, int count, bool narrow_factors, Rounding rounding,
                       int multiprocessors, MergeTable& table, MergeKernel& kernel) {
  constexpr int kChoices[] = {1, 2, 3, 4, 6, 8, 11, 16, 22, 32};
  int64_t units[std::size(kChoices)] = {};
  for (int i = 0; i < count; ++i) {
    if (!can_be_sm90(layers[i], rounding)) return cudaErrorInvalidValue;
    if (layers[i].r == 0 || layers[i].n == 0 || layers[i].k == 0) continue;
    const Cut cut(layers[i]);
    for (size_t j = 0; j < std::size(kChoices); ++j) units[j] += cut.units(kChoices[j]);
  }
  const auto time = [&](int64_t of_all, int steps) {
    return ceil_div(of_all, multiprocessors) * std::max(2 * steps + 1, steps + 5);
  };
  size_t best = 0;
  for (size_t j = 1; j < std::size(kChoices); ++j)
    if (time(units[j], kChoices[j]) < time(units[best], kChoices[best])) best = j;
  if (units[best] > INT32_MAX) return cudaErrorInvalidConfiguration;
  table.unit_steps = kChoices[best];
  table.units = 0;
  for (int i = 0; i < count; ++i) {
    layers[i].first_block = uint32_t(table.units);
    if (layers[i].r != 0 && layers[i].n != 0 && layers[i].k != 0)
      table.units += int(Cut(layers[i]).units(kChoices[best]));
  }
  kernel = {(narrow_factors ? kKernels<bf16> : kKernels<float>)[int(rounding)], kSharedSm90,
            kThreadsSm90};
  return cudaSuccess;
}

}  // namespace relora
