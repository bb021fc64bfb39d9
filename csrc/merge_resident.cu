// merge.cu's kernel for the usual: a bf16 W, r <= 128, lora_B's rows of 16-byte multiples. A block holds
// all of r in 16 bits, of up to 256 rows of lora_B for good, and of lora_A for 128 columns at a time,
// which it multiplies by all of them.
//
// bf16 factors are held as they are. Of fp32 factors 11 bits are kept: as fp16, which has tf32's
// mantissa and twice its speed, scaled by a power of two for each row of lora_B and column of lora_A.
// That holds 11 bits of what is 2^-28 of the row's or column's largest or more, and below an error of
// up to 2^-39 of the largest (numerics.cuh). A tile's lora_A is loaded into the registers that the
// accumulators take later: 64 KB are under way at once, and each column's largest element is known
// before the first is rounded.
#include "merge_sum.cuh"

namespace relora {
namespace {

// ---- The panels ---------------------------------------------------------------------------------

constexpr int kLoads = 32;  // of 16 bytes, of a thread at once

// A sum of products is below kMostRank * 2^30, and lora_B below 2^120 (launch.h): times its row's unit
// it may reach 2^142, which float32 does not hold. So rows are worth less, and columns more.
constexpr float kShift = 0x1p15f;

struct alignas(16) Panel { unsigned char bytes[128 * kMostRank * 2]; };
struct Resident {
  Panel A;
  Panel B[kMostRowTiles];
  float A_units[kCols], B_units[kMostRowTiles * kRows];  // what columns and rows of fp32 are times
};

// A chunk is eight neighbours along r, four words; the exclusive ors spread what is written or read
// at once over all banks. Of a row of B a chunk is 16 bytes. Columns of A lie as mma() takes two of
// them: {first word of column 2 `pair`, of the next, second words}, and in step 1 the third and fourth.
__device__ __forceinline__ uint4& row_chunk(Panel& B, int row, int chunk) {
  return reinterpret_cast<uint4*>(B.bytes)[row * (kMostRank / 8) + (chunk ^ (row / 8 & 1) << 2)];
}
__device__ __forceinline__ uint4& column_chunk(Panel& A, int pair, int step, int chunk) {
  const int turn = (pair / 4 & 1) << 2 | (pair / 2 & 1) << 1 | (pair / 8 & 1);
  return reinterpret_cast<uint4*>(A.bytes)[(pair * 2 + step) * (kMostRank / 8) + (chunk ^ turn)];
}

__device__ __forceinline__ float larger(float a, float4 v) {
  return fmaxf(fmaxf(fmaxf(a, fabsf(v.x)), fmaxf(fabsf(v.y), fabsf(v.z))), fabsf(v.w));
}
__device__ __forceinline__ float component(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// fp32: a thread's 128 numbers of a panel's 128 x 128, of four lines: rows of B or columns of A. A
// load is of four neighbours in a matrix's row.
//   lora_B  Four lanes have each row, every fourth chunk of r; a quarter of a warp has two rows, 8
//           apart. Loads 8 b + 2 c and the next: line b's chunk c, line b being 2 b further down.
//   lora_A  Eight lanes have four columns each of a warp's 32, the others other chunks of r: every
//           fourth. Loads 8 c ... 8 c + 7: chunk c of the four columns.
template <bool kIsA>
__device__ __forceinline__ Place first_load() {
  const int lane = lane_id(), warp = int(threadIdx.x) / 32;
  return kIsA ? Place{lane / 8 * 8, warp * 32 + lane % 8 * 4}
              : Place{warp * 32 + lane / 4 % 4 * 8 + lane / 16, lane % 4 * 8};
}
template <bool kIsA>
__host__ __device__ constexpr Place load_step(int i) {  // from the first
  return kIsA ? Place{i / 8 * 32 + i % 8, 0} : Place{i / 8 * 2, i / 2 % 4 * 32 + i % 2 * 4};
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

// Lines `begin` ... `begin` + 127 of an fp32 factor, zeros beyond its ends, and their units.
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
  const Place first = first_load<kIsA>();
  float scales[4];
#pragma unroll
  for (int line = 0; line < 4; ++line) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (kIsA) largest = fmaxf(largest, fabsf(component(v[i], line)));
      else if (i / 8 == line) largest = larger(largest, v[i]);
    }
#pragma unroll
    for (int with = kIsA ? 8 : 1; with < (kIsA ? 32 : 4); with *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, with));
    scales[line] = half_scale(largest);
    if (kIsA ? lane < 8 : lane % 4 == 0)
      units[kIsA ? first.col + line : first.row + 2 * line] =
          half_unit(scales[line]) * (kIsA ? kShift : 1 / kShift);
  }
  // Word w of a line's chunk c.
  const auto scaled = [&](int line, int c, int w) {
    const auto at = [&](int i) {
      return scales[line] * (kIsA ? component(v[8 * c + i], line)
                                  : component(v[8 * line + 2 * c + i / 4], i % 4));
    };
    return pair_nearest<fp16>({at(2 * w), at(2 * w + 1)}).bits;
  };
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int chunk = c * 4 + (kIsA ? lane / 8 : lane % 4);
    if (kIsA) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int x = i / 2 * 2, y = x + 1, w = i % 2 * 2;
        column_chunk(panel, (first.col + x) / 2, i % 2, chunk) = {
            scaled(x, c, w), scaled(y, c, w), scaled(x, c, w + 1), scaled(y, c, w + 1)};
      }
    } else {
#pragma unroll
      for (int line = 0; line < 4; ++line)
        row_chunk(panel, first.row + 2 * line, chunk) = {scaled(line, c, 0), scaled(line, c, 1),
                                                         scaled(line, c, 2), scaled(line, c, 3)};
    }
  }
}

