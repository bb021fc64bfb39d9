// W (n, k) += scaling * lora_B (n, r) @ lora_A (r, k), in place.
//
//   acc = sum_i B[row, i] * A[i, col]           fp32
//   d   = fl32(scaling * acc)
//   v   = fl32(W + d)                           compensated: fl32(fl32(W + residual) + d)
//   W   = round(v)                              to nearest, or stochastically
//   compensated: residual = round(v - W)
//
// d and v are rounded one by one, never contracted to an fma: the reference and the Triton kernel
// do the same, so the stored bits agree wherever the fp32 sums do.
//
// Bytes: W once in, once out (2 * sizeof(W) an element; compensated twice that) and the factors,
// which come from L2 after the first tile. FLOPs: 2 n k r, here on the fp32 pipes: at 4096 x 4096,
// r = 128, 4.3 GFLOP are some 70 us of an H200 by its data sheet, against 16 us for moving the
// 67 MB. Tensor cores would close that gap; the staging and the epilogue below would stay.
#include "launch.h"
#include "numerics.cuh"

namespace relora {
namespace {

// A block owns one kTile x kTile tile of W, a thread 8 rows of 8 neighbouring columns: 16 bytes of
// a 16-bit W, and the eight elements that share one random draw.
constexpr int kTile = 128, kPer = 8, kDepth = 16;
constexpr int kSide = kTile / kPer, kThreads = kSide * kSide;

// Lanes read two float4s, 32 bytes apart from lane to lane: a two-way bank conflict. Keeping the
// first and the second halves of the strips apart in shared memory avoids it.
__device__ __forceinline__ int strip_slot(int col) {
  return (col / 4 % 2) * (kTile / 2) + col / kPer * 4 + col % 4;
}

struct Stage {
  float A[kDepth][kTile];      // columns by strip_slot
  float B[kDepth][kTile + 4];  // transposed; + 4 keeps 16-byte rows and spreads the banks
};

// kPer values at a fixed step, as fp32; zeros from `count` on.
template <typename F>
__device__ __forceinline__ void load_column(float (&out)[kPer], const F* at, int64_t step,
                                            int count) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) out[i] = i < count ? to_float(at[i * step]) : 0.f;
}

// kDepth steps of both factors, with zeros outside (r, k) and (n, r). Neighbouring threads take
// neighbouring columns of either factor.
template <typename F>
__device__ __forceinline__ void load_stage(Stage& stage, const MergeArgs& args, int64_t row0,
                                           int64_t col0, int64_t depth0) {
  constexpr int kDepthStep = kThreads / kTile, kRowStep = kThreads / kDepth;
  const int depths = int(min(args.r - depth0, int64_t(kDepth)));
  const int a_depth = threadIdx.x / kTile, a_col = threadIdx.x % kTile;
  const int b_row = threadIdx.x / kDepth, b_depth = threadIdx.x % kDepth;
  const int cols = int(min(args.k - col0, int64_t(kTile)));
  const int rows = int(min(args.n - row0, int64_t(kTile)));
  float value[kPer];
  load_column(value,
              static_cast<const F*>(args.lora_A.data) + (depth0 + a_depth) * args.lora_A.row +
                  (col0 + a_col) * args.lora_A.col,
              kDepthStep * args.lora_A.row,
              a_col < cols ? (depths - a_depth + kDepthStep - 1) / kDepthStep : 0);
#pragma unroll
  for (int i = 0; i < kPer; ++i) stage.A[a_depth + i * kDepthStep][strip_slot(a_col)] = value[i];
  load_column(value,
              static_cast<const F*>(args.lora_B.data) + (row0 + b_row) * args.lora_B.row +
                  (depth0 + b_depth) * args.lora_B.col,
              kRowStep * args.lora_B.row,
              b_depth < depths ? (rows - b_row + kRowStep - 1) / kRowStep : 0);
#pragma unroll
  for (int i = 0; i < kPer; ++i) stage.B[b_depth][b_row + i * kRowStep] = value[i];
}

// Eight neighbouring elements of one row, moved 16 bytes at a time.
template <typename T>
struct alignas(16) Strip { T v[kPer]; };

