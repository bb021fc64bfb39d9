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

// ---- prune.cu -----------------------------------------------------------------------------------

// A contiguous tensor, as a row of int64. Any alignment; 16 bytes for the fast path.
struct PruneTensor {
  void* data;
  void* partner;         // as many elements, zeroed where data is; null: none
  int64_t size;          // elements
  int64_t dtype;         // DType
  int64_t partner_dtype; // DType
  int64_t seed;          // prune_random
  int64_t first;         // prune_random: logical number of the first element
};
static_assert(sizeof(PruneTensor) == 7 * sizeof(int64_t), "built as an array of int64");

// Bytes that prune() needs at `workspace`, 16-byte aligned, uninitialised.
int64_t prune_workspace(const PruneTensor* tensors, int64_t count);

// Each tensor: zero what is at most the `ratio`-quantile of its magnitudes.
cudaError_t prune(const PruneTensor* tensors, int64_t count, double ratio, void* workspace,
                  cudaStream_t stream);

// Zero the elements whose 32 random bits are below `threshold`, in [0, 2^32].
cudaError_t prune_random(const PruneTensor* tensors, int64_t count, uint64_t threshold,
                         cudaStream_t stream);

// For keys whose bits above `shift + bits` equal prefixes[i] (device memory), counts[i][digit] +=
// their next `bits` (at most kCountBits) bits; lowest[i] = min(itself, least key above the prefix),
// highest[i] = max(itself, greatest key).
constexpr int kCountBits = 13;
cudaError_t magnitude_counts(const PruneTensor* tensors, int64_t count, const int64_t* prefixes,
                             int shift, int bits, int64_t* counts, int64_t* lowest,
                             int64_t* highest, cudaStream_t stream);

}  // namespace relora
