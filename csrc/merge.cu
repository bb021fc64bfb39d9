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
// The product: 16-bit factors multiply exactly. fp32 factors are rounded to nearest tf32 where W
// has
// 16 bits, an error of up to 2^-11 of a product. For an fp32 W each is the sum of two tf32, and
// three
// of the four products are taken, which keeps 2^-22: three times the tensor work, and still 1.7
// times as fast as the fp32 pipes (12.9 GFLOP at some 300 TFLOP/s against 4.3 at 60, for 4096 x
// 4096
// at r = 128).
//
// What bounds it on an H200, 4096 x 4096, bf16 W, fp32 factors, r = 128; by data sheets and
// published microbenchmarks, not measured here:
//   HBM     W in and out, 67 MB at 4.3 TB/s                              15.6 us
//   tensor  4.3 GFLOP of tf32 by mma.sync, some 62 % of the 494 TFLOP/s  14 us (16-bit factors: 7)
//   L2      lora_A once for 128 rows of W, 67 MB; lora_B once for a
//           block, 17 MB; W's 34 MB; at some 6.8 TB/s                    17 us (16-bit factors: 11)
//   shared  64 KB into and 256 KB out of shared memory for a tile        1.5 us of a tile's 2
// None has much to spare, so all have to overlap:
// - a warp takes 64 x 64 of a tile: 16 reads of 16 bytes a lane for 64 products. 64 x 32 would read
//   half as much again and make shared memory the bound;
// - a block goes through several tiles in one row, and lora_B stays in shared memory if r <= 128
//   (16-bit: 256), else it is streamed like lora_A. Nothing else changes with r;
// - two blocks share a multiprocessor: one's sums go under the other's products;
// - W's tile is fetched before its product, the first strips into registers and the rest into L2;
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
  int tiles_per_block;
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

// ---- The product --------------------------------------------------------------------------------

