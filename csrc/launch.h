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
