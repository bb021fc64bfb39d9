// What the .cu files define and bindings.cpp calls: raw pointers, sizes, strides and a stream.
// Nothing here knows torch, so one binary serves every torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace relora {

enum class DType : int { f32, bf16, fp16 };
enum class Rounding : int { nearest, stochastic, compensated };
enum class MergeKind : int { streamed, sm90 };

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
  uint32_t first_block, first_restart_block;  // set by merge(): in the grids; sm90: its first unit
  uint32_t unit_steps;                        // set by merge(): sm90
};

// Layers that travel as a launch's own arguments, within the 4 KB that every driver allows.
constexpr int kInlineLayers = 16;

// W += scaling * B @ A in place for every layer, in one launch; then A drawn anew and B zeroed
// where it restarts, in a second launch behind it. The layers share the dtypes and the rounding; the
// factors are fp32, of the kind `sm90` also bf16. Their elements are finite and below 2^120, which the
// caller has made sure of: near float32's end tf32 rounds to infinity. Of elements below 2^-115 the kind
// `streamed` holds multiples of 2^-136 alone. `table`: device memory for `count` MergeLayers and
// kCounterBytes more; unused up to kInlineLayers, but by the kind `sm90`. That one is for a GPU of compute
// capability 9.0, a bf16 weight and residual with their columns next to each other, at most 2^29 of them and
// from row to row, r <= kMostRank and a scaling of 0 or of a magnitude in [2^-16, 2^7), else
// cudaErrorInvalidValue, as for other dtypes; cudaErrorNotSupported where the module was built without it.
// Enqueues on `stream`, never synchronises, copies nothing from host memory; launches nothing where there is
// nothing to do.
constexpr int kMostRank = 128, kCounterBytes = 8;
cudaError_t merge(MergeLayer* layers, int count, DType weight_dtype, DType factor_dtype,
                  DType restart_dtype, Rounding rounding, MergeKind kind, MergeLayer* table,
                  cudaStream_t stream);

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

// Bytes that prune() needs at `workspace` on the current device, 16-byte aligned, uninitialised.
cudaError_t prune_workspace(const PruneTensor* tensors, int64_t count, int64_t* bytes);

// Each tensor: zero what is at most the `ratio`-quantile of its magnitudes. cudaErrorInvalidValue where
// `workspace`, of `bytes`, is less than it needs.
cudaError_t prune(const PruneTensor* tensors, int64_t count, double ratio, void* workspace,
                  int64_t bytes, cudaStream_t stream);

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

// ---- The two-segment product -------------------------------------------------------------------

// How x and w are stored, as in BLAS: n as the product reads them, t transposed.
//   nt  x (m, k), w (n, k), p (m, r), b (n, r)   y = x W^T + P B^T, P = x A^T
//   nn  x (m, k), w (k, n), p (m, r), b (r, n)   dx = dy W + Q A, Q = dy B
//   tn  x (k, m), w (k, n), no p and b           dB = dy^T P, dA = Q^T x
enum class Form : int { nt, nn, tn };

// nt, nn: out (m, n) = scale * (dropout'(p @ b) + x @ w) + bias, in one fp32 accumulator.
// tn: out (slabs, m, n) float32 = x^T @ w over every slab of slab_steps * 64 rows of x and w.
// Every matrix has its columns next to each other (col 1). Elements are bf16 or fp16.
struct Bias {
  const void* data;  // (n), or null
  DType dtype;       // float32, or the operands'
};

struct Dropout {
  const int64_t* seed;  // in device memory; read where threshold > 0
  uint32_t threshold;   // of 65536: elements with fewer random bits are dropped
  float keep_scale;     // of the others
};

struct TwoSegmentArgs {
  Form form;
  Matrix out;  // tn: an even pitch, the slabs one after the other
  Matrix p, b;  // r = 0: unused, but for `sums`
  Matrix x, w;
  int64_t m, n, k, r;
  DType dtype;
  float scale;
  Bias bias;
  Dropout dropout;  // of (m, n): on p @ b
  int slab_steps;   // tn, and of `sums`
  int block_n, cluster;  // the variant of sm_90: 256 and 1 or 2, or 128 and 1; elsewhere 128 and 1
  // nn with r = 0, p (m, n), no dropout: also sums (slabs, k, n) = x^T @ p as by tn, in the same
  // launch. sm_90 alone, 128 and 1 or 2; slab_steps a multiple of 2 * cluster. Null: not wanted.
  Matrix sums;
};

// Enqueues on `stream`, never synchronises. m, n and k are at least 1. cudaErrorInvalidValue where
// an operand's start or pitch is no multiple of 16 bytes, or there is no such variant.
cudaError_t two_segment_sm90(const TwoSegmentArgs& args, cudaStream_t stream);  // sm_90a alone
cudaError_t two_segment_sm80(const TwoSegmentArgs& args, cudaStream_t stream);  // sm_80 and newer

struct MaskArgs {
  Matrix out;  // (m, k), 16-byte pitch
  Matrix x;    // (m, k), 16-bit elements, col 1
  int64_t m, k;
  Dropout dropout;
};
// out = x, with zeros where an element is dropped; keep_scale is not applied.
cudaError_t mask_rows(const MaskArgs& args, cudaStream_t stream);

struct SumArgs {
  Matrix out;  // (m, n), dtype, col 1
  Matrix in;   // (slabs, m, n) float32, col 1, the slabs one after the other
  int64_t slabs, m, n;
  float scale;
  DType dtype;
};
// out = scale * the slabs' sum, in their order.
cudaError_t sum_slabs(const SumArgs& args, cudaStream_t stream);

}  // namespace relora
