// W (n, k) += scaling * lora_B (n, r) @ lora_A (r, k), in place, for a list of layers.
//
//   acc = sum_i B[row, i] * A[i, col]           fp32, on tensor cores
//   d   = fl32(scaling * acc)
//   v   = fl32(W + d)                           compensated: fl32(fl32(W + residual) + d)
//   W   = round(v)                              to nearest, or stochastically
//   compensated: residual = round(v - W)
//
// d and v are rounded one by one, never contracted to an fma: the reference and the Triton kernel
// do the same, so the stored bits agree wherever the fp32 sums do. r is never split.
//
// The product: 16-bit factors multiply exactly. Of fp32 factors 11 bits are kept where W has 16. As
// tf32; or, resident, as fp16 scaled by a power of two for each row of lora_B and column of lora_A:
// then 11 bits of what is 2^-28 of the row's or column's largest or more, and below an error of up to
// 2^-39 of the largest (numerics.cuh). For an fp32 W each is the sum of two tf32, and three of the
// four products are taken, which keeps 2^-22: three times the tensor work, and still 1.7 times as
// fast as the fp32 pipes (12.9 GFLOP at some 300 TFLOP/s against 4.3 at 60, for 4096 x 4096 at
// r = 128).
//
// Streamed (any r, any factors): lora_A's stages of 64 bytes along r pass through a ring, lora_B's
// stay if r <= 128 (16-bit: 256).
// Resident (fp32 factors of a bf16 W, r <= 128, to nearest or compensated): a block holds all of r
// as fp16, of up to 256 rows of lora_B for good, and of lora_A for 128 columns at a time, which it
// multiplies by all of them. It loads a tile's lora_A into the registers that the accumulators take
// later: 64 KB are under way at once, and each column's largest element is known before the first
// is rounded.
//
// What bounds them on an H200, for each 128 x 128 tile of a whole model's bf16 W with fp32 factors,
// r = 128; by data sheets, published microbenchmarks and the machine code, not measured here. 88 %
// of the copy rate are 19 ns, or some 4700 cycles of one of the multiprocessors:
//                                               streamed           resident
//   HBM      W in and out, 64 KB; factors       88 %               88 %
//   L2       to shared memory, and W, at        64 + 8 + 32 KB,    32 + 8 + 32 KB,
//            some 6.8 TB/s                      80 %               56 %
//   tensor   by mma.sync, some 62 % of peak     tf32, 70 %         fp16, 35 %
//   shared   in and out                         320 KB, 53 %       180 KB, 30 %
//   issue    instructions of a warp, to         some 6500, 140 %   some 2200, 46 %
//            nearest (16-bit factors: 3800)
// Both:
// - a warp takes 64 x 64 of a tile: 16 reads of 16 bytes a lane for 64 products. 64 x 32 would read
//   half as much again;
// - two blocks share a multiprocessor that has 202 KB (sm_90, sm_100): one's loads and sums go
//   under the other's products;
// - W's tile is fetched into L2 before its product, and streamed its first strips into registers;
// - accumulators never leave registers: tensor-core columns are permuted so that each lane holds
//   eight neighbours of a row, which it loads, rounds by one random draw and stores by itself.
#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "mma.cuh"

