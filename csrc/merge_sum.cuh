// The streamed kernel's sum: reads a tile of W (and of the residual), adds its update and writes it back. Also
// which part of a layer a block works on.
#pragma once

#include "merge.cuh"

namespace relora {
namespace {

template <typename F>
__device__ __forceinline__ bool is_wide(const Matrix& m) {
  return m.col == 1 && m.row * int64_t(sizeof(F)) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ bool is_wide_sum(const MergeLayer& layer, Rounding rounding) {
  return layer.k % kStrip == 0 && is_wide<T>(layer.weight) &&
         (rounding != Rounding::compensated || is_wide<T>(layer.residual));
}

// What a block does. Kept in shared memory, because the product needs the registers.
struct Work {
  int64_t row0, col0;  // of its first tile; the others follow in the same rows
  int rows, tiles;
  bool wide_A, wide_B, wide;  // whether 16-byte accesses work: to the factors, to W and the residual
};

template <typename T>
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
  work.wide_A = is_wide<float>(layer.lora_A);
  work.wide_B = is_wide<float>(layer.lora_B);
  work.wide = is_wide_sum<T>(layer, table.rounding);
  return work;
}

constexpr int kStrips = 16;  // of a lane in a tile
template <typename T>
struct Strip { uint4 v[sizeof(T) / 2]; };

// Elements 2 i and 2 i + 1 of a strip.
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

// Strips of W and of the residual that are in flight to registers at a time. Those of a 16-bit W are
// loaded before the product. Beside the 128 accumulators four of a 16-bit W and two of an fp32 W would fit, too,
// and are not measured; with three of an fp32 W nvcc 13.0 spills on sm_80.
template <typename T>
constexpr int kWindow = sizeof(T) == 2 ? 3 : 1;
template <typename T>
constexpr int kRestWindow = sizeof(T) == 2 ? 2 : 1;
template <typename T>
constexpr int kEarly = sizeof(T) == 2 ? kWindow<T> : 0;
template <typename T>
constexpr int kNarrowRows = sizeof(T) == 2 ? 4 : 2;  // rows of a lane at a time without 16-byte accesses

// Where a warp's products are. acc[m][j] is a tensor-core tile of 16 columns of W by 8 rows (columns
// first). Lane 4 g + t holds two columns by two rows of it: acc[m][j][i] is of column i / 2 and row
// i % 2. Which columns and rows of W these are is a free choice: columns 8 g + 2 m and 8 g + 2 m + 1,
// rows 16 t + j and 16 t + j + 8. So strip s of a lane is row 16 t + s, columns 8 g to 8 g + 7, and a
// warp's strips are whole 128-byte lines.
__device__ __forceinline__ Place first_strip(int lane, int warp_row, int warp_col) {
  return {warp_row + lane % 4 * 16, warp_col + lane / 4 * 8};
}
__device__ __forceinline__ float strip_value(const float (&acc)[4][8][4], int strip, int i) {
  return acc[i / 2][strip % 8][i % 2 * 2 + strip / 8];
}

// Prefetches a thread's rows of the tile from HBM into L2.
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

// A lane's strips of a tile of W, or of the residual: where in the tile the first one begins, and how
// many of them lie inside W.
struct Share {
  Place first;
  int rows;
  __device__ __forceinline__ Share(const MergeLayer& layer, const Work& work, int tile,
                                   int warp_row, int warp_col)
      : first(first_strip(lane_id(), warp_row, warp_col)),
        rows(work.col0 + tile * kCols + first.col < layer.k ? work.rows - first.row : 0) {}
  __device__ __forceinline__ bool has(int strip) const { return strip < kStrips && strip < rows; }
};

// A lane's strips in memory; merge_wide moves `at` from one to the next.
template <typename T>
struct Strips {
  T* at;
  int64_t pitch;
  __device__ __forceinline__ Strips(const Matrix& m, const Work& work, int tile, Place first)
      : at(global_memory<T>(m.data) + (work.row0 + first.row) * m.row + work.col0 + tile * kCols +
           first.col),
        pitch(m.row) {}
  // With `at` at strip `strip`: loads strip `strip + by` into its place in the window.
  template <int kWindow>
  __device__ __forceinline__ void load(Strip<T> (&window)[kWindow], int strip, int by,
                                       const Share& share) const {
    if (share.has(strip + by)) load_strip<T>(window[(strip + by) % kWindow], at + by * pitch);
  }
};

// The sum of a tile, by 16-byte accesses. `window` holds W's first kEarly strips.
template <Rounding kRounding, typename T>
__device__ __forceinline__ void merge_wide(const float (&acc)[4][8][4],
                                           Strip<T> (&window)[kWindow<T>], const MergeLayer& layer,
                                           const Work& work, int tile, int warp_row,
                                           int warp_col) {
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  const Share share(layer, work, tile, warp_row, warp_col);
  Strips<T> at(layer.weight, work, tile, share.first);
  Strips<T> rest_at(kCompensated ? layer.residual : layer.weight, work, tile, share.first);
  Strip<T> rest_window[kRestWindow<T>];
#pragma unroll
  for (int s = kEarly<T>; s < kWindow<T>; ++s) at.load(window, 0, s, share);
#pragma unroll
  for (int s = 0; s < kRestWindow<T>; ++s)
    if (kCompensated) rest_at.load(rest_window, 0, s, share);
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    Strip<T> w = window[s % kWindow<T>], rest = rest_window[s % kRestWindow<T>];
    at.load(window, s, kWindow<T>, share);
    if (kCompensated) rest_at.load(rest_window, s, kRestWindow<T>, share);
    if (share.has(s)) {
      const int row = share.first.row + s, col = share.first.col;
      Words words{};
      if (kRounding == Rounding::stochastic)
        words = draw(layer.seed, kStreamRound, layer.first_row + work.row0 + row,
                     (work.col0 + tile * kCols + col) / kStrip);
      Neighbours<T> pairs[kStrip / 2], rest_pairs[kStrip / 2] = {};
      Neighbours<float> updates[kStrip / 2];
#pragma unroll
      for (int i = 0; i < kStrip / 2; ++i) {
        pairs[i] = get_pair(w, i);
        if (kCompensated) rest_pairs[i] = get_pair(rest, i);
        updates[i] = {__fmul_rn(layer.scaling, strip_value(acc, s, 2 * i)),
                      __fmul_rn(layer.scaling, strip_value(acc, s, 2 * i + 1))};
      }
      merge_pairs<kRounding>(pairs, rest_pairs, updates, words.w);
#pragma unroll
      for (int i = 0; i < kStrip / 2; ++i) {
        set_pair(w, i, pairs[i]);
        if (kCompensated) set_pair(rest, i, rest_pairs[i]);
      }
      store_strip(at.at, w);
      if (kCompensated) store_strip(rest_at.at, rest);
    }
    at.at += at.pitch;
    if (kCompensated) rest_at.at += rest_at.pitch;
  }
}

// Calls `sum` with the rounding as a compile-time constant: chosen per element, it took two thirds more
// instructions. For an fp32 W stochastic is the same as nearest.
template <typename T, typename Sum>
__device__ __forceinline__ void with_rounding(Rounding rounding, Sum sum) {
  if (rounding == Rounding::compensated)
    return sum(std::integral_constant<Rounding, Rounding::compensated>{});
  if constexpr (sizeof(T) == 2)
    if (rounding == Rounding::stochastic)
      return sum(std::integral_constant<Rounding, Rounding::stochastic>{});
  sum(std::integral_constant<Rounding, Rounding::nearest>{});
}

// The sum of a tile whose W or residual does not take 16-byte accesses, one element at a time. The
// accumulators go through shared memory, two strips of every lane at a time, so that neighbouring lanes
// take neighbouring elements. Those strips are eight rows: rows 2 i and 2 i + 1 are 16 i and 16 i + 1
// further down in W. Each row permutes its 16-byte chunks, so that one write of a warp covers all banks.
__device__ __forceinline__ int scratch_turn(int row) {  // what a chunk's number is xored with
  return (row / 2 & 1) | (row / 2 & 2) << 1;
}

// Rows first, first + 1, ... (kNarrowRows) of the eight in `scratch`. Row `first` is the tile's row `tile_row`.
template <Rounding kRounding, typename T>
__device__ __forceinline__ void merge_rows(const MergeLayer& layer, const Work& work, int tile_row,
                                           int64_t col, int first, const float* scratch) {
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  constexpr int kRowsAtOnce = kNarrowRows<T>;
  const Matrix &wm = layer.weight, &rm = layer.residual;
  const int lane = lane_id();
  const int64_t row = work.row0 + tile_row;
  T* const w_at = global_memory<T>(wm.data) + row * wm.row + col * wm.col;
  T* const r_at = global_memory<T>(rm.data) + row * rm.row + col * rm.col;
  // A row's elements at `col` and at col + 32, held as if they were neighbours: element i is of row i / 2.
  Neighbours<T> w[kRowsAtOnce] = {}, rest[kRowsAtOnce] = {};
  const auto down = [](int i) { return i / 2 * 16 + i % 2; };
  const auto at = [&](const Matrix& m, int i) { return down(i / 2) * m.row + i % 2 * 32 * m.col; };
  const auto inside = [&](int i) {
    return tile_row + down(i / 2) < work.rows && col + i % 2 * 32 < layer.k;
  };
#pragma unroll
  for (int i = 0; i < 2 * kRowsAtOnce; ++i) {
    if (!inside(i)) continue;
    set_half(w[i / 2], i % 2, w_at[at(wm, i)]);
    if (kCompensated) set_half(rest[i / 2], i % 2, r_at[at(rm, i)]);
  }
  Neighbours<float> updates[kRowsAtOnce];
  uint32_t rand[kRowsAtOnce] = {};
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kRounding != Rounding::stochastic || !inside(2 * i + half)) continue;
      const Words words = draw(layer.seed, kStreamRound, layer.first_row + row + down(i),
                               col / kStrip + half * 4);
      // bits16 by masks: selecting by index or condition would put the words in local memory.
      const uint32_t second = 0u - (lane >> 1 & 1), later = 0u - (lane >> 2 & 1);
      const uint32_t early_word = words.w[0] ^ ((words.w[0] ^ words.w[1]) & second);
      const uint32_t late_word = words.w[2] ^ ((words.w[2] ^ words.w[3]) & second);
      const uint32_t word = early_word ^ ((early_word ^ late_word) & later);
      rand[i] |= (word >> (lane % 2 * 16) & 0xFFFFu) << 16 * half;
    }
    const float* const product =
        scratch + (first + i) * kWarp + (lane ^ scratch_turn(first + i) * 4);
    updates[i] = {__fmul_rn(layer.scaling, product[0]), __fmul_rn(layer.scaling, product[32])};
  }
  merge_pairs<kRounding>(w, rest, updates, rand);