// The same of bf16 factors, as they are. Rows of lora_B are copied: commit_copies() is the caller's.
__device__ __forceinline__ void copy_rows(Panel& panel, const MergeLayer& layer, int64_t begin) {
  constexpr int kChunks = kMostRank / 8;
#pragma unroll 1
  for (int id = int(threadIdx.x); id < kRows * kChunks; id += kThreads) {
    const int line = id / kChunks, chunk = id % kChunks;
    fill_chunk<bf16>(&row_chunk(panel, line, chunk), layer.lora_B, true, begin + line,
                     chunk * 8, begin + line < layer.n ? layer.r - chunk * 8 : 0);
  }
}

// Columns of lora_A: a thread turns two blocks of 8 x 8. A warp's 32 columns are four lanes' blocks
// side by side; the lanes of a quarter of it have two chunks that are two apart.
template <bool kWide>
__device__ __forceinline__ void turn_columns(Panel& panel, const MergeLayer& layer,
                                             int64_t begin) {
  const Matrix& m = layer.lora_A;
  const int lane = lane_id(), line = int(threadIdx.x) / 32 * 32 + lane % 4 * 8;
  const int chunk = lane / 4 % 2 * 2 + lane / 8 % 2 + lane / 16 * 4;
  const int cols = int(min(layer.k - begin, int64_t(kCols))) - line;
  const bf16* const from = global_memory<const bf16>(m.data) + (begin + line) * m.col;
  uint4 rows[2][8];
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = (chunk + half * 8) * 8 + i;
      const bf16* const at = from + row * m.row;
      rows[half][i] = {0, 0, 0, 0};
      if (row >= layer.r) continue;
      if (kWide) {
        if (cols > 0) rows[half][i] = *reinterpret_cast<const uint4*>(at);  // all of it
      } else {
#pragma unroll
        for (int c = 0; c < 8; ++c)
          if (c < cols) word(rows[half][i], c / 2) |= uint32_t(at[c * m.col].bits) << c % 2 * 16;
      }
    }
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pair = i / 2, step = i % 2;
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = word(rows[half][4 * step + w], pair);
      column_chunk(panel, line / 2 + pair, step, chunk + half * 8) = {
          lower_halves(words[0], words[1]), upper_halves(words[0], words[1]),
          lower_halves(words[2], words[3]), upper_halves(words[2], words[3])};
    }
}

// Either factor's lines `begin` ... `begin` + 127, in two steps: another panel may be begun between.
template <typename F, bool kIsA>
__device__ __forceinline__ void fill(Panel& panel, float* units, const MergeLayer& layer, bool wide,
                                     int64_t begin) {
  if constexpr (sizeof(F) == 4) {
    fill_panel<kIsA>(panel, units, layer, wide, begin);
  } else if constexpr (kIsA) {
    if (wide) turn_columns<true>(panel, layer, begin);
    else turn_columns<false>(panel, layer, begin);
  } else {
    copy_rows(panel, layer, begin);
    commit_copies();
  }
}

