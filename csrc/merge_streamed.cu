// merge.cu's kernel for any layer with fp32 factors. lora_A passes through a ring in shared memory, in
// stages of 16 along r; lora_B's stages stay there if r <= 128.
//
// For a 16-bit W the factors are rounded to tf32. That keeps 11 bits, which is everything if they were
// bf16. For an fp32 W each factor is split into the sum of two tf32, and three of the four products are
// computed, for a precision of 2^-22: three times the tensor work, and still 1.7 times as fast as the
// fp32 pipes (12.9 GFLOP at some 300 TFLOP/s against 4.3 at 60, for 4096 x 4096 at r = 128).
#include "merge_sum.cuh"

namespace relora {
namespace {

// ---- The product --------------------------------------------------------------------------------

constexpr int kRing = 4;   // stages of lora_A in flight
constexpr int kPanel = 8;  // stages of lora_B that stay, if all of r fits

constexpr int kDepth = 16;  // of a stage along r: 64 bytes per row of lora_B or column of lora_A

struct alignas(16) Slot { unsigned char bytes[64 * 128]; };
struct Stages {
  Slot A[kRing];   // [kDepth][kCols], at swizzled_A
  Slot B[kPanel];  // [kRows][kDepth], at swizzled_B
};

// Byte offsets in a slot. A stage has two steps. In step s lane 4 g + t multiplies numbers 8 s + 2 t and
// 8 s + 2 t + 1 along r: those of columns 8 g ... 8 g + 7 of A, which are two rows of its slot, with
// those of rows 8 g + j of B. The xors spread what is read at once over all banks.
__device__ __forceinline__ int swizzled_A(int row, int chunk) {
  const int t = row / 2 % 4, turn = (t & 1) | (t & 2) << 1;
  return row * kCols * 4 + (chunk ^ turn) * 16;
}
__device__ __forceinline__ int swizzled_B(int row, int chunk) {
  return (row ^ row / 8 % 2) * 64 + (chunk ^ row / 16 % 2 * 2) * 16;
}

// Fills 16 bytes of shared memory: the elements of `m` from (row, col) on, zeros from the `valid`-th on.
__device__ __forceinline__ void fill_chunk(void* to, const Matrix& m, int64_t row, int64_t col,
                                           int64_t valid) {
  const float* from = global_memory<const float>(m.data);  // a valid address even if nothing is read
  if (valid > 0) from += row * m.row + col * m.col;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    copy_async<4>(static_cast<float*>(to) + i, i < valid ? from + i * m.col : from,
                  i < valid ? 4 : 0);
}

// Copies stage `chunk` of a factor: lora_A's columns from `begin` on, or lora_B's rows.
template <bool kIsA>
__device__ __forceinline__ void fill(Slot& slot, const MergeLayer& layer, bool wide, int chunk,
                                     int64_t begin) {
  constexpr int kElements = 4, kChunks = kIsA ? kCols / kElements : 4;
  constexpr int kCopies = int(sizeof(Slot)) / 16 / kThreads, kStep = kThreads / kChunks;
  const Matrix& m = kIsA ? layer.lora_A : layer.lora_B;
  const int thread = int(threadIdx.x), row = thread / kChunks, at = thread % kChunks;
  const int64_t depth = int64_t(chunk) * kDepth;
  const int64_t first_row = (kIsA ? depth : begin) + row;
  const int64_t first_col = (kIsA ? begin : depth) + at * kElements;
  const int64_t rows = (kIsA ? layer.r : layer.n) - first_row;
  const int64_t cols = (kIsA ? layer.k : layer.r) - first_col;
  const auto to = [&](int i) {
    const int line = row + i * kStep;
    return slot.bytes + (kIsA ? swizzled_A(line, at) : swizzled_B(line, at));
  };
  if (wide) {
    const float* const data = global_memory<const float>(m.data);  // valid even if nothing is read
    const float* from = data + first_row * m.row + first_col;
    const int bytes = cols <= 0 ? 0 : int(min(cols, int64_t(kElements))) * 4;
#pragma unroll
    for (int i = 0; i < kCopies; ++i, from += kStep * m.row) {
      const bool there = i * kStep < rows && bytes > 0;
      copy_async<16>(to(i), there ? from : data, there ? bytes : 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i)
      fill_chunk(to(i), m, first_row + i * kStep, first_col, i * kStep < rows ? cols : 0);
  }
}

// Loads columns col ... col + 7 of A in the order in which a lane multiplies them in a step: out[m] has
// the first words of columns 2 m and 2 m + 1, then their second words.
__device__ __forceinline__ void load_columns(uint32_t (&out)[4][4], const Slot& A, int col, int t,
                                             int step) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = swizzled_A(8 * step + 2 * t + i, col / 4 + half);
      const uint4 v = *reinterpret_cast<const uint4*>(A.bytes + at);
      out[2 * half][2 * i] = v.x, out[2 * half][2 * i + 1] = v.y;
      out[2 * half + 1][2 * i] = v.z, out[2 * half + 1][2 * i + 1] = v.w;
    }
}

// Rounds fp32 words to tf32; if `rest` is given, it gets the remainders, also as tf32.
template <int kCount>
__device__ __forceinline__ void split(uint32_t (&words)[kCount], uint32_t* rest) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t tf32 = to_tf32(words[i]);
    if (rest)
      rest[i] = to_tf32(
          float_bits(__fsub_rn(bits_float(words[i]), bits_float(tf32 & 0xFFFFE000u))));
    words[i] = tf32;
  }
}