constexpr int kRows = 128, kCols = 128;  // a tile of W
constexpr int kWarp = 64;                // rows and columns of a warp's part of it
constexpr int kThreads = 128, kBlocksAnSM = 2;
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
__device__ __forceinline__ bool is_wide(const Matrix& m) {
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

// ---- The sum ------------------------------------------------------------------------------------

// Eight neighbouring elements of one row: 16 bytes of a 16-bit W, one random draw.
constexpr int kStrip = 8, kStrips = 16;  // strips of a lane in a tile
template <typename T>
struct alignas(16) Strip { T v[kStrip]; };

template <typename T>
__device__ __forceinline__ void copy_strip(T* to, const T* from) {
#pragma unroll
  for (int i = 0; i < int(sizeof(Strip<T>) / 16); ++i)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

// Strips of W and of the residual on their way into registers at a time. Those of a 16-bit W set
// out
// before the product. More of them, or an fp32 W's, would not fit beside 128 accumulators: with
// four
// ptxas spills on sm_100 and 120.
template <typename T>
constexpr int kWindow = sizeof(T) == 2 ? 3 : 1;
template <typename T>
constexpr int kRestWindow = sizeof(T) == 2 ? 2 : 1;
template <typename T>
constexpr int kEarly = sizeof(T) == 2 ? kWindow<T> : 0;

struct Place { int row, col; };  // in the tile
__device__ __forceinline__ Place strip_place(int strip, int lane, int warp_row, int warp_col) {
  return {warp_row + strip / 4 * 16 + strip / 2 % 2 * 8 + lane / 4,
          warp_col + strip % 2 * 32 + lane % 4 * 8};
}
__device__ __forceinline__ float strip_value(const float (&acc)[4][8][4], int strip, int i) {
  return acc[strip / 4][strip % 2 * 4 + i % 4][strip / 2 % 2 * 2 + i / 4];
}

template <typename T>
__device__ __forceinline__ void merge_element(T& w, T& rest, float product, float scaling,
                                              Rounding rounding, uint32_t rand16) {
  float v = to_float(w);
  if (rounding == Rounding::compensated) v = __fadd_rn(v, to_float(rest));
  v = __fadd_rn(v, __fmul_rn(scaling, product));
  w = rounding == Rounding::stochastic ? round_stochastic<T>(v, rand16) : round_nearest<T>(v);
  if (rounding == Rounding::compensated) rest = round_nearest<T>(__fsub_rn(v, to_float(w)));
}

// What a block does. In shared memory rather than in registers, which the product needs.
struct Work {
  int64_t row0, col0;  // of its first tile; the others follow in the same rows
  int rows, tiles, chunks;
  bool stays;                 // every stage of lora_B has a slot of its own
  bool wide_A, wide_B, wide;  // 16-byte accesses: to the factors, to W and the residual
};

template <typename T, typename F>
__device__ __forceinline__ Work work_of(const MergeTable& table, const MergeLayer& layer) {
  const int col_tiles = int((layer.k + kCols - 1) / kCols);
  const int blocks_a_row = (col_tiles + table.tiles_per_block - 1) / table.tiles_per_block;
  const int block = int(blockIdx.x - layer.first_block);
  const int first_tile = block % blocks_a_row * table.tiles_per_block;
  Work work;
  work.row0 = int64_t(block / blocks_a_row) * kRows;
  work.col0 = int64_t(first_tile) * kCols;
  work.rows = int(min(layer.n - work.row0, int64_t(kRows)));
  work.tiles = min(col_tiles - first_tile, table.tiles_per_block);
  work.chunks = int((layer.r + kDepth<F> - 1) / kDepth<F>);
  work.stays = work.chunks <= kPanel;
  work.wide_A = is_wide<F>(layer.lora_A);
  work.wide_B = is_wide<F>(layer.lora_B);
  work.wide = layer.k % kStrip == 0 && is_wide<T>(layer.weight) &&
              (table.rounding != Rounding::compensated || is_wide<T>(layer.residual));
  return work;
}

// A thread's row of the tile on its way from HBM into L2.
template <typename T>
__device__ __forceinline__ void prefetch_tile(const Matrix& m, const MergeLayer& layer,
                                              const Work& work, int tile) {
  static_assert(kRows == kThreads, "one row a thread");
  const int64_t col = work.col0 + tile * kCols;
  if (int(threadIdx.x) >= work.rows || m.col != 1) return;
  const T* const row = global_memory<const T>(m.data) + (work.row0 + threadIdx.x) * m.row;
  const T* const end = row + min(layer.k, col + kCols);
#pragma unroll 1
  for (const T* at = row + col; at < end; at += 32 / sizeof(T)) prefetch_L2(at);
}

// The sum of a tile whose W or residual takes no 16-byte accesses, an element at a time: the
// accumulators go through shared memory, eight rows at a time, so that neighbouring lanes take
// neighbouring elements. `scratch`: 2 KB of this warp's own.
template <typename T>
__device__ __forceinline__ void merge_narrow(const float (&acc)[4][8][4], const MergeLayer& layer,
                                             const Work& work, Rounding rounding, int tile,
                                             int warp_row, int warp_col, float* scratch) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  constexpr int kRowsAtOnce = 2, kElements = 2 * kRowsAtOnce;
  const Matrix &wm = layer.weight, &rm = layer.residual;
  const bool compensated = rounding == Rounding::compensated;
  const int64_t col = work.col0 + tile * kCols + warp_col + lane;  // and 32 further on
#pragma unroll 1
  for (int piece = 0; piece < kStrips / 2; ++piece) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
      if (s / 2 == piece)
#pragma unroll
        for (int i = 0; i < kStrip; ++i)
          scratch[g * kWarp + s % 2 * 32 + t * 8 + i] = strip_value(acc, s, i);
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < 8; first += kRowsAtOnce) {
      const int tile_row = warp_row + piece / 2 * 16 + piece % 2 * 8 + first;
      const int64_t row = work.row0 + tile_row;
      T* const w_at = global_memory<T>(wm.data) + row * wm.row + col * wm.col;
      T* const r_at = global_memory<T>(rm.data) + row * rm.row + col * rm.col;
      float w[kElements] = {}, rest[kElements] = {};  // as T, they end up in local memory
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (tile_row + i / 2 >= work.rows || col + i % 2 * 32 >= layer.k) continue;
        w[i] = to_float(w_at[i / 2 * wm.row + i % 2 * 32 * wm.col]);
        if (compensated) rest[i] = to_float(r_at[i / 2 * rm.row + i % 2 * 32 * rm.col]);
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (tile_row + i / 2 >= work.rows || col + i % 2 * 32 >= layer.k) continue;
        uint32_t rand16 = 0;
        if (rounding == Rounding::stochastic) {
          const Words words = draw(layer.seed, kStreamRound, layer.first_row + row + i / 2,
                                   col / kStrip + i % 2 * 4);
          // bits16 by masks: choosing by index or by condition would put the words in local memory.
          const uint32_t second = 0u - (lane >> 1 & 1), later = 0u - (lane >> 2 & 1);
          const uint32_t early_word = words.w[0] ^ ((words.w[0] ^ words.w[1]) & second);
          const uint32_t late_word = words.w[2] ^ ((words.w[2] ^ words.w[3]) & second);
          const uint32_t word = early_word ^ ((early_word ^ late_word) & later);
          rand16 = word >> (lane % 2 * 16) & 0xFFFFu;
        }
        T new_w = round_nearest<T>(w[i]), new_rest = round_nearest<T>(rest[i]);  // exact
        merge_element(new_w, new_rest, scratch[(first + i / 2) * kWarp + i % 2 * 32 + lane],
                      layer.scaling, rounding, rand16);
        w_at[i / 2 * wm.row + i % 2 * 32 * wm.col] = new_w;
        if (compensated) r_at[i / 2 * rm.row + i % 2 * 32 * rm.col] = new_rest;
      }
    }
    __syncwarp();
  }
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
  Strip<T> window[kWindow<T>], rest_window[kRestWindow<T>];
  float acc[4][8][4] = {};
  const bool compensated = table.rounding == Rounding::compensated;
  while (tile < work.tiles) {
    auto load_window = [&](auto& window, const Matrix& m, int s, int lane) {
      const Place at = strip_place(s, lane, warp_row, warp_col);
      const int64_t col = work.col0 + tile * kCols + at.col;
      if (s < kStrips && at.row < work.rows && col < layer.k)
        copy_strip(window[s % (sizeof window / sizeof window[0])].v,
                   global_memory<const T>(m.data) + (work.row0 + at.row) * m.row + col);
    };
    if (chunk == (tile ? 0 : 1 - kRing)) {  // so that HBM's latency passes under the product
      prefetch_tile<T>(layer.weight, layer, work, tile);
      if (compensated) prefetch_tile<T>(layer.residual, layer, work, tile);
      const int lane = lane_id();
      if (work.wide)
#pragma unroll
        for (int s = 0; s < kEarly<T>; ++s) load_window(window, layer.weight, s, lane);
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

    if (work.wide) {
      const int lane = lane_id();
#pragma unroll
      for (int s = kEarly<T>; s < kWindow<T>; ++s)
        load_window(window, layer.weight, s, lane);
#pragma unroll
      for (int s = 0; s < kRestWindow<T>; ++s)
        if (compensated) load_window(rest_window, layer.residual, s, lane);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        const Place at = strip_place(s, lane, warp_row, warp_col);
        const int64_t row = work.row0 + at.row, col = work.col0 + tile * kCols + at.col;
        Strip<T> w = window[s % kWindow<T>], rest = rest_window[s % kRestWindow<T>];
        load_window(window, layer.weight, s + kWindow<T>, lane);
        if (compensated) load_window(rest_window, layer.residual, s + kRestWindow<T>, lane);
        if (at.row >= work.rows || col >= layer.k) continue;
        Words words{};
        if (table.rounding == Rounding::stochastic)
          words = draw(layer.seed, kStreamRound, layer.first_row + row, col / kStrip);
#pragma unroll
        for (int i = 0; i < kStrip; ++i)
          merge_element(w.v[i], rest.v[i], strip_value(acc, s, i), layer.scaling, table.rounding,
                        bits16(words, i));
        copy_strip(global_memory<T>(layer.weight.data) + row * layer.weight.row + col, w.v);
        if (compensated)
          copy_strip(global_memory<T>(layer.residual.data) + row * layer.residual.row + col, rest.v);
      }
    } else {
      __syncthreads();  // then the slot multiplied last is free until the next stage
      Slot& free_slot = stages.A[(slot + kRing - 1) % kRing];
      merge_narrow<T>(acc, layer, work, table.rounding, tile, warp_row, warp_col,
                      reinterpret_cast<float*>(free_slot.bytes) + warp * 8 * kWarp);
    }
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

using Kernel = void (*)(MergeTable);

// [DType of W][whether the factors are 16-bit, which are W's dtype then]. Roundings are told apart
// at
// run time: five kernels to compile for each architecture, not 27.
constexpr Kernel kKernels[3][2] = {
    {merge_kernel<float, float>, nullptr},
    {merge_kernel<bf16, float>, merge_kernel<bf16, bf16>},
    {merge_kernel<fp16, float>, merge_kernel<fp16, fp16>},
};

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

// Tiles that a block goes through in one row: its part of lora_B is read once. As many as leave
// every multiprocessor its blocks, and few enough to end at about the same time.
int tiles_per_block(int64_t tiles, int multiprocessors) {
  return int(std::clamp<int64_t>(divide_up(tiles, kBlocksAnSM * multiprocessors), 1, 8));
}

}  // namespace

