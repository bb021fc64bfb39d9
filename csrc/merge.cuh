// Shared by the merge kernels: the table of layers, and the update of pairs of elements.
#pragma once

#include <type_traits>

#include "launch.h"
#include "mma.cuh"

namespace relora {

// The parameter of every merge kernel.
struct MergeTable {
  const MergeLayer* layers;  // in device memory; null if `first` holds them all
  int count;
  int tiles_per_block;    // streamed: in one row of tiles
  int units;              // sm90: of all layers
  uint32_t* taken;        // sm90: units that blocks have taken after their first ones
  bool narrow_factors;    // sm90: bf16 instead of fp32
  Rounding rounding;
  MergeLayer first[kInlineLayers];
};
static_assert(sizeof(MergeTable) <= 4096, "kernel parameters");

// A kernel and the dynamic shared memory of its blocks.
struct MergeKernel {
  void (*kernel)(MergeTable);
  int shared, threads;
};
MergeKernel streamed_merge(DType weight);  // fp32 factors
// bf16 weights; fp32 factors, or bf16 if narrow_factors. Sets `kernel`, `table`'s number of units and, of each
// layer, the first unit and the steps per unit. The launch has a block per unit, at most one per multiprocessor.
// Null (weak) if the module was built without code for sm_90.
cudaError_t sm90_merge(MergeLayer* layers, int count, bool narrow_factors, Rounding rounding,
                       int multiprocessors, MergeTable& table, MergeKernel& kernel)
    __attribute__((weak));

namespace {

constexpr int kRows = 128, kCols = 128;  // a tile of W
constexpr int kWarp = 64;                // rows and columns of a warp's part of it
constexpr int kThreads = 128, kBlocksAnSM = 2;
constexpr int kStrip = 8;  // neighbouring elements of a row: 16 bytes of a 16-bit W, one random draw
struct Place { int row, col; };

extern __shared__ uint4 dynamic_shared[];

__device__ __forceinline__ uint32_t& word(uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Adds updates (the product times the scaling) to pairs of neighbours of W. Compensated: `rest` is the residual's.
template <Rounding kRounding, typename T, int kMany>
__device__ __forceinline__ void merge_pairs(Neighbours<T> (&w)[kMany], Neighbours<T> (&rest)[kMany],
                                            const Neighbours<float> (&update)[kMany],
                                            const uint32_t (&rand)[kMany]) {
  constexpr bool kCompensated = kRounding == Rounding::compensated;
  Neighbours<float> v[kMany];
#pragma unroll
  for (int i = 0; i < kMany; ++i) {
    v[i] = widen(w[i]);
    if (kCompensated) {
      const Neighbours<float> kept = widen(rest[i]);
      v[i] = {__fadd_rn(v[i].first, kept.first), __fadd_rn(v[i].second, kept.second)};
    }
    v[i] = {__fadd_rn(v[i].first, update[i].first), __fadd_rn(v[i].second, update[i].second)};
  }
  if constexpr (kRounding == Rounding::stochastic) {
    pairs_stochastic(v, rand, w);
  } else {
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      w[i] = pair_nearest<T>(v[i]);
      if (!kCompensated) continue;
      const Neighbours<float> stored = widen(w[i]);
      rest[i] = pair_nearest<T>(
          {__fsub_rn(v[i].first, stored.first), __fsub_rn(v[i].second, stored.second)});
    }
  }
}

// Copies the layer that this block works on to shared memory: the last one that begins at or before the block.
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

}  // namespace
}  // namespace relora