// ---- The product --------------------------------------------------------------------------------

// acc += B A over all of r, 32 steps of it at a time: lane 4 g + t multiplies elements 8 t to 8 t + 7
// of them, in two tensor-core products. acc: see first_strip.
template <typename Half>
__device__ __forceinline__ void multiply_panels(float (&acc)[4][8][4], Panel& A, Panel& B, int r,
                                                int warp_row, int warp_col) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  constexpr int kLine = kMostRank / 8;  // chunks
#pragma unroll 1
  for (int first = 0; first < r; first += 32) {
    const int chunk = first / 8 + t, pair = warp_col / 2 + 4 * g;
    // Lines beside each other have their chunks in the same order.
    const uint4* const pairs[2] = {&column_chunk(A, pair, 0, chunk),
                                   &column_chunk(A, pair + 2, 0, chunk)};
    const uint4* const rows = &row_chunk(B, warp_row + 8 * g, chunk);
    uint32_t cols[4][2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 v = pairs[i / 4][i % 4 * kLine];
      uint32_t(&to)[4] = cols[i / 2][i % 2];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint4 v = rows[j * kLine];
      const uint32_t row[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int m = 0; m < 4; ++m) mma<Half>(acc[m][j], cols[m][step], row[step]);
    }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

template <typename F>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
    merge_resident_kernel(const __grid_constant__ MergeTable table) {
  using T = bf16;
  constexpr bool kScaled = sizeof(F) == 4;
  using Half = std::conditional_t<kScaled, fp16, bf16>;
  Resident& held = *reinterpret_cast<Resident*>(dynamic_shared);
  __shared__ MergeLayer layer;
  __shared__ Work work;
  __shared__ int found;
  find_layer<&MergeLayer::first_block>(table, layer, found);
  if (threadIdx.x == 0) {
    work = work_of<T, F>(table, layer);
    work.wide_A &= layer.k % (16 / sizeof(F)) == 0;  // no chunk reaches beyond a row
  }
  __syncthreads();

  const int warp = int(threadIdx.x) / 32, warp_row = warp / 2 * kWarp, warp_col = warp % 2 * kWarp;
#pragma unroll 1
  for (int tile = 0; tile < work.tiles; ++tile) {
    if (table.rounding == Rounding::compensated)
      prefetch_tile<T>(layer.residual, layer, work, tile);  // of W it does not pay: merge.cu
    if (tile == 0)
#pragma unroll 1
      for (int below = 0; below * kRows < work.rows; ++below)
        fill<F, false>(held.B[below], held.B_units + below * kRows, layer, true,
                       work.row0 + below * kRows);
    else
      __syncthreads();  // the panel has been multiplied, its units have been used
    fill<F, true>(held.A, held.A_units, layer, work.wide_A, work.col0 + tile * kCols);
    if (!kScaled) wait_for_copies<0>();
    __syncthreads();
#pragma unroll 1
    for (int row = warp_row, below = 0; below * kRows < work.rows; row += kRows, ++below) {
      float acc[4][8][4] = {};
      multiply_panels<Half>(acc, held.A, held.B[below], int(layer.r), warp_row, warp_col);
      const Units<kScaled> units{held.B_units, held.A_units};
      if (work.wide) {
        with_rounding<T>(table.rounding, [&](auto rounding) {
          constexpr Rounding kRounding = decltype(rounding)::value;
          Strip<T> window[kResidentWindow<kRounding>];
          merge_wide<kRounding, 0>(acc, units, window, layer, work, tile, row, warp_col);
        });
      } else {  // the second panel is free: see merge()
        merge_narrow<T>(table.rounding, acc, units, layer, work, tile, row, warp_col,
                        reinterpret_cast<float*>(held.B[1].bytes) + warp * 8 * kWarp);
      }
    }
  }
}

}  // namespace

MergeKernel resident_merge(bool narrow_factors) {
  return {narrow_factors ? merge_resident_kernel<bf16> : merge_resident_kernel<float>,
          int(sizeof(Resident))};
}

bool can_be_resident(const MergeLayer& layer, bool narrow_factors) {
  if (layer.r > kMostRank) return false;
  return narrow_factors ? is_wide<bf16>(layer.lora_B)
                        : layer.r % 4 == 0 && is_wide<float>(layer.lora_B);
}

}  // namespace relora