template <typename T>
__device__ __forceinline__ bool is_wide(const Matrix& m) {
  return m.col == 1 && m.row * sizeof(T) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ void copy_strip(T* to, const T* from) {
#pragma unroll
  for (int i = 0; i < int(sizeof(Strip<T>) / 16); ++i)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

template <typename T, Rounding kRounding>
__device__ __forceinline__ void merge_element(T* w, T* residual, float delta, uint32_t rand16) {
  float v = to_float(*w);
  if (kRounding == Rounding::compensated) v = __fadd_rn(v, to_float(*residual));
  v = __fadd_rn(v, delta);
  *w = kRounding == Rounding::stochastic ? round_stochastic<T>(v, rand16) : round_nearest<T>(v);
  if (kRounding == Rounding::compensated) *residual = round_nearest<T>(__fsub_rn(v, to_float(*w)));
}

template <typename T, Rounding kRounding>
__global__ void __launch_bounds__(kThreads, 2) merge_kernel(const MergeArgs args) {
  __shared__ Stage stage;

  const int64_t col_tiles = (args.k + kTile - 1) / kTile;  // one grid axis: y and z stop at 65535
  const int64_t row0 = blockIdx.x / col_tiles * kTile, col0 = blockIdx.x % col_tiles * kTile;
  const int strip_row = threadIdx.x / kSide * kPer, strip = threadIdx.x % kSide;

  float acc[kPer][kPer] = {};
  for (int64_t depth0 = 0; depth0 < args.r; depth0 += kDepth) {
    switch (args.factor_dtype) {  // at run time: 8 kernels to compile rather than 24
      case DType::f32: load_stage<float>(stage, args, row0, col0, depth0); break;
      case DType::bf16: load_stage<bf16>(stage, args, row0, col0, depth0); break;
      case DType::fp16: load_stage<fp16>(stage, args, row0, col0, depth0); break;
    }
    __syncthreads();
#pragma unroll 4
    for (int depth = 0; depth < kDepth; ++depth) {
      alignas(16) float a[kPer], b[kPer];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        reinterpret_cast<float4*>(a)[half] =
            *reinterpret_cast<const float4*>(&stage.A[depth][half * (kTile / 2) + strip * 4]);
        reinterpret_cast<float4*>(b)[half] =
            *reinterpret_cast<const float4*>(&stage.B[depth][strip_row + half * 4]);
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i)
#pragma unroll
        for (int j = 0; j < kPer; ++j) acc[i][j] = fmaf(b[i], a[j], acc[i][j]);
    }
    __syncthreads();
  }

  const int64_t col = col0 + strip * kPer;
  if (col >= args.k) return;
  const int rows = int(min(args.n - row0 - strip_row, int64_t(kPer)));
  const int cols = int(min(args.k - col, int64_t(kPer)));
  constexpr bool kResidual = kRounding == Rounding::compensated;
  const Matrix &wm = args.weight, &rm = args.residual;
  const bool wide = cols == kPer && is_wide<T>(wm) && (!kResidual || is_wide<T>(rm));
  T* w_at = static_cast<T*>(wm.data) + (row0 + strip_row) * wm.row + col * wm.col;
  T* r_at = static_cast<T*>(rm.data) + (row0 + strip_row) * rm.row + col * rm.col;
#pragma unroll
  for (int i = 0; i < kPer; ++i, w_at += wm.row, r_at += rm.row) {
    if (i >= rows) return;
    Words words{};
    if (kRounding == Rounding::stochastic)
      words = draw(args.seed, kStreamRound, args.first_row + row0 + strip_row + i, col / kPer);
    if (wide) {
      Strip<T> w, residual;
      copy_strip(w.v, w_at);
      if (kResidual) copy_strip(residual.v, r_at);
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        merge_element<T, kRounding>(w.v + j, residual.v + j, __fmul_rn(args.scaling, acc[i][j]),
                                    bits16(words, j));
      copy_strip(w_at, w.v);
      if (kResidual) copy_strip(r_at, residual.v);
    } else {
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (j < cols)
          merge_element<T, kRounding>(w_at + j * wm.col, r_at + j * rm.col,
                                      __fmul_rn(args.scaling, acc[i][j]), bits16(words, j));
    }
  }
}

using Kernel = void (*)(MergeArgs);

// [DType][Rounding]. For an fp32 W every rounding is to nearest.
constexpr Kernel kKernels[3][3] = {
    {merge_kernel<float, Rounding::nearest>, merge_kernel<float, Rounding::nearest>,
     merge_kernel<float, Rounding::compensated>},
    {merge_kernel<bf16, Rounding::nearest>, merge_kernel<bf16, Rounding::stochastic>,
     merge_kernel<bf16, Rounding::compensated>},
    {merge_kernel<fp16, Rounding::nearest>, merge_kernel<fp16, Rounding::stochastic>,
     merge_kernel<fp16, Rounding::compensated>},
};

}  // namespace

cudaError_t merge(const MergeArgs& args, cudaStream_t stream) {
  if (args.n == 0 || args.k == 0 || args.r == 0) return cudaSuccess;
  const int64_t tiles = ((args.n + kTile - 1) / kTile) * ((args.k + kTile - 1) / kTile);
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(tiles));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kKernels[int(args.weight_dtype)][int(args.rounding)], args);
}

}  // namespace relora
