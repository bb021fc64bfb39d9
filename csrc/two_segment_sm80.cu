// The two-segment product of launch.h on sm_80 and newer, by cp.async, ldmatrix and mma.sync:
// Ampere, Ada, consumer Blackwell, and any GPU without a kernel of its own.
//
// A block of eight warps computes a 128 x 128 tile, a warp 64 x 32 of it. While one k-step is
// multiplied, the next ones are copied, first those of (P, B), then those of (x, W), for the same
// accumulators. The tile is stored through shared memory, 16 bytes of a row per thread.
//
// Q and dB take a launch each. For 16384 x 4096, r = 128, an A100 reads dy in 67 us at 2 TB/s and
// multiplies for as long at an estimated 250 TFLOP/s, so one launch for both would gain nothing.
#include <algorithm>

#include "launch.h"
#include "ptx.cuh"
#include "two_segment.cuh"
#include "two_segment.h"

namespace relora {
namespace {

using namespace two_segment;

constexpr int kTile = 128, kDepth = 32, kStages80 = 4, kThreads80 = 256;
constexpr int kTileBytes = kTile * kDepth * 2, kStageBytes = 2 * kTileBytes;
constexpr int kOutPitch = kTile * 2 + 16;  // bytes; + 16 spreads the banks
constexpr int kShared = kStages80 * kStageBytes;
static_assert(kTile == kBlockM && kTile * kOutPitch <= kShared);

// Byte offset of the 16-byte chunk that holds (i, k .. k + 7) of a tile, or, if not K-contiguous,
// (i .. i + 7, k). Rows have 64 bytes along k, or 256 along i. Chunks are xored so that eight rows of
// one column cover all banks.
template <bool kContiguousK>
__device__ __forceinline__ uint32_t chunk_at(int i, int k) {
  return kContiguousK ? i * 64 + (((k / 8) ^ (i / 2)) & 3) * 16
                      : k * 256 + ((i / 8) ^ (k & 7)) * 16;
}

// Copies one tile of an operand, with zeros beyond its edges: two chunks per thread.
template <bool kContiguousK>
__device__ __forceinline__ void fetch(uint32_t to, const Matrix& t, int i0, int k0, int extent,
                                      int depth) {
#pragma unroll
  for (int c = threadIdx.x; c < kTileBytes / 16; c += kThreads80) {
    const int i = kContiguousK ? c / 4 : c % 16 * 8, k = kContiguousK ? c % 4 * 8 : c / 16;
    const int row = kContiguousK ? i0 + i : k0 + k, rows = kContiguousK ? extent : depth;
    const int col = kContiguousK ? k0 + k : i0 + i, cols = kContiguousK ? depth : extent;
    const int count = row < rows && col < cols ? (cols - col < 8 ? cols - col : 8) : 0;
    const uint16_t* const data = static_cast<const uint16_t*>(t.data);
    ptx::copy_16(to + chunk_at<kContiguousK>(i, k), count ? data + row * t.row + col : data,
                 count * 2);
  }
}

template <typename T, Form kForm, bool kDropout>
__global__ void __launch_bounds__(kThreads80, 2) two_segment_mma_kernel(const TwoSegmentArgs a) {
  constexpr bool kLeftK = kForm != Form::tn, kRightK = kForm == Form::nt;
  const uint32_t memory = ptx::shared_memory();
  const int m = int(a.m), n = int(a.n), k = int(a.k), r = int(a.r);
  const Steps steps(r, k, kDepth);
  const Schedule schedule(m, n, steps.total, a.slab_steps, kTile, 1);
  const Work work = schedule.work(int(blockIdx.x), 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % 2 * 64, col = warp / 2 * 32;  // of the warp in the tile
  const int part = lane / 8, line = lane % 8;  // of the 8 x 8 matrix whose row this lane addresses

  // Copies step s into its stage; past the end commits an empty group, so that groups count steps.
  const auto start = [&](int s) {
    if (s < work.to) {
      const Step step = steps.at(s);
      const uint32_t to = memory + s % kStages80 * kStageBytes;
      fetch<kLeftK>(to, step.low ? a.p : a.x, work.row, step.k, m, step.low ? r : k);
      fetch<kRightK>(to + kTileBytes, step.low ? a.b : a.w, work.col, step.k, n, step.low ? r : k);
    }
    ptx::copy_commit();
  };

  float acc[4][4 * 4] = {};  // [16 rows][8 columns x (2 + 2 of the row 8 below)]
  for (int s = work.from; s < work.from + kStages80 - 1; ++s) start(s);
  for (int s = work.from; s < work.to; ++s) {
    ptx::copy_wait<kStages80 - 2>();
    __syncthreads();  // step s has arrived for all threads, and all have read step s - 1
    start(s + kStages80 - 1);
    if (kDropout && s == steps.low)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mask(acc[i], a.dropout, work.row + row + i * 16 + lane / 4, work.col + col, lane);
    const uint32_t left = memory + s % kStages80 * kStageBytes, right = left + kTileBytes;
#pragma unroll
    for (int k0 = 0; k0 < kDepth; k0 += 16) {
      uint32_t
          b[2][4];  // 16 columns each: [(columns, k) in 8 x 8 parts (0, 0), (0, 1), (1, 0), (1, 1)]
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = col + j * 16 + part / 2 * 8, at_k = k0 + part % 2 * 8;
        ptx::load_matrices<!kRightK>(b[j], right + (kRightK ? chunk_at<true>(at + line, at_k)
                                                            : chunk_at<false>(at, at_k + line)));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t l[4];
        const int at = row + i * 16 + part % 2 * 8, at_k = k0 + part / 2 * 8;
        ptx::load_matrices<!kLeftK>(l, left + (kLeftK ? chunk_at<true>(at + line, at_k)
                                                      : chunk_at<false>(at, at_k + line)));
#pragma unroll
        for (int j = 0; j < 4; ++j)
          ptx::mma<T>(&acc[i][j * 4], l, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  // Epilogue. Partial sums are stored as they are, in whole 32-byte sectors.
  const int my_row = row + lane / 4, my_col = col + lane % 4 * 2;
  if constexpr (kForm == Form::tn) {
    float* const out = static_cast<float*>(a.out.data) + int64_t(work.slab) * m * a.out.row;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 16; j += 2) {
        const int64_t at = work.row + my_row + i * 16 + j / 2 % 2 * 8;
        const int across = work.col + my_col + j / 4 * 8;
        if (at < m && across < n)
          *reinterpret_cast<float2*>(out + at * a.out.row + across) = {acc[i][j], acc[i][j + 1]};
      }
    return;
  }
  ptx::copy_wait<0>();
  __syncthreads();  // the ring is free
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    finish<T>(acc[i], a.scale, a.bias, work.col + my_col, n);
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const int at = my_row + i * 16 + j / 2 % 2 * 8, across = my_col + j / 4 * 8;
      ptx::store_shared_32(memory + at * kOutPitch + across * 2,
                           ptx::pack<T>(acc[i][j], acc[i][j + 1]));
    }
  }
  __syncthreads();
  const bool wide = a.out.row % 8 == 0 && reinterpret_cast<uintptr_t>(a.out.data) % 16 == 0;
  for (int c = threadIdx.x; c < kTile * kTile / 8; c += kThreads80) {
    const int i = c / (kTile / 8), j = c % (kTile / 8) * 8;
    const int64_t at = work.row + i;
    const int across = work.col + j;
    if (at >= m || across >= n) continue;
    uint16_t* const out = static_cast<uint16_t*>(a.out.data) + at * a.out.row + across;
    const uint32_t from = memory + i * kOutPitch + j * 2;
    if (wide && across + 8 <= n) {
      *reinterpret_cast<uint4*>(out) = ptx::load_shared_128(from);
    } else {
      for (int e = 0; e < 8 && across + e < n; ++e) out[e] = ptx::load_shared_16(from + e * 2);
    }
  }
}

using Kernel = void (*)(TwoSegmentArgs);

template <typename T>
Kernel kernel_of(Form form, bool dropout) {
  if (dropout) return form == Form::nn ? two_segment_mma_kernel<T, Form::nn, true> : nullptr;
  return form == Form::nt   ? two_segment_mma_kernel<T, Form::nt, false>
         : form == Form::nn ? two_segment_mma_kernel<T, Form::nn, false>
                            : two_segment_mma_kernel<T, Form::tn, false>;
}

bool can_copy(const Matrix& t) {
  return t.data && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row % 8 == 0;
}

}  // namespace

cudaError_t two_segment_sm80(const TwoSegmentArgs& args, cudaStream_t stream) {
  TwoSegmentArgs a = args;
  const bool partial = a.form == Form::tn, dropout = a.dropout.threshold > 0;
  const Kernel kernel = a.dtype == DType::bf16 ? kernel_of<bf16>(a.form, dropout)
                                               : kernel_of<fp16>(a.form, dropout);
  if (!kernel || a.dtype == DType::f32 || a.block_n != kTile || a.cluster != 1 || a.m < 1 ||
      a.n < 1 || a.k < 1 || a.r < 0 || !can_copy(a.x) || !can_copy(a.w) ||
      (a.r > 0 && !(can_copy(a.p) && can_copy(a.b))) || (dropout && a.r < 1) || a.sums.data ||
      (partial && (a.r > 0 || a.slab_steps < 1 || a.out.row % 2)))
    return cudaErrorInvalidValue;
  const int64_t most = INT32_MAX - 2 * kTile;  // coordinates are 32-bit, past the last tile too
  if (std::max({a.m, a.n, a.k, a.r}) > most) return cudaErrorInvalidConfiguration;
  const int steps = Steps(a.r, a.k, kDepth).total;
  a.slab_steps = partial ? a.slab_steps * (kBlockK / kDepth) : steps;
  const int64_t units = Schedule(a.m, a.n, steps, a.slab_steps, kTile, 1).units();
  if (units > most) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared))
    return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(units));
  config.blockDim = dim3(kThreads80);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace relora
