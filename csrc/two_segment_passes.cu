// The passes over whole matrices around the two-segment product: dropout on x, and the sum of
// slabs.
//
//   mask_rows   out (m, k) = x where kept, else 0. The factor 1 / keep is the products' scale.
//   sum_slabs   out (m, n) = scale * sum over slabs of in (slabs, m, n), float32, first slab first
//
// Bytes: 4 m k, and 4 m n (slabs + 1) at most. A thread of mask_rows has eight neighbouring columns,
// which share a draw.
#include "launch.h"
#include "numerics.cuh"

namespace relora {
namespace {

constexpr int kThreads = 256, kPer = 8;

struct alignas(16) Eight { uint16_t v[kPer]; };

__global__ void __launch_bounds__(kThreads) mask_kernel(const MaskArgs a) {
  const int64_t blocks = (a.k + kPer - 1) / kPer;  // of eight columns, in a row
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.m * blocks) return;
  const int64_t row = at / blocks, block = at % blocks;
  const uint16_t* const from =
      static_cast<const uint16_t*>(a.x.data) + row * a.x.row + block * kPer;
  uint16_t* const to = static_cast<uint16_t*>(a.out.data) + row * a.out.row + block * kPer;
  const int count = int(a.k - block * kPer < kPer ? a.k - block * kPer : kPer);
  Eight eight;
  if (count == kPer && reinterpret_cast<uintptr_t>(from) % sizeof eight == 0) {
    eight = *reinterpret_cast<const Eight*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kPer; ++i) eight.v[i] = i < count ? from[i] : uint16_t(0);
  }
  const Words words = draw(uint64_t(*a.dropout.seed), kStreamDropout, row, block);
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    if (bits16(words, i) < a.dropout.threshold) eight.v[i] = 0;
  *reinterpret_cast<Eight*>(to) = eight;  // up to the pitch, which is a multiple of eight
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const SumArgs a) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= a.m * a.n) return;
  const int64_t row = at / a.n, col = at % a.n;
  const float* from = static_cast<const float*>(a.in.data) + row * a.in.row + col;
  float sum = 0.f;
  for (int64_t slab = 0; slab < a.slabs; ++slab, from += a.m * a.in.row) sum += *from;
  static_cast<T*>(a.out.data)[row * a.out.row + col] = round_nearest<T>(sum * a.scale);
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, int64_t threads, cudaStream_t stream) {
  if (threads == 0) return cudaSuccess;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

cudaError_t mask_rows(const MaskArgs& a, cudaStream_t stream) {
  if (a.out.row % kPer || reinterpret_cast<uintptr_t>(a.out.data) % sizeof(Eight))
    return cudaErrorInvalidValue;
  return launch(mask_kernel, a, a.m * ((a.k + kPer - 1) / kPer), stream);
}

cudaError_t sum_slabs(const SumArgs& a, cudaStream_t stream) {
  constexpr void (*kernels[])(SumArgs) = {sum_kernel<float>, sum_kernel<bf16>, sum_kernel<fp16>};
  return launch(kernels[int(a.dtype)], a, a.m * a.n, stream);
}

}  // namespace relora