#pragma unroll
  for (int i = 0; i < 2 * kRowsAtOnce; ++i) {
    if (!inside(i)) continue;
    w_at[at(wm, i)] = half_of(w[i / 2], i % 2);
    if (kCompensated) r_at[at(rm, i)] = half_of(rest[i / 2], i % 2);
  }
}

// `scratch`: 2 KB for this warp alone.
template <typename T>
__device__ __forceinline__ void merge_narrow(Rounding rounding, const float (&acc)[4][8][4],
                                             const MergeLayer& layer, const Work& work, int tile,
                                             int warp_row, int warp_col, float* scratch) {
  const int lane = lane_id(), t = lane % 4;
#pragma unroll 1
  for (int piece = 0; piece < kStrips / 2; ++piece) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const Place first = first_strip(lane, warp_row, warp_col);
      const int row = 2 * t + s % 2, at = row * (kWarp / 4) + (first.col - warp_col) / 4;
      if (s / 2 == piece)
#pragma unroll
        for (int i = 0; i < kStrip; i += 4)
          reinterpret_cast<float4*>(scratch)[(at + i / 4) ^ scratch_turn(row)] = make_float4(
              strip_value(acc, s, i), strip_value(acc, s, i + 1), strip_value(acc, s, i + 2),
              strip_value(acc, s, i + 3));
    }
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < 8; first += kNarrowRows<T>)
      with_rounding<T>(rounding, [&](auto constant) {
        merge_rows<decltype(constant)::value, T>(
            layer, work, warp_row + 2 * piece + first * 8,
            work.col0 + tile * kCols + warp_col + lane, first, scratch);  // and 32 columns further on
      });
    __syncwarp();
  }
}

}  // namespace
}  // namespace relora
