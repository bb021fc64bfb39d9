// What the .cu files define and bindings.cpp calls: raw pointers, sizes, strides and a stream.
// Nothing here depends on torch, so one binary works with every version of it.
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
  Matrix restart_A;  // (restart_rows, k): the parameter to redraw, or one shard's rows of it
  Matrix restart_B;  // (n, r): the parameter to zero, restart_A's dtype
  int64_t n, k, r, restart_rows;
  uint64_t seed, restart_seed;       // for stochastic rounding; for drawing A
  int64_t first_row, first_restart;  // logical row numbers of weight's and restart_A's first rows
  float scaling, restart_step;       // s; fl32(2^-23 * bound), for drawing A
  uint32_t restarts;                 // 1: write restart_A and restart_B
  uint32_t first_block, first_restart_block;  // set by merge(): in the two grids; sm90: the first unit
  uint32_t unit_steps;                        // set by merge(), sm90: steps of a unit
};

// Up to this many layers are passed as kernel arguments, within the 4 KB that every driver allows.
constexpr int kInlineLayers = 16;

// For every layer, W += scaling * B @ A in place, in one launch. Then, for the layers that restart, redraws A and
// zeroes B, in a second launch. All layers share the dtypes and the rounding.
//
// The factors are fp32; the kind `sm90` also takes bf16. The caller guarantees that their elements are finite and
// below 2^120: near float32's maximum tf32 rounds to infinity. The kind `streamed` represents elements below 2^-115
// only as multiples of 2^-136.
//
// `table`: device memory for `count` MergeLayers and kCounterBytes more. Unused up to kInlineLayers layers, except
// by the kind `sm90`.
//
// The kind `sm90` is for GPUs of compute capability 9.0. It requires a bf16 weight and residual with column stride 1
// and at most 2^29 columns and elements from row to row, r <= kMostRank, and a scaling of 0 or of a magnitude in
// [2^-16, 2^7); otherwise returns cudaErrorInvalidValue, as for other dtypes. Returns cudaErrorNotSupported if the
// module was built without it.
//
// Enqueues on `stream`, never synchronises, copies nothing from host memory, launches nothing if there is nothing
// to do.
constexpr int kMostRank = 128, kCounterBytes = 8;
cudaError_t merge(MergeLayer* layers, int count, DType weight_dtype, DType factor_dtype,
                  DType restart_dtype, Rounding rounding, MergeKind kind, MergeLayer* table,
                  cudaStream_t stream);

// ---- prune.cu -----------------------------------------------------------------------------------

// A contiguous tensor, as a row of int64. Any alignment; 16 bytes for the fast path.
struct PruneTensor {
  void* data;
  void* partner;         // as many elements, zeroed wherever data is; null: none
  int64_t size;          // elements
  int64_t dtype;         // DType
  int64_t partner_dtype; // DType
  int64_t seed;          // prune_random
  int64_t first;         // prune_random: logical number of the first element
};
static_assert(sizeof(PruneTensor) == 7 * sizeof(int64_t), "built as an array of int64");

// Bytes that prune() needs at `workspace` on the current device, 16-byte aligned, uninitialised.
cudaError_t prune_workspace(const PruneTensor* tensors, int64_t count, int64_t* bytes);

// In each tensor, zeroes the elements whose magnitude is at most the `ratio`-quantile of its magnitudes. Ranks are
// computed in float32 in tensors of up to `float_ranks` elements, in float64 in larger ones. cudaErrorInvalidValue if
// `bytes`, the size of `workspace`, is less than prune() needs.
cudaError_t prune(const PruneTensor* tensors, int64_t count, double ratio, int64_t float_ranks, void* workspace,
                  int64_t bytes, cudaStream_t stream);

// Zero the elements whose 32 random bits are below `threshold`, in [0, 2^32].
cudaError_t prune_random(const PruneTensor* tensors, int64_t count, uint64_t threshold,
                         cudaStream_t stream);

// A digit is a key's `bits` bits (at most kCountBits) from bit `shift` on. counts[i][digit] += 1 for each key of
// tensor i whose bits above the digit equal prefixes[i] (device memory); lowest[i] = min(lowest[i], least key
// whose bits above the digit exceed the prefix); highest[i] = max(highest[i], greatest key).
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
// Every matrix has column stride 1. Elements are bf16 or fp16.
struct Bias {
  const void* data;  // (n), or null
  DType dtype;       // float32, or the operands'
};

struct Dropout {
  const int64_t* seed;  // in device memory; read if threshold > 0
  uint32_t threshold;   // out of 65536: elements whose 16 random bits are below it are dropped
  float keep_scale;     // factor of the others
};

struct TwoSegmentArgs {
  Form form;
  Matrix out;  // tn: an even pitch, the slabs one after the other
  Matrix p, b;  // r = 0: unused, except for `sums`
  Matrix x, w;
  int64_t m, n, k, r;
  DType dtype;
  float scale;
  Bias bias;
  Dropout dropout;  // mask (m, n), applied to p @ b
  int slab_steps;   // for tn and for `sums`
  int block_n, cluster;  // sm_90's variant: 256 with 1 or 2, or 128 with 1; elsewhere 128 with 1
  // Null: not wanted. For nn with r = 0, p (m, n) and no dropout: also computes sums (slabs, k, n) = x^T @ p,
  // as tn does, in the same launch. sm_90 only, 128 with 1 or 2; slab_steps a multiple of 2 * cluster.
  Matrix sums;
};

// Enqueues on `stream`, never synchronises. m, n and k are at least 1. cudaErrorInvalidValue if an
// operand's start or pitch is not a multiple of 16 bytes, or if there is no such variant.
cudaError_t two_segment_sm90(const TwoSegmentArgs& args, cudaStream_t stream);  // sm_90a only
cudaError_t two_segment_sm80(const TwoSegmentArgs& args, cudaStream_t stream);  // sm_80 and newer

struct MaskArgs {
  Matrix out;  // (m, k), 16-byte pitch
  Matrix x;    // (m, k), 16-bit elements, col 1
  int64_t m, k;
  Dropout dropout;
};
// out = x with dropped elements zeroed; keep_scale is not applied.
cudaError_t mask_rows(const MaskArgs& args, cudaStream_t stream);

struct SumArgs {
  Matrix out;  // (m, n), dtype, col 1
  Matrix in;   // (slabs, m, n) float32, col 1, the slabs one after the other
  int64_t slabs, m, n;
  float scale;
  DType dtype;
};
// out = scale * sum of the slabs, added in their order.
cudaError_t sum_slabs(const SumArgs& args, cudaStream_t stream);

}  // namespace relora