namespace relora {
namespace {

struct MergeTable {
  const MergeLayer* layers;  // in device memory, or null: `first` holds them all
  int count;
  int tiles_per_block;  // in one row
  Rounding rounding;
  MergeLayer first[kInlineLayers];
};
static_assert(sizeof(MergeTable) <= 4096, "kernel parameters");

__global__ void write_table_kernel(const __grid_constant__ MergeTable chunk, MergeLayer* to) {
  constexpr int kWords = sizeof(MergeLayer) / 8;
  for (int i = int(threadIdx.x); i < chunk.count * kWords; i += int(blockDim.x))
    reinterpret_cast<uint64_t*>(to)[i] = reinterpret_cast<const uint64_t*>(chunk.first)[i];
}

// The layer that this block works for, to shared memory: the last that begins at or before it.
template <uint32_t MergeLayer::*kFirst>
__device__ __forceinline__ void find_layer(const MergeTable& table, MergeLayer& layer, int& found) {
  const MergeLayer* layers = table.layers ? table.layers : table.first;
  for (int i = int(threadIdx.x); i < table.count; i += int(blockDim.x))
    if (layers[i].*kFirst <= blockIdx.x &&
        (i + 1 == table.count || blockIdx.x < layers[i + 1].*kFirst))
      found = i;
  __syncthreads();
  for (int i = int(threadIdx.x); i < int(sizeof(MergeLayer) / 8); i += int(blockDim.x))
    reinterpret_cast<uint64_t*>(&layer)[i] = reinterpret_cast<const uint64_t*>(layers + found)[i];
  __syncthreads();
}

extern __shared__ uint4 dynamic_shared[];

// ---- The product, streamed ----------------------------------------------------------------------

constexpr int kRows = 128, kCols = 128;  // a tile of W
constexpr int kWarp = 64;                // rows and columns of a warp's part of it
constexpr int kThreads = 128, kBlocksAnSM = 2;
struct Place { int row, col; };
constexpr int kRing = 4;   // stages of lora_A in flight
constexpr int kPanel = 8;  // stages of lora_B that stay, if all of r fits

// A stage is 64 bytes along r of either factor: kDepth steps.
template <typename F>
constexpr int kDepth = 64 / int(sizeof(F));

struct alignas(16) Slot { unsigned char bytes[64 * 128]; };
struct Stages {
  Slot A[kRing];   // [kDepth][kCols], where swizzled_A says
  Slot B[kPanel];  // [kRows][kDepth], where swizzled_B says
};

// In step s of a stage's two, lane 4 g + t multiplies words 8 s + 2 t and 8 s + 2 t + 1 of its row
// of B (a word: one fp32 or two neighbours) with the same elements of r in A: two or four rows of
// its slot. The exclusive ors on the 16-byte chunks spread the rows that are read at once over all
// banks.
template <typename F>
__device__ __forceinline__ int swizzled_A(int row, int chunk) {
  return row * kCols * int(sizeof(F)) + ((chunk ^ (row / (kDepth<F> / 8) % 4 * 2)) * 16);
}
__device__ __forceinline__ int swizzled_B(int row, int chunk) {
  return row * 64 + ((chunk ^ (row / 2 % 2 * 2)) * 16);
}

template <typename F>
__host__ __device__ __forceinline__ bool is_wide(const Matrix& m) {
  return m.col == 1 && m.row * int64_t(sizeof(F)) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

// 16 bytes of a slot: the elements of `m` from (row, col) on, zeros from `valid` on.
template <typename F>
__device__ __forceinline__ void fill_chunk(void* to, const Matrix& m, bool wide, int64_t row,
                                           int64_t col, int64_t valid) {
  constexpr int kElements = 16 / int(sizeof(F));
  const int count = int(valid < 0 ? 0 : min(valid, int64_t(kElements)));
  const F* from = global_memory<const F>(m.data);  // a valid address even where nothing is read
  if (count) from += row * m.row + col * m.col;
  if (wide) return copy_async<16>(to, from, count * int(sizeof(F)));
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    F* at = static_cast<F*>(to) + i;
    if constexpr (sizeof(F) == 4)
      copy_async<4>(at, i < count ? from + i * m.col : from, i < count ? 4 : 0);
    else
      *at = i < count ? from[i * m.col] : F{};
  }
}

// Stage `chunk` of either factor: lora_A's columns from `begin` on, or lora_B's rows.
template <typename F, bool kIsA>
__device__ __forceinline__ void fill(Slot& slot, const MergeLayer& layer, bool wide, int chunk,
                                     int64_t begin) {
  constexpr int kElements = 16 / int(sizeof(F)), kChunks = kIsA ? kCols / kElements : 4;
#pragma unroll 1
  for (int id = int(threadIdx.x); id < int(sizeof(Slot)) / 16; id += kThreads) {
    const int row = id / kChunks, at = id % kChunks;
    if (kIsA) {
      const int64_t depth = int64_t(chunk) * kDepth<F> + row, col = begin + at * kElements;
      fill_chunk<F>(slot.bytes + swizzled_A<F>(row, at), layer.lora_A, wide, depth, col,
                    depth < layer.r ? layer.k - col : 0);
    } else {
      const int64_t depth = int64_t(chunk) * kDepth<F> + at * kElements;
      fill_chunk<F>(slot.bytes + swizzled_B(row, at), layer.lora_B, wide, begin + row, depth,
                    begin + row < layer.n ? layer.r - depth : 0);
    }
  }
}

// Column col + j of A as the words that lane 4 g + t multiplies in a step.
template <typename F>
__device__ __forceinline__ void load_columns(uint32_t (&out)[4][2], const Slot& A, int col, int t,
                                             int step) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int word = 8 * step + 2 * t + i;
    if constexpr (sizeof(F) == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(A.bytes + swizzled_A<F>(word, col / 4));
      out[0][i] = v.x, out[1][i] = v.y, out[2][i] = v.z, out[3][i] = v.w;
    } else {  // neighbours along r lie in two rows
      uint2 v[2];
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
        v[odd] = *reinterpret_cast<const uint2*>(
            A.bytes + swizzled_A<F>(2 * word + odd, col / 8) + col % 8 * 2);
      out[0][i] = (v[0].x & 0xFFFFu) | v[1].x << 16;
      out[1][i] = v[0].x >> 16 | (v[1].x & 0xFFFF0000u);
      out[2][i] = (v[0].y & 0xFFFFu) | v[1].y << 16;
      out[3][i] = v[0].y >> 16 | (v[1].y & 0xFFFF0000u);
    }
  }
}

// fp32 words as tf32 and, where `rest` is given, what that leaves as another tf32.
template <int kCount>
__device__ __forceinline__ void split(uint32_t (&words)[kCount], uint32_t* rest) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t tf32 = to_tf32(words[i]);
    if (rest) rest[i] = to_tf32(float_bits(__fsub_rn(bits_float(words[i]), bits_float(tf32))));
    words[i] = tf32;
  }
}

// acc[m][4 h + j] gains one stage: m counts 16 rows, h 32 columns, and j is load_columns'. Which
// column of W stands at which column of a tensor-core tile is free: so that a lane ends up with
// eight neighbours of one row, tile j takes columns 4 g + j. See strip_value.
template <typename F, bool kSplit>
__device__ __forceinline__ void multiply(float (&acc)[4][8][4], const Slot& A, const Slot& B,
                                         int warp_row, int warp_col) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  constexpr bool kTf32 = sizeof(F) == 4;
#pragma unroll 1  // both steps at once need more registers than sm_100 and 120 have to spare
  for (int step = 0; step < 2; ++step) {
    uint32_t cols[2][4][2], cols_rest[2][4][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      load_columns<F>(cols[h], A, warp_col + 32 * h + 4 * g, t, step);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (kTf32) split(cols[h][j], kSplit ? cols_rest[h][j] : nullptr);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t rows[4], rows_rest[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * m + 8 * half + g;
        const uint2 v = *reinterpret_cast<const uint2*>(
            B.bytes + swizzled_B(row, 2 * step + t / 2) + t % 2 * 8);
        rows[half] = v.x, rows[half + 2] = v.y;
      }
      if (kTf32) split(rows, kSplit ? rows_rest : nullptr);
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // small products first; no accumulator twice in a row
#pragma unroll
        for (int j = 0; kSplit && j < 4; ++j) mma<F>(acc[m][4 * h + j], rows_rest, cols[h][j]);
#pragma unroll
        for (int j = 0; kSplit && j < 4; ++j) mma<F>(acc[m][4 * h + j], rows, cols_rest[h][j]);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<F>(acc[m][4 * h + j], rows, cols[h][j]);
      }
    }
  }
}

