// W (n, k) += scaling * lora_B (n, r) @ lora_A (r, k), in place, for a list of layers.
//
//   acc = sum_i B[row, i] * A[i, col]           fp32, on tensor cores
//   d   = fl32(scaling * acc)
//   v   = fl32(W + d)                           compensated: fl32(fl32(W + residual) + d)
//   W   = round(v)                              to nearest, or stochastically
//   compensated: residual = round(v - W)
//
// d and v are rounded one by one, never contracted to an fma: the reference and the Triton kernel
// do the same, so the stored bits agree wherever the fp32 sums do. r is never split.
//
// Two kinds of kernels, each with a product of its own; the sum is merge_sum.cuh's:
//
// Streamed (merge_streamed.cu): any W, r and factors.
// Resident (merge_resident.cu): a bf16 W and r <= 128.
//
// Measured on an H200 (bench/gpu_check.py, 2026-11-27, bench/results): the whole model, 168 layers, in
// 3.09 ms resident and 5.10 streamed, where copying its weights takes 1.69; 4096 x 4096 in 43 and 66 us,
// of 26 for the copy. That is 0.6 of the copy's rate, not the 0.88 aimed at. By ncu on 4096 x 4096: a
// quarter of the issue slots and 37 % of HBM are used, the rest is waiting, in the sum (42 % of the
// warps' time: W's strips, units), the product (20 %) and lora_A's panel (16 %), one after the other
// in each of two blocks. An odd pitch costs most: 2048 x 5461 runs at 0.4 of the rate of 5461 x 2048.
// Without the sum it still takes 0.59 of the time: more warps alone (256 threads of 64 x 32) bring 5 %.
//
// The estimates that it was built by, for each 128 x 128 tile of a whole model's bf16 W, r = 128, by
// data sheets, published microbenchmarks and the machine code. 88 % of the copy rate are 19 ns, or some
// 4700 cycles of one of the multiprocessors:
//                                               streamed           resident
//   HBM      W in and out, 64 KB; factors       88 %               88 %
//   L2       fp32 factors to shared memory,     64 + 8 + 32 KB,    32 + 8 + 32 KB,
//            and W, at some 6.8 TB/s            80 %               56 %
//   tensor   by mma.sync, some 62 % of peak     tf32, 70 %         16 bits, 35 %
//   shared   in and out                         320 KB, 53 %       180 KB, 30 %
//   issue    instructions of a warp:
//            fp32 factors, to nearest           some 4900, 105 %   some 2200, 45 %
//                          compensated          5500               2800
//                          stochastic           7000               4300, 90 %
//            bf16 factors, to nearest           3000, 65 %         1400, 30 %
// Both:
// - a warp takes 64 x 64 of a tile: 16 reads of 16 bytes a lane for 64 products. 64 x 32 would read
//   half as much again;
// - operands lie in shared memory as a product takes them, four and two registers in a row: put
//   together from two reads they were moved once more for each product, two thirds of the loop;
// - two blocks share a multiprocessor that has 202 KB (sm_90, sm_100): one's loads and sums go
//   under the other's products;
// - streamed, W's tile is fetched into L2 and its first strips into registers before its product.
//   Resident, fetching W into L2 costs more than it brings: 0.83 ms with it, 0.81 without, for 24
//   layers of 4096 x 4096;
// - accumulators never leave registers: tensor-core columns are permuted so that each lane holds
//   eight neighbours of a row, which it loads, rounds by one random draw and stores by itself.
#include <algorithm>

#include "merge.cuh"

namespace relora {
namespace {

// ---- The table ----------------------------------------------------------------------------------

// Layers written to device memory by one launch: as many as its arguments hold. These are 32,764 bytes
// from CUDA 12.1 and driver 530 on, and CUDA 13 asks for a newer driver.
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

// A second launch, not blocks of the first: a layer's factors may go when its last tile is done,
// and the order of a stream says that without counters, fences or blocks that wait.
constexpr int kRestartThreads = 256, kQuads = 8;  // a thread's groups of four neighbours in a row

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

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  return divide_up(layer.n, kRows) * divide_up(layer.k, kCols);
}

// Tiles that a block goes through: below each other, and in a row. As many as leave every
// multiprocessor its blocks, and few enough to end at about the same time. A block's own part of
// lora_B is read once for all in a row, resident lora_A once for two below each other.
Place tiles_of_a_block(int64_t tiles, int multiprocessors, bool resident) {
  const int64_t most = resident ? kMostRowTiles * 8 : 8, slots = kBlocksAnSM * multiprocessors;
  const int64_t count = std::clamp<int64_t>(divide_up(tiles, slots), 1, most);
  const int64_t rows = resident && count != 1 && count != 3 ? kMostRowTiles : 1;
  return {int(rows), int(divide_up(count, rows))};
}

}  // namespace

cudaError_t merge(MergeLayer* layers, int count, DType weight_dtype, DType factor_dtype,
                  DType restart_dtype, Rounding rounding, bool resident, MergeLayer* device_table,
                  cudaStream_t stream) {
  const bool narrow_factors = factor_dtype != DType::f32;
  const bool bf16_weights = weight_dtype == DType::bf16;
  if (narrow_factors && (factor_dtype != DType::bf16 || !bf16_weights)) return cudaErrorInvalidValue;
  if (resident && !bf16_weights) return cudaErrorInvalidValue;
  const MergeKernel merge =
      resident ? resident_merge(narrow_factors) : streamed_merge(weight_dtype, narrow_factors);
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  int64_t tiles = 0, blocks = 0, restart_blocks = 0;
  for (int i = 0; i < count; ++i) {
    tiles += tiles_of(layers[i]);
    if (resident && !can_be_resident(layers[i], narrow_factors)) return cudaErrorInvalidValue;
  }
  const Place of_a_block = tiles_of_a_block(tiles, multiprocessors, resident);
  MergeTable table{nullptr, count, of_a_block.col, rounding, {}};
  for (int i = 0; i < count; ++i) {
    MergeLayer& layer = layers[i];
    layer.first_block = uint32_t(blocks);
    layer.first_restart_block = uint32_t(restart_blocks);
    // Without 16-byte accesses the sum needs room, which is the second panel's.
    layer.row_tiles = is_wide_sum<uint16_t>(layer, rounding) ? uint32_t(of_a_block.row) : 1u;
    if (tiles_of(layer))
      blocks += divide_up(layer.n, layer.row_tiles * kRows) *
                divide_up(divide_up(layer.k, kCols), table.tiles_per_block);
    if (layer.restarts)
      restart_blocks += divide_up(layer.restart_rows * divide_up(layer.k, 4) +
                                      layer.n * divide_up(layer.r, 4),
                                  kRestartThreads * kQuads);
    if (blocks > INT32_MAX || restart_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  }
  if (blocks == 0 && restart_blocks == 0) return cudaSuccess;

  // A kernel's code is loaded at its first use, which may fail. All of it is loaded before the first
  // launch: else W could be merged and its factors left, and the next call would merge them again.
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
  if (blocks && error == cudaSuccess)
    error = launch(merge.kernel, blocks, kThreads, size_t(merge.shared), stream, table);
  if (restart_blocks && error == cudaSuccess)
    error = launch(restart, restart_blocks, kRestartThreads, 0, stream, table);
  return error;
}

}  // namespace relora
