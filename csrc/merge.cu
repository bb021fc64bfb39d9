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
// The product: 16-bit factors multiply exactly. Of fp32 factors 11 bits are kept where W has 16. As
// tf32; or, resident, as fp16 scaled by a power of two for each row of lora_B and column of lora_A:
// then 11 bits of what is 2^-28 of the row's or column's largest or more, and below an error of up to
// 2^-39 of the largest (numerics.cuh). For an fp32 W each is the sum of two tf32, and three of the
// four products are taken, which keeps 2^-22: three times the tensor work, and still 1.7 times as
// fast as the fp32 pipes (12.9 GFLOP at some 300 TFLOP/s against 4.3 at 60, for 4096 x 4096 at
// r = 128).
//
// Streamed (any r, any factors): lora_A's stages of 64 bytes along r pass through a ring, lora_B's
// stay if r <= 128 (16-bit: 256).
// Resident (fp32 factors of a bf16 W, r <= 128, to nearest or compensated): a block holds all of r
// as fp16, of up to 256 rows of lora_B for good, and of lora_A for 128 columns at a time, which it
// multiplies by all of them. It loads a tile's lora_A into the registers that the accumulators take
// later: 64 KB are under way at once, and each column's largest element is known before the first
// is rounded.
//
// What bounds them on an H200, for each 128 x 128 tile of a whole model's bf16 W with fp32 factors,
// r = 128; by data sheets, published microbenchmarks and the machine code, not measured here. 88 %
// of the copy rate are 19 ns, or some 4700 cycles of one of the multiprocessors:
//                                               streamed           resident
//   HBM      W in and out, 64 KB; factors       88 %               88 %
//   L2       to shared memory, and W, at        64 + 8 + 32 KB,    32 + 8 + 32 KB,
//            some 6.8 TB/s                      80 %               56 %
//   tensor   by mma.sync, some 62 % of peak     tf32, 70 %         fp16, 35 %
//   shared   in and out                         320 KB, 53 %       180 KB, 30 %
//   issue    instructions of a warp, to         some 8000, 170 %   some 2400, 50 %
//            nearest (16-bit factors: 4500)
// Both:
// - a warp takes 64 x 64 of a tile: 16 reads of 16 bytes a lane for 64 products. 64 x 32 would read
//   half as much again;
// - two blocks share a multiprocessor that has 202 KB (sm_90, sm_100): one's loads and sums go
//   under the other's products;
// - W's tile is fetched into L2 before its product, and streamed its first strips into registers;
// - accumulators never leave registers: tensor-core columns are permuted so that each lane holds
//   eight neighbours of a row, which it loads, rounds by one random draw and stores by itself.
#include <algorithm>
#include <type_traits>

#include "merge_sum.cuh"