// ---- The product, resident ----------------------------------------------------------------------

constexpr int kMostRowTiles = 2;  // of a block: tiles one below the other
constexpr int kLoads = 32;        // of 16 bytes, of a thread at once

struct alignas(16) Panel { unsigned char bytes[128 * kMostRank * 2]; };  // fp16 [line][r]
struct Resident {
  Panel A;  // a line: a column of A, or a row of B
  Panel B[kMostRowTiles];
  float A_units[kCols], B_units[kMostRowTiles * kRows];  // what a line is to be multiplied by
};

// Eight neighbours along r of a line. `spread`, a number whose lower three bits differ, most of all
// the lowest, between lines that are written or read at once, puts their chunks in other banks.
__device__ __forceinline__ uint4& panel_chunk(Panel& panel, int line, int spread, int chunk) {
  const int turned = (spread & 1) << 2 | (spread & 2) | (spread >> 2 & 1);
  return reinterpret_cast<uint4*>(panel.bytes)[line * (kMostRank / 8) + (chunk ^ turned)];
}

__device__ __forceinline__ float larger(float a, float4 v) {
  return fmaxf(fmaxf(fmaxf(a, fabsf(v.x)), fmaxf(fabsf(v.y), fabsf(v.z))), fabsf(v.w));
}
__device__ __forceinline__ float component(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// A thread's 128 numbers of a panel's 128 x 128. A load is of four neighbours in a matrix's row.
//   lora_B  a line is a row. A warp's 32 lines follow each other; four lanes have each eighth of
//           them, every fourth chunk of r. Loads 8 b + 2 c and the next: line b's chunk c.
//   lora_A  a line is a column. Eight lanes have four columns each of a warp's 32, the others other
//           chunks of r: every fourth. Loads 8 c ... 8 c + 7: chunk c of the four columns.
template <bool kIsA>
__device__ __forceinline__ Place first_load() {
  const int lane = lane_id(), warp = int(threadIdx.x) / 32;
  return kIsA ? Place{lane / 8 * 8, warp * 32 + lane % 8 * 4}
              : Place{warp * 32 + lane / 4, lane % 4 * 8};
}
template <bool kIsA>
__host__ __device__ constexpr Place load_step(int i) {  // from the first
  return kIsA ? Place{i / 8 * 32 + i % 8, 0} : Place{i / 8 * 8, i / 2 % 4 * 32 + i % 2 * 4};
}

template <bool kIsA, bool kWide>
__device__ __forceinline__ void load_panel(float4 (&v)[kLoads], const float* from, const Matrix& m,
                                           int rows, int cols) {
  const Place first = first_load<kIsA>();
  const float* at = from + first.row * m.row + first.col * m.col;
  rows -= first.row, cols -= first.col;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const Place step = load_step<kIsA>(i), next = load_step<kIsA>(i + 1);
    float4& to = v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (step.row < rows) {
      if (kWide) {
        if (step.col < cols) to = *reinterpret_cast<const float4*>(at + step.col);  // all of it
      } else {
        if (step.col < cols) to.x = at[step.col * m.col];
        if (step.col + 1 < cols) to.y = at[(step.col + 1) * m.col];
        if (step.col + 2 < cols) to.z = at[(step.col + 2) * m.col];
        if (step.col + 3 < cols) to.w = at[(step.col + 3) * m.col];
      }
    }
    at += (next.row - step.row) * m.row;
  }
}

// Lines `begin` ... `begin` + 127 of a factor, zeros beyond its ends, and their units.
template <bool kIsA>
__device__ __forceinline__ void fill_panel(Panel& panel, float* units, const MergeLayer& layer,
                                           bool wide, int64_t begin) {
  const Matrix& m = kIsA ? layer.lora_A : layer.lora_B;
  const int64_t row0 = kIsA ? 0 : begin, col0 = kIsA ? begin : 0;
  const int rows = int(min((kIsA ? layer.r : layer.n) - row0, int64_t(128)));
  const int cols = int(min((kIsA ? layer.k : layer.r) - col0, int64_t(128)));
  const float* const from = global_memory<const float>(m.data) + row0 * m.row + col0 * m.col;
  float4 v[kLoads];
  if (!kIsA || wide) load_panel<kIsA, true>(v, from, m, rows, cols);
  else load_panel<kIsA, false>(v, from, m, rows, cols);
  const int lane = lane_id();
#pragma unroll
  for (int group = 0; group < 4; ++group) {  // lines that the thread has a part of
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (kIsA) largest = fmaxf(largest, fabsf(component(v[i], group)));
      else if (i / 8 == group) largest = larger(largest, v[i]);
    }
#pragma unroll
    for (int with = kIsA ? 8 : 1; with < (kIsA ? 32 : 4); with *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, with));
    const float scale = half_scale(largest);
    const Place first = first_load<kIsA>();
    const int line = kIsA ? first.col + group : first.row + 8 * group;
    if (kIsA ? lane < 8 : lane % 4 == 0) units[line] = half_unit(scale);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float part[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        part[i] = scale * (kIsA ? component(v[8 * c + i], group)
                                : component(v[8 * group + 2 * c + i / 4], i % 4));
      panel_chunk(panel, line, kIsA ? line / 4 : line, c * 4 + (kIsA ? lane / 8 : lane % 4)) = {
          pair_nearest<fp16>({part[0], part[1]}).bits, pair_nearest<fp16>({part[2], part[3]}).bits,
          pair_nearest<fp16>({part[4], part[5]}).bits, pair_nearest<fp16>({part[6], part[7]}).bits};
    }
  }
}

