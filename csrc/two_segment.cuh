// What the two-segment kernels of all architectures do to their accumulators. Their layout is the same
// for wgmma and mma.sync: four neighbouring lanes hold eight columns of a row, two each.
#pragma once

#include "launch.h"
#include "numerics.cuh"
#include "ptx.cuh"

namespace relora {

// Lane q of four gets w[i] = what lane i had in w[q]: a transposition by two butterflies.
__device__ __forceinline__ void transpose_four(uint32_t (&w)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const bool high = lane & step;
      const uint32_t other = ptx::shuffle(high ? w[i] : w[i + step], lane ^ step);
      (high ? w[i] : w[i + step]) = other;
    }
}

// acc = kept ? acc * keep_scale : 0, for rows `row` and row + 8. One draw serves the eight columns
// that four lanes hold, two each: every lane draws for one of four such blocks, then the lanes exchange
// words.
template <int kCount>
__device__ __forceinline__ void mask(float (&acc)[kCount], const Dropout& p, int row, int col,
                                     int lane) {
  const uint64_t seed = uint64_t(*p.seed);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int block = 0; block < kCount / 4; block += 4) {
      Words words = draw(seed, kStreamDropout, row + 8 * half, col / 8 + block + lane % 4);
      transpose_four(words.w, lane);
#pragma unroll
      for (int of = 0; of < 4; ++of) {
        float* pair = acc + (block + of) * 4 + half * 2;
        pair[0] = (words.w[of] & 0xFFFFu) >= p.threshold ? pair[0] * p.keep_scale : 0.f;
        pair[1] = (words.w[of] >> 16) >= p.threshold ? pair[1] * p.keep_scale : 0.f;
      }
    }
}

template <typename T>
__device__ __forceinline__ float bias_at(const Bias& bias, int col, int n) {
  if (col >= n) return 0.f;
  return bias.dtype == DType::f32 ? static_cast<const float*>(bias.data)[col]
                                  : to_float(static_cast<const T*>(bias.data)[col]);
}

// acc = acc * scale + bias; the first of this lane's columns is `col`. Kept out of the loop that stores,
// which without a bias would take a branch per element.
template <typename T, int kCount>
__device__ __forceinline__ void finish(float (&acc)[kCount], float scale, const Bias& bias, int col,
                                       int n) {
  if (bias.data) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float b0 = bias_at<T>(bias, col + i * 2, n), b1 = bias_at<T>(bias, col + i * 2 + 1, n);
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i + j] = fmaf(acc[i + j], scale, j % 2 ? b1 : b0);
    }
  } else if (scale != 1.f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] *= scale;
  }
}

}  // namespace relora
