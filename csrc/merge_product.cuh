// merge.cu's product: a tile of lora_B @ lora_A in the registers of four warps.
#pragma once

#include "launch.h"
#include "mma.cuh"

namespace relora {
namespace {

constexpr int kRows = 128, kCols = 128;  // a tile of W
constexpr int kWarp = 64;                // rows and columns of a warp's part of it
constexpr int kThreads = 128, kBlocksAnSM = 2;
struct Place { int row, col; };

// ---- The product, streamed ----------------------------------------------------------------------

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

}  // namespace
}  // namespace relora