// acc += B A over all of r, 32 steps of it at a time: lane 4 g + t multiplies elements 8 t to 8 t + 7
// of them, in two tensor-core products. acc: as multiply()'s.
__device__ __forceinline__ void multiply_panels(float (&acc)[4][8][4], Panel& A, Panel& B, int r,
                                                int warp_row, int warp_col) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int first = 0; first < r; first += 32) {
    const int chunk = first / 8 + t;
    uint4 cols[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int line = warp_col + j / 4 * 32 + 4 * g + j % 4;
      cols[j] = panel_chunk(A, line, g, chunk);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int line = warp_row + 16 * m + g;
      const uint4 upper = panel_chunk(B, line, g, chunk);
      const uint4 lower = panel_chunk(B, line + 8, g, chunk);
      const uint32_t rows[2][4] = {{upper.x, lower.x, upper.y, lower.y},
                                   {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t col[2] = {step ? cols[j].z : cols[j].x, step ? cols[j].w : cols[j].y};
          mma<fp16>(acc[m][j], rows[step], col);
        }
      }
    }
  }
}

// ---- The sum ------------------------------------------------------------------------------------

// Eight neighbouring elements of one row: 16 bytes of a 16-bit W, one random draw.
constexpr int kStrip = 8, kStrips = 16;  // strips of a lane in a tile
template <typename T>
struct Strip { uint4 v[sizeof(T) / 2]; };

// Neighbours 2 i and 2 i + 1.
__device__ __forceinline__ uint32_t& word(uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
template <typename T>
__device__ __forceinline__ Neighbours<T> get_pair(Strip<T>& strip, int i) {
  return {word(strip.v[0], i)};
}
__device__ __forceinline__ Neighbours<float> get_pair(Strip<float>& strip, int i) {
  uint4& v = strip.v[i / 2];
  return {bits_float(word(v, i % 2 * 2)), bits_float(word(v, i % 2 * 2 + 1))};
}
template <typename T>
__device__ __forceinline__ void set_pair(Strip<T>& strip, int i, Neighbours<T> pair) {
  word(strip.v[0], i) = pair.bits;
}
__device__ __forceinline__ void set_pair(Strip<float>& strip, int i, Neighbours<float> pair) {
  uint4& v = strip.v[i / 2];
  word(v, i % 2 * 2) = float_bits(pair.first), word(v, i % 2 * 2 + 1) = float_bits(pair.second);
}

template <typename T>
__device__ __forceinline__ void load_strip(Strip<T>& to, const T* from) {
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) to.v[i] = reinterpret_cast<const uint4*>(from)[i];
}
template <typename T>
__device__ __forceinline__ void store_strip(T* to, const Strip<T>& from) {
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) reinterpret_cast<uint4*>(to)[i] = from.v[i];
}

// Strips of W and of the residual on their way into registers at a time. Those of a 16-bit W set
// out before the product. More of them, or an fp32 W's, would not fit beside 128 accumulators: with
// four ptxas spills on sm_100 and 120.
template <typename T>
constexpr int kWindow = sizeof(T) == 2 ? 3 : 1;
template <typename T>
constexpr int kRestWindow = sizeof(T) == 2 ? 2 : 1;
template <typename T>
constexpr int kEarly = sizeof(T) == 2 ? kWindow<T> : 0;
template <Rounding kRounding>
constexpr int kResidentWindow = kRounding == Rounding::nearest ? 5 : 3;  // as many as fit
template <typename T>
constexpr int kNarrowRows = sizeof(T) == 2 ? 4 : 2;  // of a lane, where W has no 16-byte accesses

__device__ __forceinline__ Place strip_place(int strip, int lane, int warp_row, int warp_col) {
  return {warp_row + strip / 2 * 8 + lane / 4, warp_col + strip % 2 * 32 + lane % 4 * 8};
}
__device__ __forceinline__ float strip_value(const float (&acc)[4][8][4], int strip, int i) {
  return acc[strip / 4][strip % 2 * 4 + i % 4][strip / 2 % 2 * 2 + i / 4];
}

template <Rounding kRounding, typename T>
__device__ __forceinline__ void merge_pair(Neighbours<T>& w, Neighbours<T>& rest,
                                           Neighbours<float> product, float scaling,
                                           uint32_t rand) {
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  Neighbours<float> v = widen(w);
  if (kCompensated) {
    const Neighbours<float> kept = widen(rest);
    v = {__fadd_rn(v.first, kept.first), __fadd_rn(v.second, kept.second)};
  }
  v = {__fadd_rn(v.first, __fmul_rn(scaling, product.first)),
       __fadd_rn(v.second, __fmul_rn(scaling, product.second))};
  w = kRounding == Rounding::stochastic ? pair_stochastic<T>(v, rand) : pair_nearest<T>(v);
  if (kCompensated) {
    const Neighbours<float> stored = widen(w);
    rest = pair_nearest<T>(
        {__fsub_rn(v.first, stored.first), __fsub_rn(v.second, stored.second)});
  }
}

// What a block does. In shared memory rather than in registers, which the product needs.
struct Work {
  int64_t row0, col0;  // of its first tile; the others follow in the same rows
  int rows, tiles, chunks;
  bool stays;                 // streamed: every stage of lora_B has a slot of its own
  bool wide_A, wide_B, wide;  // 16-byte accesses: to the factors, to W and the residual
};

template <typename T>
__host__ __device__ __forceinline__ bool is_wide_sum(const MergeLayer& layer, Rounding rounding) {
  return layer.k % kStrip == 0 && is_wide<T>(layer.weight) &&
         (rounding != Rounding::compensated || is_wide<T>(layer.residual));
}

template <typename T, typename F>
__device__ __forceinline__ Work work_of(const MergeTable& table, const MergeLayer& layer) {
  const int col_tiles = int((layer.k + kCols - 1) / kCols), rows = int(layer.row_tiles) * kRows;
  const int blocks_a_row = (col_tiles + table.tiles_per_block - 1) / table.tiles_per_block;
  const int block = int(blockIdx.x - layer.first_block);
  const int first_tile = block % blocks_a_row * table.tiles_per_block;
  Work work;
  work.row0 = int64_t(block / blocks_a_row) * rows;
  work.col0 = int64_t(first_tile) * kCols;
  work.rows = int(min(layer.n - work.row0, int64_t(rows)));
  work.tiles = min(col_tiles - first_tile, table.tiles_per_block);
  work.chunks = int((layer.r + kDepth<F> - 1) / kDepth<F>);
  work.stays = work.chunks <= kPanel;
  work.wide_A = is_wide<F>(layer.lora_A);
  work.wide_B = is_wide<F>(layer.lora_B);
  work.wide = is_wide_sum<T>(layer, table.rounding);
  return work;
}

