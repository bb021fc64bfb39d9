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

// ---- merge.cu -----------------------------------------------------------------------------------

// One layer of a list.
struct MergeLayer {
  Matrix weight;     // (n, k)
  Matrix residual;   // (n, k), weight's dtype; read and written by Rounding::compensated alone
  Matrix lora_A;     // (r, k)
  Matrix lora_B;     // (n, r), lora_A's dtype
  Matrix restart_A;  // (restart_rows, k): the parameter to draw anew, or the rows of a shard of it
  Matrix restart_B;  // (n, r): the parameter to zero, restart_A's dtype
  int64_t n, k, r, restart_rows;
  uint64_t seed, restart_seed;       // of stochastic rounding; of A's draw
  int64_t first_row, first_restart;  // logical rows of weight's and restart_A's first ones
  float scaling, restart_step;       // s; fl32(2^-23 * bound) of A's draw
  uint32_t restarts;                 // 1: restart_A and restart_B are to be written
  uint32_t first_block, first_restart_block;  // set by merge(): where it begins in the grids
};

// Layers that travel as a launch's own arguments, within the 4 KB that every driver allows.
constexpr int kInlineLayers = 16;

// W += scaling * B @ A in place for every layer, in one launch; then A drawn anew and B zeroed
// where it restarts, in a second launch behind it. The layers share the dtypes and the rounding; the
// factors are fp32 or weight's dtype. `table`: device memory for `count` MergeLayers, unused up to
// kInlineLayers. Enqueues on `stream`, never synchronises, copies nothing from host memory;
// launches nothing where there is nothing to do.
cudaError_t merge(MergeLayer* layers, int count, DType weight_dtype, DType factor_dtype,
                  DType restart_dtype, Rounding rounding, MergeLayer* table, cudaStream_t stream);

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