namespace relora {
namespace {

struct MergeTable {
  const MergeLayer* layers;  // in device memory, or null: `first` holds them all
  int count;
  int tiles_per_block;  // in one row
  Rounding rounding;
  MergeLayer first[kInlineLayers];
};
static_assert(sizeof(MergeTable) <= 4096, "kernel parameters");

__global__ void write_table_kernel(const __grid_constant__ MergeTable chunk, MergeLayer* to) {
  constexpr int kWords = sizeof(MergeLayer) / 8;
  for (int i = int(threadIdx.x); i < chunk.count * kWords; i += int(blockDim.x))
    reinterpret_cast<uint64_t*>(to)[i] = reinterpret_cast<const uint64_t*>(chunk.first)[i];
}

// The layer that this block works for, to shared memory: the last that begins at or before it.
template <uint32_t MergeLayer::*kFirst>
__device__ __forceinline__ void find_layer(const MergeTable& table, MergeLayer& layer, int& found) {
  const MergeLayer* layers = table.layers ? table.layers : table.first;
  for (int i = int(threadIdx.x); i < table.count; i += int(blockDim.x))
    if (layers[i].*kFirst <= blockIdx.x &&
        (i + 1 == table.count || blockIdx.x < layers[i + 1].*kFirst))
      found = i;
  __syncthreads();
  for (int i = int(threadIdx.x); i < int(sizeof(MergeLayer) / 8); i += int(blockDim.x))
    reinterpret_cast<uint64_t*>(&layer)[i] = reinterpret_cast<const uint64_t*>(layers + found)[i];
  __syncthreads();
}

extern __shared__ uint4 dynamic_shared[];

// ---- The kernels --------------------------------------------------------------------------------

template <typename T, typename F>
__device__ __forceinline__ Work work_of(const MergeTable& table, const MergeLayer& layer) {
  const int col_tiles = int((layer.k + kCols - 1) / kCols), rows = int(layer.row_tiles) * kRows;
  const int blocks_a_row = (col_tiles + table.tiles_per_block - 1) / table.tiles_per_block;
  const int block = int(blockIdx.x - layer.first_block);
  const int first_tile = block % blocks_a_row * table.tiles_per_block;
  Work work;
  work.row0 = int64_t(block / blocks_a_row) * rows;
  work.col0 = int64_t(first_tile) * kCols;
  work.rows = int(min(layer.n - work.row0, int64_t(rows)));
  work.tiles = min(col_tiles - first_tile, table.tiles_per_block);
  work.chunks = int((layer.r + kDepth<F> - 1) / kDepth<F>);
  work.stays = work.chunks <= kPanel;
  work.wide_A = is_wide<F>(layer.lora_A);
  work.wide_B = is_wide<F>(layer.lora_B);
  work.wide = is_wide_sum<T>(layer, table.rounding);
  return work;
}

template <typename T, typename F>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
    merge_kernel(const __grid_constant__ MergeTable table) {
  Stages& stages = *reinterpret_cast<Stages*>(dynamic_shared);
  __shared__ MergeLayer layer;
  __shared__ Work work;
  __shared__ int found;
  find_layer<&MergeLayer::first_block>(table, layer, found);
  if (threadIdx.x == 0) work = work_of<T, F>(table, layer);
  __syncthreads();

  const int warp = int(threadIdx.x) / 32, warp_row = warp / 2 * kWarp, warp_col = warp % 2 * kWarp;
  int next_tile = 0, next_chunk = 0, next_slot = 0;  // filled kRing - 1 stages before it is used
  int tile = 0, chunk = 1 - kRing, slot = 0;         // chunk < 0: nothing to multiply yet
  Strip<T> window[kWindow<T>];
  float acc[4][8][4] = {};
  while (tile < work.tiles) {
    if (chunk == (tile ? 0 : 1 - kRing)) {  // so that HBM's latency passes under the product
      prefetch_tile<T>(layer.weight, layer, work, tile);
      if (table.rounding == Rounding::compensated)
        prefetch_tile<T>(layer.residual, layer, work, tile);
      if (work.wide) {
        const Share share(layer, work, tile, warp_row, warp_col);
        const Strips<T> at(layer.weight, work, tile, share.first);
#pragma unroll
        for (int s = 0; s < kEarly<T>; ++s) at.load(window, 0, s, share);
      }
    }
    if (chunk >= 0) {
      wait_for_copies<kRing - 2>();
      __syncthreads();  // all copies of this stage have arrived; next_slot has been multiplied
    }
    if (next_tile < work.tiles) {
      fill<F, true>(stages.A[next_slot], layer, work.wide_A, next_chunk,
                    work.col0 + next_tile * kCols);
      if (!work.stays || next_tile == 0)
        fill<F, false>(stages.B[work.stays ? next_chunk : next_slot], layer, work.wide_B,
                       next_chunk, work.row0);
      next_slot = (next_slot + 1) % kRing;
      if (++next_chunk == work.chunks) next_chunk = 0, ++next_tile;
    }
    commit_copies();  // a group without copies, too: wait_for_copies counts groups
    if (chunk < 0) {
      ++chunk;
      continue;
    }
    multiply<F, std::is_same<T, float>::value && std::is_same<F, float>::value>(
        acc, stages.A[slot], stages.B[work.stays ? chunk : slot], warp_row, warp_col);
    slot = (slot + 1) % kRing;
    if (++chunk < work.chunks) continue;

    if (!work.wide) __syncthreads();  // the slot multiplied last is free then, until the next stage
    with_rounding(table.rounding, [&](auto rounding) {
      if (work.wide)
        merge_wide<decltype(rounding)::value, kEarly<T>>(acc, AsItIs{}, window, layer, work, tile,
                                                         warp_row, warp_col);
      else
        merge_narrow<decltype(rounding)::value, T>(
            acc, AsItIs{}, layer, work, tile, warp_row, warp_col,
            reinterpret_cast<float*>(stages.A[(slot + kRing - 1) % kRing].bytes) + warp * 8 * kWarp);
    });
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][j][i] = 0.f;
    chunk = 0;
    ++tile;
  }
}

template <Rounding kRounding>
__global__ void __launch_bounds__(kThreads, kBlocksAnSM)
    merge_resident_kernel(const __grid_constant__ MergeTable table) {
  using T = bf16;
  Resident& held = *reinterpret_cast<Resident*>(dynamic_shared);
  __shared__ MergeLayer layer;
  __shared__ Work work;
  __shared__ int found;
  find_layer<&MergeLayer::first_block>(table, layer, found);
  if (threadIdx.x == 0) {
    work = work_of<T, float>(table, layer);
    work.wide_A &= layer.k % 4 == 0;  // no chunk reaches beyond a row
  }
  __syncthreads();

  const int warp = int(threadIdx.x) / 32, warp_row = warp / 2 * kWarp, warp_col = warp % 2 * kWarp;
#pragma unroll 1
  for (int tile = 0; tile < work.tiles; ++tile) {
    prefetch_tile<T>(layer.weight, layer, work, tile);
    if (kRounding == Rounding::compensated)
      prefetch_tile<T>(layer.residual, layer, work, tile);
    if (tile == 0)
#pragma unroll 1
      for (int below = 0; below * kRows < work.rows; ++below)
        fill_panel<false>(held.B[below], held.B_units + below * kRows, layer, true,
                          work.row0 + below * kRows);
    else
      __syncthreads();  // the panel has been multiplied, its units have been used
    fill_panel<true>(held.A, held.A_units, layer, work.wide_A, work.col0 + tile * kCols);
    __syncthreads();
#pragma unroll 1
    for (int row = warp_row, below = 0; below * kRows < work.rows; row += kRows, ++below) {
      float acc[4][8][4] = {};
      multiply_panels(acc, held.A, held.B[below], int(layer.r), warp_row, warp_col);
      const InUnits units{held.B_units, held.A_units};
      if (work.wide) {
        Strip<T> window[kResidentWindow<kRounding>];
        merge_wide<kRounding, 0>(acc, units, window, layer, work, tile, row, warp_col);
      } else {  // the second panel is free: see merge()
        merge_narrow<kRounding, T>(acc, units, layer, work, tile, row, warp_col,
                                   reinterpret_cast<float*>(held.B[1].bytes) + warp * 8 * kWarp);
      }
    }
  }
}

using Kernel = void (*)(MergeTable);

// [DType of W][whether the factors are 16-bit, which are W's dtype then]. Roundings are told apart at
// run time, once a tile: five kernels to compile for each architecture, not 15. The resident ones
// have no registers to spare for what roundings keep in common.
constexpr Kernel kKernels[3][2] = {
    {merge_kernel<float, float>, nullptr},
    {merge_kernel<bf16, float>, merge_kernel<bf16, bf16>},
    {merge_kernel<fp16, float>, merge_kernel<fp16, fp16>},
};

// What the resident kernels serve: the usual. The others would take half as long to compile again.
constexpr Kernel kResidentNearest = merge_resident_kernel<Rounding::nearest>;
constexpr Kernel kResidentCompensated = merge_resident_kernel<Rounding::compensated>;
bool can_be_resident(const MergeLayer& layer) {
  return layer.r <= kMostRank && layer.r % 4 == 0 && is_wide<float>(layer.lora_B);
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

constexpr Kernel kRestartKernels[3] = {restart_kernel<float>, restart_kernel<bf16>,
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
  if (narrow_factors && factor_dtype != weight_dtype) return cudaErrorInvalidValue;
  if (resident && (narrow_factors || weight_dtype != DType::bf16 ||
                   rounding == Rounding::stochastic))
    return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  int64_t tiles = 0, blocks = 0, restart_blocks = 0;
  for (int i = 0; i < count; ++i) {
    tiles += tiles_of(layers[i]);
    if (resident && !can_be_resident(layers[i])) return cudaErrorInvalidValue;
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
  const Kernel kernel = !resident ? kKernels[int(weight_dtype)][narrow_factors]
                        : rounding == Rounding::nearest ? kResidentNearest
                                                        : kResidentCompensated;
  const size_t shared = resident ? sizeof(Resident) : sizeof(Stages);
  const Kernel restart = kRestartKernels[int(restart_dtype)];
  cudaFuncAttributes loaded;
  if (blocks)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (restart_blocks && error == cudaSuccess) error = cudaFuncGetAttributes(&loaded, restart);
  if (error != cudaSuccess) return error;

  if (count <= kInlineLayers) {
    std::copy(layers, layers + count, table.first);
  } else {
    for (int first = 0; first < count && error == cudaSuccess; first += kInlineLayers) {
      MergeTable chunk{};
      chunk.count = std::min(count - first, kInlineLayers);
      std::copy(layers + first, layers + first + chunk.count, chunk.first);
      error = launch(write_table_kernel, 1, 256, 0, stream, chunk, device_table + first);
    }
    table.layers = device_table;
  }
  if (blocks && error == cudaSuccess)
    error = launch(kernel, blocks, kThreads, shared, stream, table);
  if (restart_blocks && error == cudaSuccess)
    error = launch(restart, restart_blocks, kRestartThreads, 0, stream, table);
  return error;
}

}  // namespace relora