// Adds the products of one stage to acc. Its layout: first_strip.
template <bool kSplit>
__device__ __forceinline__ void multiply(float (&acc)[4][8][4], const Slot& A, const Slot& B,
                                         int warp_row, int warp_col) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll 1  // both steps at once would fit, too, and are not measured
  for (int step = 0; step < 2; ++step) {
    uint32_t cols[4][4], cols_rest[4][4];
    load_columns(cols, A, warp_col + 8 * g, t, step);
#pragma unroll
    for (int m = 0; m < 4; ++m)
      split(cols[m], kSplit ? cols_rest[m] : nullptr);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t row_rest[2];
      const uint2 v = *reinterpret_cast<const uint2*>(
          B.bytes + swizzled_B(warp_row + 8 * g + j, 2 * step + t / 2) + t % 2 * 8);
      uint32_t row[2] = {v.x, v.y};
      split(row, kSplit ? row_rest : nullptr);
      // Small products first, and never the same accumulator twice in a row.
#pragma unroll
      for (int m = 0; kSplit && m < 4; ++m) mma(acc[m][j], cols[m], row_rest);
#pragma unroll
      for (int m = 0; kSplit && m < 4; ++m) mma(acc[m][j], cols_rest[m], row);
#pragma unroll
      for (int m = 0; m < 4; ++m) mma(acc[m][j], cols[m], row);
    }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

struct StreamedWork : Work {
  int chunks;  // stages along r
  bool stays;  // every stage of lora_B has a slot of its own
};

// The rounding is selected at run time, once per tile: three kernels to compile instead of nine.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
    merge_kernel(const __grid_constant__ MergeTable table) {
  Stages& stages = *reinterpret_cast<Stages*>(dynamic_shared);
  __shared__ MergeLayer layer;
  __shared__ StreamedWork work;
  __shared__ int found;
  find_layer<&MergeLayer::first_block>(table, layer, found);
  if (threadIdx.x == 0) {
    static_cast<Work&>(work) = work_of<T>(table, layer);
    work.chunks = int((layer.r + kDepth - 1) / kDepth);
    work.stays = work.chunks <= kPanel;
  }
  __syncthreads();

  const int warp = int(threadIdx.x) / 32, warp_row = warp / 2 * kWarp, warp_col = warp % 2 * kWarp;
  int next_tile = 0, next_chunk = 0, next_slot = 0;  // the stage to fill, kRing - 1 ahead of its use
  int tile = 0, chunk = 1 - kRing, slot = 0;         // chunk < 0: nothing to multiply yet
  Strip<T> window[kWindow<T>];
  float acc[4][8][4] = {};
  while (tile < work.tiles) {
    if (chunk == (tile ? 0 : 1 - kRing)) {  // so that the product hides HBM's latency
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
      __syncthreads();  // this stage's copies have all arrived, and next_slot has been multiplied
    }
    if (next_tile < work.tiles) {
      fill<true>(stages.A[next_slot], layer, work.wide_A, next_chunk,
                    work.col0 + next_tile * kCols);
      if (!work.stays || next_tile == 0)
        fill<false>(stages.B[work.stays ? next_chunk : next_slot], layer, work.wide_B,
                       next_chunk, work.row0);
      next_slot = (next_slot + 1) % kRing;
      if (++next_chunk == work.chunks) next_chunk = 0, ++next_tile;
    }
    commit_copies();  // even if the group is empty: wait_for_copies counts groups
    if (chunk < 0) {
      ++chunk;
      continue;
    }
    multiply<std::is_same<T, float>::value>(
        acc, stages.A[slot], stages.B[work.stays ? chunk : slot], warp_row, warp_col);
    slot = (slot + 1) % kRing;
    if (++chunk < work.chunks) continue;

    if (!work.wide) __syncthreads();  // frees the last multiplied slot, until the next stage
    if (work.wide)
      with_rounding<T>(table.rounding, [&](auto rounding) {
        merge_wide<decltype(rounding)::value>(acc, window, layer, work, tile, warp_row, warp_col);
      });
    else
      merge_narrow<T>(
          table.rounding, acc, layer, work, tile, warp_row, warp_col,
          reinterpret_cast<float*>(stages.A[(slot + kRing - 1) % kRing].bytes) + warp * 8 * kWarp);
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

}  // namespace

MergeKernel streamed_merge(DType weight) {
  constexpr int kShared = int(sizeof(Stages));
  switch (weight) {
    case DType::f32: return {merge_kernel<float>, kShared, kThreads};
    case DType::fp16: return {merge_kernel<fp16>, kShared, kThreads};
    default: return {merge_kernel<bf16>, kShared, kThreads};
  }
}

}  // namespace relora
