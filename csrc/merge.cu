// W (n, k) += scaling * lora_B (n, r) @ lora_A (r, k), in place, for a list of layers.
//
//   acc = sum_i B[row, i] * A[i, col]           fp32, on tensor cores
//   d   = fl32(scaling * acc)
//   v   = fl32(W + d)                           compensated: fl32(fl32(W + residual) + d)
//   W   = round(v)                              to nearest, or stochastically
//   compensated: residual = round(v - W)
//
// d and v are rounded separately, never contracted to an fma. The reference and the Triton kernel do
// the same, so the stored bits agree wherever the fp32 sums do. r is never split.
//
// There are two kinds of kernels, each with a product and a sum of its own:
//
//   streamed   any W and r, fp32 factors, on any GPU            merge_streamed.cu, merge_sum.cuh
//   sm90       a bf16 W and r <= 128, on Hopper                 merge_sm90.cu
//
// Times on an H200, bf16 W, fp32 factors, r = 128, to nearest (2026-11-28, bench/gpu_check.py --only merge
// prune at 61fe2de, CUDA events, medians; bench/results/nvidia-h200-merge-prune.json):
//
//                                        sm90      streamed   copying the weights one by one
//   168 weights of the 1.3B model        1.67 ms   5.02 ms    1.69 ms
//   4096 x 4096                          32 us     65 us      26 us
//   5461 x 2048                          27 us                22 us
//   2048 x 5461, an odd pitch            35 us                22 us
//
// Not measured yet: the present unit sizes of sm90, which are newer. In sm90 W is in flight at all times, only
// lora_A, once a unit, is waited for by the threads that multiply and sum, and accesses are of 16 bytes at any pitch.
// Its predecessor took 3.09 ms and 43 us (2026-11-27): by ncu 42 % of the warps' time went by in waiting in the sum,
// 20 % in the product and 16 % for lora_A, one after the other; an odd pitch was slowest.
//
// What bounds the sm90 kernel: passes over as much memory as the 168 weights and in the same pattern, without a
// product (H200, 2026-11-27, CUDA events, medians of 20, by programs that are not kept here). One call copies
// the weights in 1.14 ms.
// - Storing half lines takes 1.86 ms, whole lines 1.28, 256 bytes of a row per instruction 1.22.
// - Reading lora_A for every 256 rows of W adds 0.16 to 0.33 ms; reading half as many bytes of lora_B, for
//   every 512 columns, adds 0.10.
// - An asynchronous copy into rows of shared memory that are not aligned to lines is 2.6 times the work.
// - With two chunks of W in flight per warp, one of them being worked on, a fifth of the time was waiting.
//
// Estimates for the streamed kernel, per 128 x 128 tile of a bf16 W, r = 128, fp32 factors, to nearest, from
// data sheets, published microbenchmarks and the machine code. At 88 % of the copy rate a tile takes 19 ns, or
// some 4700 cycles of one multiprocessor. In that time these would be busy: HBM 88 %; L2 80 % (64 KB of lora_A,
// 8 of lora_B, 32 of W, at some 6.8 TB/s); tensor cores 70 % (tf32 by mma.sync at some 62 % of peak); shared
// memory 53 % (320 KB); issue 105 % (some 4900 instructions a warp). Measured, a tile takes some 68 ns (5.02 ms
// for the 168 weights).
// - A warp takes 64 x 64 of a tile: a lane does 16 reads of 16 bytes for 64 products. 64 x 32 would read half
//   as much again.
// - Operands lie in shared memory in the order in which a product takes them, four and two registers in a row.
//   Assembled from two reads, they had to be moved once more for each product: two thirds of the loop.
// - Two blocks share a multiprocessor that has the 195 KB for them (sm_90, sm_100): one block's loads and sums
//   overlap the other's products.
// - W's tile is fetched into L2, and its first strips into registers, before its product.
// - Accumulators stay in registers if W takes 16-byte accesses: tensor-core columns are permuted so that each
//   lane holds eight neighbours of a row, which it loads, rounds by one random draw and stores by itself.
#include <algorithm>

#include "merge.cuh"