// A thread's rows of the tile on their way from HBM into L2.
template <typename T>
__device__ __forceinline__ void prefetch_tile(const Matrix& m, const MergeLayer& layer,
                                              const Work& work, int tile) {
  const int64_t col = work.col0 + tile * kCols;
  if (m.col != 1) return;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < work.rows; i += kThreads) {
    const T* const row = global_memory<const T>(m.data) + (work.row0 + i) * m.row;
    const T* const end = row + min(layer.k, col + kCols);
#pragma unroll 1
    for (const T* at = row + col; at < end; at += 32 / sizeof(T)) prefetch_L2(at);
  }
}

// A lane's strips of a tile of W, or of the residual: where the first begins, in the tile, and how
// much of W there is from there on.
struct Share {
  Place first;
  int rows, cols;
  __device__ __forceinline__ Share(const MergeLayer& layer, const Work& work, int tile,
                                   int warp_row, int warp_col)
      : first(strip_place(0, lane_id(), warp_row, warp_col)),
        rows(work.rows - first.row),
        cols(int(min(layer.k - work.col0 - tile * kCols, int64_t(kCols))) - first.col) {}
  __device__ __forceinline__ bool has(int strip) const {
    return strip < kStrips && strip / 2 * 8 < rows && strip % 2 * 32 < cols;
  }
};

// One strip after the other.
template <typename T>
struct Strips {
  T* at;
  int64_t eight_rows;
  __device__ __forceinline__ Strips(const Matrix& m, const Work& work, int tile, Place first)
      : at(global_memory<T>(m.data) + (work.row0 + first.row) * m.row + work.col0 + tile * kCols +
           first.col),
        eight_rows(8 * m.row) {}
  // Where strip `strip + by` is, from `strip` on.
  __device__ __forceinline__ T* ahead(int strip, int by) const {
    return at + (strip % 2 + by) / 2 * eight_rows + ((strip + by) % 2 - strip % 2) * 32;
  }
  // Strip `strip + by` into its place in a window.
  template <int kWindow>
  __device__ __forceinline__ void load(Strip<T> (&window)[kWindow], int strip, int by,
                                       const Share& share) const {
    if (share.has(strip + by)) load_strip<T>(window[(strip + by) % kWindow], ahead(strip, by));
  }
};

// A product as the tensor cores leave it, times what its row's and its column's units are worth.
// One after the other: the units' own product may be an infinity, of which a zero would make NaN.
struct AsItIs {
  __device__ __forceinline__ float operator()(float v, int, int) const { return v; }
};
struct InUnits {
  const float *rows, *cols;
  __device__ __forceinline__ float operator()(float v, int row, int col) const {
    return __fmul_rn(__fmul_rn(v, rows[row]), cols[col]);  // exact
  }
};

// The sum of a tile. `window` holds its first kEarly strips.
template <Rounding kRounding, int kEarly, typename T, int kWindow, typename Units>
__device__ __forceinline__ void merge_wide(const float (&acc)[4][8][4], Units units,
                                           Strip<T> (&window)[kWindow], const MergeLayer& layer,
                                           const Work& work, int tile, int warp_row,
                                           int warp_col) {
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  const Share share(layer, work, tile, warp_row, warp_col);
  Strips<T> at(layer.weight, work, tile, share.first);
  Strips<T> rest_at(kCompensated ? layer.residual : layer.weight, work, tile, share.first);
  Strip<T> rest_window[kRestWindow<T>];
#pragma unroll
  for (int s = kEarly; s < kWindow; ++s) at.load(window, 0, s, share);
#pragma unroll
  for (int s = 0; s < kRestWindow<T>; ++s)
    if (kCompensated) rest_at.load(rest_window, 0, s, share);
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    Strip<T> w = window[s % kWindow], rest = rest_window[s % kRestWindow<T>];
    at.load(window, s, kWindow, share);
    if (kCompensated) rest_at.load(rest_window, s, kRestWindow<T>, share);
    if (share.has(s)) {
      const int row = share.first.row + s / 2 * 8, col = share.first.col + s % 2 * 32;
      Words words{};
      if (kRounding == Rounding::stochastic)
        words = draw(layer.seed, kStreamRound, layer.first_row + work.row0 + row,
                     (work.col0 + tile * kCols + col) / kStrip);
#pragma unroll
      for (int i = 0; i < kStrip / 2; ++i) {
        Neighbours<T> pair = get_pair(w, i), rest_pair{};
        if (kCompensated) rest_pair = get_pair(rest, i);
        merge_pair<kRounding>(pair, rest_pair,
                              {units(strip_value(acc, s, 2 * i), row, col + 2 * i),
                               units(strip_value(acc, s, 2 * i + 1), row, col + 2 * i + 1)},
                              layer.scaling, words.w[i]);
        set_pair(w, i, pair);
        if (kCompensated) set_pair(rest, i, rest_pair);
      }
      store_strip(at.at, w);
      if (kCompensated) store_strip(rest_at.at, rest);
    }
    at.at = at.ahead(s, 1);
    if (kCompensated) rest_at.at = rest_at.ahead(s, 1);
  }
}

