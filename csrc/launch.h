// What the .cu files define and bindings.cpp calls: raw pointers, sizes, strides and a stream.
// Nothing here knows torch, so one binary serves every torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace relora {

enum class DType : int { f32, bf16, fp16 };
enum class Rounding : int { nearest, stochastic, compensated };

struct Matrix {
  void* data;
  int64_t row, col;  // strides in elements
};

struct MergeArgs {
  Matrix weight;    // (n, k)
  Matrix residual;  // (n, k), weight's dtype; read and written by Rounding::compensated alone
  Matrix lora_A;    // (r, k)
  Matrix lora_B;    // (n, r), lora_A's dtype
  int64_t n, k, r;
  DType weight_dtype, factor_dtype;
  Rounding rounding;
  float scaling;
  uint64_t seed;
  int64_t first_row;  // logical row of weight's first one: random bits belong to logical elements
};

// W += scaling * B @ A in place. Enqueues on `stream`, never synchronises; nothing is launched
// where n, k or r is 0.
cudaError_t merge(const MergeArgs& args, cudaStream_t stream);

}  // namespace relora

// ---- The two-segment product -------------------------------------------------------------------

namespace relora {

// out (m, n) = dropout'(scale * p (m, r) @ b) + scale * x (m, k) @ w + bias, one fp32 accumulator.
// Every matrix has its columns next to each other (col 1). Elements are bf16 or fp16.
struct TwoSegmentArgs {
  Matrix out;
  Matrix p, b;        // r = 0: unused
  Matrix x, w;
  bool contiguous_n;  // b (r, n) and w (k, n), else b (n, r) and w (n, k)
  const void* bias;   // (n), or null
  int64_t m, n, k, r;
  DType dtype, bias_dtype;  // bias: float32 or dtype
  float scale;
  const int64_t* seed;  // in device memory; read where threshold > 0
  uint32_t threshold;   // of 65536: elements of (m, n) with fewer random bits drop p @ b
  float keep_scale;
  int block_n, cluster;  // the variant of sm_90: 256 and 1 or 2, or 128 and 1
};

// Enqueues on `stream`, never synchronises. m, n and k are at least 1. cudaErrorInvalidValue where an
// operand's start or pitch is no multiple of 16 bytes, or there is no such variant.
cudaError_t two_segment_sm90(const TwoSegmentArgs& args, cudaStream_t stream);

}  // namespace relora