namespace relora {
namespace {

// ---- The table ----------------------------------------------------------------------------------

// Layers that one launch writes to device memory: no more than its parameters hold. Those may be 32,764
// bytes from CUDA 12.1 and driver 530 on; CUDA 13 requires a newer driver than that.
#if CUDART_VERSION >= 13000
constexpr int kPiece = 128;
static_assert(kPiece * sizeof(MergeLayer) + 8 <= 32764, "kernel parameters");
#else
constexpr int kPiece = kInlineLayers;
#endif
struct TablePiece {
  int64_t count;
  MergeLayer layers[kPiece];
};

__global__ void write_table_kernel(const __grid_constant__ TablePiece piece, MergeLayer* to) {
  constexpr int kWords = sizeof(MergeLayer) / 8;
  for (int i = int(threadIdx.x); i < piece.count * kWords; i += int(blockDim.x))
    reinterpret_cast<uint64_t*>(to)[i] = reinterpret_cast<const uint64_t*>(piece.layers)[i];
}

// ---- The restart --------------------------------------------------------------------------------

// A second launch rather than more blocks of the first: a layer's factors may be overwritten only when its
// last tile is done, and stream order guarantees that without counters, fences or waiting blocks.
constexpr int kRestartThreads = 256, kQuads = 8;  // kQuads: groups of four neighbours in a row, per thread

template <typename F>
__device__ __forceinline__ void store_quad(const Matrix& m, int64_t row, int64_t col, int64_t cols,
                                           const F (&quad)[4]) {
  F* const at = global_memory<F>(m.data) + row * m.row + col * m.col;
  constexpr int kBytes = 4 * int(sizeof(F));
  if (col + 4 <= cols && m.col == 1 && reinterpret_cast<uintptr_t>(at) % kBytes == 0) {
    if constexpr (kBytes == 16)
      *reinterpret_cast<float4*>(at) = make_float4(quad[0], quad[1], quad[2], quad[3]);
    else
      *reinterpret_cast<uint2*>(at) =
          make_uint2(quad[0].bits | uint32_t(quad[1].bits) << 16,
                     quad[2].bits | uint32_t(quad[3].bits) << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (col + i < cols) at[i * m.col] = quad[i];
  }
}

template <typename F>
__global__ void __launch_bounds__(kRestartThreads)
    restart_kernel(const __grid_constant__ MergeTable table) {
  __shared__ MergeLayer layer;
  __shared__ int found;
  find_layer<&MergeLayer::first_restart_block>(table, layer, found);
  const int64_t a_quads = (layer.k + 3) / 4, b_quads = (layer.r + 3) / 4;
  const int64_t of_A = layer.restart_rows * a_quads, of_B = layer.n * b_quads;
  const int64_t first = int64_t(blockIdx.x - layer.first_restart_block) * kRestartThreads * kQuads;
#pragma unroll 1
  for (int i = 0; i < kQuads; ++i) {
    const int64_t id = first + i * kRestartThreads + threadIdx.x;
    F quad[4] = {};
    if (id < of_A) {
      const int64_t row = id / a_quads, block = id % a_quads;
      const Words words = draw(layer.restart_seed, kStreamInit, layer.first_restart + row, block);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        quad[j] = round_nearest<F>(uniform(bits32(words, j), layer.restart_step));
      store_quad(layer.restart_A, row, block * 4, layer.k, quad);
    } else if (id < of_A + of_B) {
      store_quad(layer.restart_B, (id - of_A) / b_quads, (id - of_A) % b_quads * 4, layer.r, quad);
    }
  }
}

constexpr void (*kRestartKernels[3])(MergeTable) = {restart_kernel<float>, restart_kernel<bf16>,
                                       restart_kernel<fp16>};

// ---- The launches -------------------------------------------------------------------------------

template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), int64_t blocks, int threads, size_t shared,
                   cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

int64_t tiles_of(const MergeLayer& layer) {
  if (layer.r == 0) return 0;
  return ceil_div(layer.n, kRows) * ceil_div(layer.k, kCols);
}

// Tiles of a row that a block processes, with one read of its part of lora_B for all of them if r <= 128: few enough
// that every multiprocessor gets its blocks and that all end at about the same time.
int tiles_of_a_block(int64_t tiles, int multiprocessors) {
  return int(std::clamp<int64_t>(ceil_div(tiles, kBlocksAnSM * multiprocessors), 1, 8));
}

}  // namespace

cudaError_t merge(MergeLayer* layers, int count, DType weight_dtype, DType factor_dtype,
                  DType restart_dtype, Rounding rounding, MergeKind kind, MergeLayer* device_table,
                  cudaStream_t stream) {
  const bool narrow_factors = factor_dtype != DType::f32;
  const bool bf16_weights = weight_dtype == DType::bf16;
  if (narrow_factors && (factor_dtype != DType::bf16 || kind != MergeKind::sm90))
    return cudaErrorInvalidValue;
  if (kind != MergeKind::streamed && !bf16_weights) return cudaErrorInvalidValue;
  if (kind == MergeKind::sm90 && !sm90_merge) return cudaErrorNotSupported;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  MergeTable table{nullptr, count, 0, 0, nullptr, false, rounding, {}};
  MergeKernel merge;
  int64_t blocks = 0, restart_blocks = 0;
  if (kind == MergeKind::sm90) {
    error = sm90_merge(layers, count, narrow_factors, rounding, multiprocessors, table, merge);
    if (error != cudaSuccess) return error;
    blocks = std::min(table.units, multiprocessors);
  } else {
    merge = streamed_merge(weight_dtype);
    int64_t tiles = 0;
    for (int i = 0; i < count; ++i) tiles += tiles_of(layers[i]);
    table.tiles_per_block = tiles_of_a_block(tiles, multiprocessors);
    for (int i = 0; i < count; ++i) {
      MergeLayer& layer = layers[i];
      layer.first_block = uint32_t(blocks);
      if (tiles_of(layer))
        blocks += ceil_div(layer.n, kRows) *
                  ceil_div(ceil_div(layer.k, kCols), table.tiles_per_block);
      if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    }
  }
  for (int i = 0; i < count; ++i) {
    MergeLayer& layer = layers[i];
    layer.first_restart_block = uint32_t(restart_blocks);
    if (layer.restarts)
      restart_blocks += ceil_div(layer.restart_rows * ceil_div(layer.k, 4) + layer.n * ceil_div(layer.r, 4),
                                 kRestartThreads * kQuads);
    if (restart_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  }
  if (blocks == 0 && restart_blocks == 0) return cudaSuccess;

  // A kernel's code is loaded at its first use, which may fail. Both kernels are loaded before the first
  // launch: otherwise W could be merged without a restart of its factors, and the next call would merge
  // these again. (If write_table_kernel fails, nothing has been merged yet.)
  const auto restart = kRestartKernels[int(restart_dtype)];
  cudaFuncAttributes loaded;
  if (blocks)
    error = cudaFuncSetAttribute(merge.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 merge.shared);
  if (restart_blocks && error == cudaSuccess) error = cudaFuncGetAttributes(&loaded, restart);
  if (error != cudaSuccess) return error;

  if (count <= kInlineLayers) {
    std::copy(layers, layers + count, table.first);
  } else {
    for (int first = 0; first < count && error == cudaSuccess; first += kPiece) {
      TablePiece piece{std::min(count - first, kPiece), {}};
      std::copy(layers + first, layers + first + piece.count, piece.layers);
      error = launch(write_table_kernel, 1, 1024, 0, stream, piece, device_table + first);
    }
    table.layers = device_table;
  }
  if (kind == MergeKind::sm90 && table.units > blocks && error == cudaSuccess) {
    table.taken = reinterpret_cast<uint32_t*>(device_table + count);
    error = cudaMemsetAsync(table.taken, 0, sizeof *table.taken, stream);
  }
  if (blocks && error == cudaSuccess)
    error = launch(merge.kernel, blocks, merge.threads, size_t(merge.shared), stream, table);
  if (restart_blocks && error == cudaSuccess)
    error = launch(restart, restart_blocks, kRestartThreads, 0, stream, table);
  return error;
}

}  // namespace relora