// The sum of a tile whose W or residual takes no 16-byte accesses, an element at a time: the
// accumulators go through shared memory, eight rows at a time, so that neighbouring lanes take
// neighbouring elements. In odd rows neighbouring chunks of 16 bytes have changed places: two rows,
// which are written at once, lie in all banks. `scratch`: 2 KB of this warp's own.
template <Rounding kRounding, typename T, typename Units>
__device__ __forceinline__ void merge_narrow(const float (&acc)[4][8][4], Units units,
                                             const MergeLayer& layer, const Work& work, int tile,
                                             int warp_row, int warp_col, float* scratch) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  constexpr int kRowsAtOnce = kNarrowRows<T>;
  const Matrix &wm = layer.weight, &rm = layer.residual;
  const int64_t col = work.col0 + tile * kCols + warp_col + lane;  // and 32 further on
#pragma unroll 1
  for (int piece = 0; piece < kStrips / 2; ++piece) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const Place at = strip_place(s, lane, warp_row, warp_col);
      if (s / 2 == piece)
#pragma unroll
        for (int i = 0; i < kStrip; i += 4)
          reinterpret_cast<float4*>(scratch)[(g * kWarp + s % 2 * 32 + t * 8 + i) / 4 ^ g % 2] =
              make_float4(units(strip_value(acc, s, i), at.row, at.col + i),
                          units(strip_value(acc, s, i + 1), at.row, at.col + i + 1),
                          units(strip_value(acc, s, i + 2), at.row, at.col + i + 2),
                          units(strip_value(acc, s, i + 3), at.row, at.col + i + 3));
    }
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < 8; first += kRowsAtOnce) {
      const int tile_row = warp_row + piece / 2 * 16 + piece % 2 * 8 + first;
      const int64_t row = work.row0 + tile_row;
      T* const w_at = global_memory<T>(wm.data) + row * wm.row + col * wm.col;
      T* const r_at = global_memory<T>(rm.data) + row * rm.row + col * rm.col;
      // A row's elements at col and 32 further on, as if they were neighbours.
      Neighbours<T> w[kRowsAtOnce] = {}, rest[kRowsAtOnce] = {};
      auto inside = [&](int i) {
        return tile_row + i / 2 < work.rows && col + i % 2 * 32 < layer.k;
      };
#pragma unroll
      for (int i = 0; i < 2 * kRowsAtOnce; ++i) {
        if (!inside(i)) continue;
        set_half(w[i / 2], i % 2, w_at[i / 2 * wm.row + i % 2 * 32 * wm.col]);
        if (kCompensated) set_half(rest[i / 2], i % 2, r_at[i / 2 * rm.row + i % 2 * 32 * rm.col]);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        uint32_t rand = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (kRounding != Rounding::stochastic || !inside(2 * i + half)) continue;
          const Words words = draw(layer.seed, kStreamRound, layer.first_row + row + i,
                                   col / kStrip + half * 4);
          // bits16 by masks: choosing by index or by condition would put the words in local memory.
          const uint32_t second = 0u - (lane >> 1 & 1), later = 0u - (lane >> 2 & 1);
          const uint32_t early_word = words.w[0] ^ ((words.w[0] ^ words.w[1]) & second);
          const uint32_t late_word = words.w[2] ^ ((words.w[2] ^ words.w[3]) & second);
          const uint32_t word = early_word ^ ((early_word ^ late_word) & later);
          rand |= (word >> (lane % 2 * 16) & 0xFFFFu) << 16 * half;
        }
        const float* const product = scratch + (first + i) * kWarp + (lane ^ i % 2 * 4);
        merge_pair<kRounding>(w[i], rest[i], {product[0], product[32]}, layer.scaling, rand);
      }
#pragma unroll
      for (int i = 0; i < 2 * kRowsAtOnce; ++i) {
        if (!inside(i)) continue;
        w_at[i / 2 * wm.row + i % 2 * 32 * wm.col] = half_of(w[i / 2], i % 2);
        if (kCompensated)
          r_at[i / 2 * rm.row + i % 2 * 32 * rm.col] = half_of(rest[i / 2], i % 2);
      }
    }
    __syncwarp();
  }
}

// Calls sum with the rounding as a constant: chosen by the element, it cost two thirds more
// instructions.
template <typename Sum>
__device__ __forceinline__ void with_rounding(Rounding rounding, Sum sum) {
  if (rounding == Rounding::nearest)
    sum(std::integral_constant<Rounding, Rounding::nearest>{});
  else if (rounding == Rounding::stochastic)
    sum(std::integral_constant<Rounding, Rounding::stochastic>{});
  else
    sum(std::integral_constant<Rounding, Rounding::compensated>{});
}