cudaError_t merge(MergeLayer* layers, int count, DType weight_dtype, DType factor_dtype,
                  DType restart_dtype, Rounding rounding, MergeLayer* device_table,
                  cudaStream_t stream) {
  const bool narrow_factors = factor_dtype != DType::f32;
  if (narrow_factors && factor_dtype != weight_dtype) return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  int64_t tiles = 0, blocks = 0, restart_blocks = 0;
  for (int i = 0; i < count; ++i) tiles += tiles_of(layers[i]);
  MergeTable table{nullptr, count, tiles_per_block(tiles, multiprocessors), rounding, {}};
  for (int i = 0; i < count; ++i) {
    MergeLayer& layer = layers[i];
    layer.first_block = uint32_t(blocks);
    layer.first_restart_block = uint32_t(restart_blocks);
    if (tiles_of(layer))
      blocks += divide_up(layer.n, kRows) *
                divide_up(divide_up(layer.k, kCols), table.tiles_per_block);
    if (layer.restarts)
      restart_blocks += divide_up(layer.restart_rows * divide_up(layer.k, 4) +
                                      layer.n * divide_up(layer.r, 4),
                                  kRestartThreads * kQuads);
    if (blocks > INT32_MAX || restart_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  }
  if (blocks == 0 && restart_blocks == 0) return cudaSuccess;

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
  if (blocks && error == cudaSuccess) {
    const Kernel kernel = kKernels[int(weight_dtype)][narrow_factors];
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(sizeof(Stages)));
    if (error == cudaSuccess)
      error = launch(kernel, blocks, kThreads, sizeof(Stages), stream, table);
  }
  if (restart_blocks && error == cudaSuccess)
    error = launch(kRestartKernels[int(restart_dtype)], restart_blocks, kRestartThreads, 0, stream,
                   table);
  return error;
}

}  // namespace relora