template <typename T, typename F>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
    merge_kernel(const __grid_constant__ MergeTable table) {
  Stages& stages = *reinterpret_cast<Stages*>(dynamic_shared);
  __shared__ MergeLayer layer;
  __shared__ Work work;
  __shared__ int found;
  find_layer<&MergeLayer::first_block>(table, layer, found);
  if (threadIdx.x == 0) work = work_of<T, F>(table, layer);
  __syncthreads();

  const int warp = int(threadIdx.x) / 32, warp_row = warp / 2 * kWarp, warp_col = warp % 2 * kWarp;
  int next_tile = 0, next_chunk = 0, next_slot = 0;  // filled kRing - 1 stages before it is used
  int tile = 0, chunk = 1 - kRing, slot = 0;         // chunk < 0: nothing to multiply yet
  Strip<T> window[kWindow<T>];
  float acc[4][8][4] = {};
  while (tile < work.tiles) {
    if (chunk == (tile ? 0 : 1 - kRing)) {  // so that HBM's latency passes under the product
      prefetch_tile<T>(layer.weight, layer, work, tile);
      if (table.rounding == Rounding::compensated)
        prefetch_tile<T>(layer.residual, layer, work, tile);
      if (work.wide) {
        const Share share(layer, work, tile, warp_row, warp_col);
        const Strips<T> at(layer.weight, work, tile, share.first);
#pragma unroll
        for (int s = 0; s < kEarly<T>; ++s) at.load(window, 0, s, share);
      }
    }
    if (chunk >= 0) {
      wait_for_copies<kRing - 2>();
      __syncthreads();  // all copies of this stage have arrived; next_slot has been multiplied
    }
    if (next_tile < work.tiles) {
      fill<F, true>(stages.A[next_slot], layer, work.wide_A, next_chunk,
                    work.col0 + next_tile * kCols);
      if (!work.stays || next_tile == 0)
        fill<F, false>(stages.B[work.stays ? next_chunk : next_slot], layer, work.wide_B,
                       next_chunk, work.row0);
      next_slot = (next_slot + 1) % kRing;
      if (++next_chunk == work.chunks) next_chunk = 0, ++next_tile;
    }
    commit_copies();  // a group without copies, too: wait_for_copies counts groups
    if (chunk < 0) {
      ++chunk;
      continue;
    }
    multiply<F, std::is_same<T, float>::value && std::is_same<F, float>::value>(
        acc, stages.A[slot], stages.B[work.stays ? chunk : slot], warp_row, warp_col);
    slot = (slot + 1) % kRing;
    if (++chunk < work.chunks) continue;

    if (!work.wide) __syncthreads();  // the slot multiplied last is free then, until the next stage
    with_rounding(table.rounding, [&](auto rounding) {
      if (work.wide)
        merge_wide<decltype(rounding)::value, kEarly<T>>(acc, AsItIs{}, window, layer, work, tile,
                                                         warp_row, warp_col);
      else
        merge_narrow<decltype(rounding)::value, T>(
            acc, AsItIs{}, layer, work, tile, warp_row, warp_col,
            reinterpret_cast<float*>(stages.A[(slot + kRing - 1) % kRing].bytes) + warp * 8 * kWarp);
    });
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][j][i] = 0.f;
    chunk = 0;
    ++tile;
  }
}

template <Rounding kRounding>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
    merge_resident_kernel(const __grid_constant__ MergeTable table) {
  using T = bf16;
  Resident& held = *reinterpret_cast<Resident*>(dynamic_shared);
  __shared__ MergeLayer layer;
  __shared__ Work work;
  __shared__ int found;
  find_layer<&MergeLayer::first_block>(table, layer, found);
  if (threadIdx.x == 0) {
    work = work_of<T, float>(table, layer);
    work.wide_A &= layer.k % 4 == 0;  // no chunk reaches beyond a row
  }
  __syncthreads();

  const int warp = int(threadIdx.x) / 32, warp_row = warp / 2 * kWarp, warp_col = warp % 2 * kWarp;
#pragma unroll 1
  for (int tile = 0; tile < work.tiles; ++tile) {
    prefetch_tile<T>(layer.weight, layer, work, tile);
    if (kRounding == Rounding::compensated)
      prefetch_tile<T>(layer.residual, layer, work, tile);
    if (tile == 0)
#pragma unroll 1
      for (int below = 0; below * kRows < work.rows; ++below)
        fill_panel<false>(held.B[below], held.B_units + below * kRows, layer, true,
                          work.row0 + below * kRows);
    else
      __syncthreads();  // the panel has been multiplied, its units have been used
    fill_panel<true>(held.A, held.A_units, layer, work.wide_A, work.col0 + tile * kCols);
    __syncthreads();
#pragma unroll 1
    for (int row = warp_row, below = 0; below * kRows < work.rows; row += kRows, ++below) {
      float acc[4][8][4] = {};
      multiply_panels(acc, held.A, held.B[below], int(layer.r), warp_row, warp_col);
      const InUnits units{held.B_units, held.A_units};
      if (work.wide) {
        Strip<T> window[kResidentWindow<kRounding>];
        merge_wide<kRounding, 0>(acc, units, window, layer, work, tile, row, warp_col);
      } else {  // the second panel is free: see merge()
        merge_narrow<kRounding, T>(acc, units, layer, work, tile, row, warp_col,
                                   reinterpret_cast<float*>(held.B[1].bytes) + warp * 8 * kWarp);
      }
    }
  }
}

using Kernel = void (*)(MergeTable);

// [DType of W][whether the factors are 16-bit, which are W's dtype then]. Roundings are told apart at
// run time, once a tile: five kernels to compile for each architecture, not 15. The resident ones
// have no registers to spare for what roundings keep in common.
constexpr Kernel kKernels[3][2] = {
    {merge_kernel<float, float>, nullptr},
    {merge_kernel<bf16, float>, merge_kernel<bf16, bf16>},
    {merge_kernel<fp16, float>, merge_kernel<fp16, fp16>},
};

// What the resident kernels serve: the usual. The others would take half as long to compile again.
constexpr Kernel kResidentNearest = merge_resident_kernel<Rounding::nearest>;
constexpr Kernel kResidentCompensated = merge_resident_kernel<Rounding::compensated>;
bool can_be_resident(const MergeLayer& layer) {
  return layer.r <= kMostRank && layer.r % 4 == 0 && is_wide<float>(layer.lora_B);
}

// ---- The restart --------------------------------------------------------------------------------

// A second launch, not blocks of the first: a layer's factors may go when its last tile is done,
// and the order of a stream says that without counters, fences or blocks that wait.
constexpr int kRestartThreads = 256, kQuads = 8;  // a thread's groups of four neighbours in a row

template <typename F>
__device__ __forceinline__ void store_quad(const Matrix& m, int64_t row, int64_t col, int64_t cols,
                                           const F (&quad)[4]) {
  F* const at = global_memory<F>(m.data) + row * m.row + col * m.col;
  constexpr int kBytes = 4 * int(sizeof(F));
  if (col + 4 <= cols && m.col == 1 && reinterpret_cast<uintptr_t>(at) % kBytes == 0) {
    if constexpr (kBytes == 16)
      *reinterpret_cast<float4*>(at) = make_float4(quad[0], quad[1], quad[2], quad[3]);
    else
      *reinterpret_cast<uint2*>(at) =
          make_uint2(quad[0].bits | uint32_t(quad[1].bits) << 16,
                     quad[2].bits | uint32_t(quad[3].bits) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (col + i < cols) at[i * m.col] = quad[i];
  }
}

template <typename F>
__global__ void __launch_bounds__(kRestartThreads)
    restart_kernel(const __grid_constant__ MergeTable table) {
  __shared__ MergeLayer layer;
  __shared__ int found;
  find_layer<&MergeLayer::first_restart_block>(table, layer, found);
  const int64_t a_quads = (layer.k + 3) / 4, b_quads = (layer.r + 3) / 4;
  const int64_t of_A = layer.restart_rows * a_quads, of_B = layer.n * b_quads;
  const int64_t first = int64_t(blockIdx.x - layer.first_restart_block) * kRestartThreads * kQuads;
#pragma unroll 1
  for (int i = 0; i < kQuads; ++i) {
    const int64_t id = first + i * kRestartThreads + threadIdx.x;
    F quad[4] = {};
    if (id < of_A) {
      const int64_t row = id / a_quads, block = id % a_quads;
      const Words words = draw(layer.restart_seed, kStreamInit, layer.first_restart + row, block);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        quad[j] = round_nearest<F>(uniform(bits32(words, j), layer.restart_step));
      store_quad(layer.restart_A, row, block * 4, layer.k, quad);
    } else if (id < of_A + of_B) {
      store_quad(layer.restart_B, (id - of_A) / b_quads, (id - of_A) % b_quads * 4, layer.r, quad);
    }
  }
}

constexpr Kernel kRestartKernels[3] = {restart_kernel<float>, restart_kernel<bf16>,
                                       restart_kernel<fp16>};

// ---- The launches -------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), int64_t blocks, int threads, size_t shared,
                   cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

int64_t tiles_of(const MergeLayer& layer) {
  if (layer.r == 0) return 0;
  return divide_up(layer.n, kRows) * divide_up(layer.k, kCols);
}

// Tiles that a block goes through: below each other, and in a row. As many as leave every
// multiprocessor its blocks, and few enough to end at about the same time. A block's own part of
// lora_B is read once for all in a row, resident lora_A once for two below each other.
Place tiles_of_a_block(int64_t tiles, int multiprocessors, bool resident) {
  const int64_t most = resident ? kMostRowTiles * 8 : 8, slots = kBlocksAnSM * multiprocessors;
  const int64_t count = std::clamp<int64_t>(divide_up(tiles, slots), 1, most);
  const int64_t rows = resident && count != 1 && count != 3 ? kMostRowTiles : 1;
  return {int(rows), int(divide_up(count, rows))};
}

}  // namespace

cudaError_t merge(MergeLayer* layers, int count, DType weight_dtype, DType factor_dtype,
                  DType restart_dtype, Rounding rounding, bool resident, MergeLayer* device_table,
                  cudaStream_t stream) {
  const bool narrow_factors = factor_dtype != DType::f32;
  if (narrow_factors && factor_dtype != weight_dtype) return cudaErrorInvalidValue;
  if (resident && (narrow_factors || weight_dtype != DType::bf16 ||
                   rounding == Rounding::stochastic))
    return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  int64_t tiles = 0, blocks = 0, restart_blocks = 0;
  for (int i = 0; i < count; ++i) {
    tiles += tiles_of(layers[i]);
    if (resident && !can_be_resident(layers[i])) return cudaErrorInvalidValue;
  }
  const Place of_a_block = tiles_of_a_block(tiles, multiprocessors, resident);
  MergeTable table{nullptr, count, of_a_block.col, rounding, {}};
  for (int i = 0; i < count; ++i) {
    MergeLayer& layer = layers[i];
    layer.first_block = uint32_t(blocks);
    layer.first_restart_block = uint32_t(restart_blocks);
    // Without 16-byte accesses the sum needs room, which is the second panel's.
    layer.row_tiles = is_wide_sum<uint16_t>(layer, rounding) ? uint32_t(of_a_block.row) : 1u;
    if (tiles_of(layer))
      blocks += divide_up(layer.n, layer.row_tiles * kRows) *
                divide_up(divide_up(layer.k, kCols), table.tiles_per_block);
    if (layer.restarts)
      restart_blocks += divide_up(layer.restart_rows * divide_up(layer.k, 4) +
                                      layer.n * divide_up(layer.r, 4),
                                  kRestartThreads * kQuads);
    if (blocks > INT32_MAX || restart_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  }
  if (blocks == 0 && restart_blocks == 0) return cudaSuccess;

  // A kernel's code is loaded at its first use, which may fail. All of it is loaded before the first
  // launch: else W could be merged and its factors left, and the next call would merge them again.
  const Kernel kernel = !resident ? kKernels[int(weight_dtype)][narrow_factors]
                        : rounding == Rounding::nearest ? kResidentNearest
                                                        : kResidentCompensated;
  const size_t shared = resident ? sizeof(Resident) : sizeof(Stages);
  const Kernel restart = kRestartKernels[int(restart_dtype)];
  cudaFuncAttributes loaded;
  if (blocks)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (restart_blocks && error == cudaSuccess) error = cudaFuncGetAttributes(&loaded, restart);
  if (error != cudaSuccess) return error;

  if (count <= kInlineLayers) {
    std::copy(layers, layers + count, table.first);
  } else {
    for (int first = 0; first < count && error == cudaSuccess; first += kInlineLayers) {
      MergeTable chunk{};
      chunk.count = std::min(count - first, kInlineLayers);
      std::copy(layers + first, layers + first + chunk.count, chunk.first);
      error = launch(write_table_kernel, 1, 256, 0, stream, chunk, device_table + first);
    }
    table.layers = device_table;
  }
  if (blocks && error == cudaSuccess)
    error = launch(kernel, blocks, kThreads, shared, stream, table);
  if (restart_blocks && error == cudaSuccess)
    error = launch(restart, restart_blocks, kRestartThreads, 0, stream, table);
  return error;
}

}  // namespace relora
