// out (M, N) = dropout'(scale * P (M, r) @ B) + x (M, K) @ W + bias on Hopper: y and dx of lora_linear,
// and with r = 0 the skinny products P and Q.
//
// One persistent block an SM. One thread of the producer warpgroup keeps a ring of k-steps filled by
// TMA: first those of (P, B), then those of (x, W); the second segment only switches two tensor maps.
// Two consumer warpgroups multiply 64 rows each with wgmma into one float32 accumulator, add the bias,
// round once, and hand the tile to TMA to store while they go on with the next one. In a cluster of two
// the blocks share each tile of W: either fetches half of it, for both.
//
// FLOPs: 2 M N (K + r). Compiled for sm_90a alone. What decides indices, phases and descriptors is in
// two_segment.h; what is an instruction in ptx.cuh.
#include <algorithm>

#include "launch.h"
#include "ptx.cuh"
#include "two_segment.h"

namespace relora {
namespace {

using namespace two_segment;

struct Params {
  CUtensorMap low_left, low_right, left, right, out;
  bool stores_by_tma;  // else `out_data` row by row: its pitch is no multiple of 16 bytes
  uint16_t* out_data;
  int64_t out_pitch;
  const void* bias;
  bool bias_is_float;
  int m, n, k, r;
  float scale;  // of the whole sum
  const int64_t* seed;
  uint32_t threshold;
  float keep_scale;
};

// What a variant is: the tile's width, the ring's depth, the blocks of a cluster, whether W and B lie
// with N contiguous (dx = dy W + Q A) rather than K, whether the low-rank sum is masked.
template <typename T_, int kBlockN_, int kStages_, int kCluster_, bool kContiguousN_, bool kDropout_>
struct Variant : Layout<kBlockN_, kStages_> {
  using T = T_;
  static constexpr int kBlockN = kBlockN_, kStages = kStages_, kCluster = kCluster_;
  static constexpr bool kContiguousN = kContiguousN_, kDropout = kDropout_;
};

template <typename V>
struct Barriers {
  uint32_t memory;
  __device__ uint32_t full(int stage) const { return memory + V::full + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return memory + V::empty + 8 * stage; }
};

// ---- Producer ------------------------------------------------------------------------------------

template <typename V>
__device__ __forceinline__ void produce(const Params& p, const Schedule& schedule, uint32_t memory,
                                        int first, int stride, int rank) {
  const Barriers<V> barriers{memory};
  const Steps steps(p.r, p.k);
  constexpr int kShare = V::kBlockN / V::kCluster;  // columns of W's tile that this block fetches
  Ring<V::kStages> ring;
  for (int unit = first; unit < schedule.units(); unit += stride) {
    const Tile tile = schedule.tile(unit, rank);
    const int row = box_start(tile.row, p.m);
    for (int s = 0; s < steps.total; ++s, ring.advance()) {
      const Step step = steps.at(s);
      const CUtensorMap* left_map = step.low ? &p.low_left : &p.left;
      const CUtensorMap* right_map = step.low ? &p.low_right : &p.right;
      const uint32_t left = memory + ring.stage * V::stage_bytes, right = left + V::left_bytes;
      const uint32_t full = barriers.full(ring.stage);
      ptx::wait(barriers.empty(ring.stage), ring.phase ^ 1);
      ptx::arrive_expect(full, V::stage_bytes);
      ptx::load(left_map, left, full, step.k, row);
      const auto load_right = [&](int column, int c0, int c1) {
        const uint32_t to = right + column * kRowBytes;
        if constexpr (V::kCluster == 1)
          ptx::load(right_map, to, full, c0, c1);
        else
          ptx::load_multicast(right_map, to, full, c0, c1, (1 << V::kCluster) - 1);
      };
      if constexpr (V::kContiguousN) {
#pragma unroll
        for (int i = 0; i < kShare; i += kSlab)
          load_right(rank * kShare + i, box_start(tile.col + rank * kShare + i, p.n), step.k);
      } else {
        load_right(rank * kShare, step.k, box_start(tile.col + rank * kShare, p.n));
      }
    }
  }
}

// ---- Consumers -----------------------------------------------------------------------------------

// Lane q of four gets w[i] = what lane i had in w[q]: a transposition by two butterflies.
__device__ __forceinline__ void transpose_four(uint32_t (&w)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const bool high = lane & step;
      const uint32_t other = ptx::shuffle(high ? w[i] : w[i + step], lane ^ step);
      (high ? w[i] : w[i + step]) = other;
    }
}

// acc = kept ? acc * keep_scale : 0, for rows `row` and row + 8. One draw serves the eight columns that
// four lanes hold, two each: every lane draws for one of four such blocks, then they exchange words.
template <int kCount>
__device__ __forceinline__ void mask(float (&acc)[kCount], const Params& p, int row, int col, int lane) {
  const uint64_t seed = uint64_t(*p.seed);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int block = 0; block < kCount / 4; block += 4) {
      Words words = draw(seed, kStreamDropout, row + 8 * half, col / 8 + block + lane % 4);
      transpose_four(words.w, lane);
#pragma unroll
      for (int of = 0; of < 4; ++of) {
        float* pair = acc + (block + of) * 4 + half * 2;
        pair[0] = (words.w[of] & 0xFFFFu) >= p.threshold ? pair[0] * p.keep_scale : 0.f;
        pair[1] = (words.w[of] >> 16) >= p.threshold ? pair[1] * p.keep_scale : 0.f;
      }
    }
}

template <typename T>
__device__ __forceinline__ float bias_at(const Params& p, int col) {
  if (!p.bias || col >= p.n) return 0.f;
  return p.bias_is_float ? static_cast<const float*>(p.bias)[col]
                         : to_float(static_cast<const T*>(p.bias)[col]);
}

template <typename V>
__device__ __forceinline__ void consume(const Params& p, const Schedule& schedule, uint32_t memory,
                                        int first, int stride, int rank, int warpgroup,
                                        int thread) {
  using T = typename V::T;
  const Barriers<V> barriers{memory};
  const Steps steps(p.r, p.k);
  const int warp = thread / 32, lane = thread % 32;
  const uint32_t buffers = memory + V::output + warpgroup * V::buffers * V::buffer_bytes;
  float acc[V::kBlockN / 2];
  Ring<V::kStages> ring;
  Ring<V::buffers> buffer;

  const auto release = [&](int stage) {  // by every warp, to every block that fetches for this one
    if constexpr (V::kCluster == 1) {
      if (lane == 0) ptx::arrive(barriers.empty(stage));
    } else {
      if (lane < V::kCluster) ptx::arrive_remote(barriers.empty(stage), lane);
    }
  };
  // Leaves one step's products in flight while the next step's are issued.
  const auto multiply = [&](int from, int to) {
    int before = 0;
    for (int s = from; s < to; ++s, ring.advance()) {
      const uint32_t left = memory + ring.stage * V::stage_bytes, right = left + V::left_bytes;
      ptx::wait(barriers.full(ring.stage), ring.phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlockK; k += 16)
        ptx::wgmma<T, V::kContiguousN>(
            acc, operand_descriptor<false>(left + warpgroup * V::left_bytes / kConsumers, k),
            operand_descriptor<V::kContiguousN>(right, k), s > 0 || k > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (s > from) release(before);
      before = ring.stage;
    }
    ptx::wgmma_wait<0>();
    ptx::hold(acc);
    release(before);
  };

  for (int unit = first; unit < schedule.units(); unit += stride) {
    const Tile tile = schedule.tile(unit, rank);
    const int row = tile.row + warpgroup * (kBlockM / kConsumers);
    if constexpr (V::kDropout) {
      multiply(0, steps.low);
      mask(acc, p, row + warp * 16 + lane / 4, tile.col, lane);
      multiply(steps.low, steps.total);
    } else {
      multiply(0, steps.total);
    }

    // Epilogue: 64 columns at a time through shared memory.
    if (row >= p.m) continue;
#pragma unroll
    for (int chunk = 0; chunk < V::kBlockN / kSlab; ++chunk) {
      const int col = tile.col + chunk * kSlab;
      if (col >= p.n) break;
      const uint32_t to = buffers + buffer.stage * V::buffer_bytes;
      buffer.advance();
      if (thread == 0) ptx::store_wait_read<V::buffers - 1>();
      ptx::named_barrier(1 + warpgroup, 128);  // the buffer's earlier contents are gone
#pragma unroll
      for (int sixteen = 0; sixteen < kSlab / 16; ++sixteen) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // columns 8 (i / 2) on, rows 8 (i % 2) on
          const float* pair = acc + (chunk * kSlab + sixteen * 16) / 2 + i * 2;
          const int at = col + sixteen * 16 + i / 2 * 8 + lane % 4 * 2;
          packed[i] = ptx::pack<T>(fmaf(pair[0], p.scale, bias_at<T>(p, at)),
                                   fmaf(pair[1], p.scale, bias_at<T>(p, at + 1)));
        }
        ptx::store_matrices(
            to + swizzled(warp * 16 + lane % 16, sixteen * 2 + lane / 16), packed[0], packed[1],
            packed[2], packed[3]);
      }
      if (p.stores_by_tma) {
        ptx::fence_async_shared();
        ptx::named_barrier(1 + warpgroup, 128);
        if (thread == 0) {
          ptx::store(&p.out, to, col, row);
          ptx::store_commit();
        }
      } else {
        ptx::named_barrier(1 + warpgroup, 128);
        for (int i = warp * 16; i < warp * 16 + 16 && row + i < p.m; ++i)
#pragma unroll
          for (int j = lane; j < kSlab; j += 32)
            if (col + j < p.n)
              p.out_data[(row + i) * p.out_pitch + col + j] =
                  ptx::load_shared_16(to + swizzled(i, j / 8) + j % 8 * 2);
      }
    }
  }
  if (thread == 0) ptx::store_wait_read<0>();  // shared memory has to outlive its readers
}

// ---- The kernel ----------------------------------------------------------------------------------

template <typename V>
__global__ void __launch_bounds__(kThreads, 1)
    two_segment_kernel(const __grid_constant__ Params p) {
  const uint32_t memory = ptx::shared_memory();
  const Barriers<V> barriers{memory};
  const int rank = V::kCluster == 1 ? 0 : int(ptx::cluster_rank());
  const Schedule schedule(p.m, p.n, V::kBlockN, V::kCluster);
  const int first = blockIdx.x / V::kCluster, stride = gridDim.x / V::kCluster;
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < V::kStages; ++stage) {
      ptx::barrier_init(barriers.full(stage), 1);
      ptx::barrier_init(barriers.empty(stage), kConsumers * 4 * V::kCluster);
    }
    ptx::barrier_init_fence();
  }
  if constexpr (V::kCluster == 1)
    __syncthreads();
  else
    ptx::cluster_sync();

  if (warpgroup == 0) {
    ptx::give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<V>(p, schedule, memory, first, stride, rank);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    consume<V>(p, schedule, memory, first, stride, rank, warpgroup - 1, threadIdx.x % 128);
  }
  if constexpr (V::kCluster > 1) ptx::cluster_sync();  // the other block still arrives at our barriers
}

// ---- Launcher ------------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is loaded: nothing links against it, so that the module imports without one.
cudaError_t find_encode(Encode* encode) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  *encode = reinterpret_cast<Encode>(found);
  return error != cudaSuccess                          ? error
         : result == cudaDriverEntryPointSuccess && found ? cudaSuccess
                                                          : cudaErrorNotSupported;
}

cudaError_t make_map(Encode encode, DType dtype, const MapSpec& spec, CUtensorMap* map) {
  if (!has_map(spec)) return cudaErrorInvalidValue;
  const cuuint32_t steps[2] = {1, 1};
  const cuuint64_t extent[2] = {spec.extent[0], spec.extent[1]}, pitch[1] = {spec.pitch};
  const CUresult result = encode(
      map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      2, spec.data, extent, pitch, spec.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // beyond the edge: zeros
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

using Kernel = void (*)(Params);

struct Entry {
  int block_n, cluster;
  bool contiguous_n, dropout;
  int shared;
  Kernel kernel;
};

template <typename V>
constexpr Entry entry() {
  return {V::kBlockN, V::kCluster, V::kContiguousN, V::kDropout, V::bytes, two_segment_kernel<V>};
}

// 128 x 256 for the large products; 128 x 128 where N is small: P, Q, narrow layers.
template <typename T>
constexpr Entry kEntries[] = {
    entry<Variant<T, 256, 4, 1, false, false>>(), entry<Variant<T, 256, 4, 2, false, false>>(),
    entry<Variant<T, 256, 4, 1, true, false>>(),  entry<Variant<T, 256, 4, 2, true, false>>(),
    entry<Variant<T, 256, 4, 1, true, true>>(),   entry<Variant<T, 128, 6, 1, false, false>>(),
    entry<Variant<T, 128, 6, 1, true, false>>(),
};

const Entry* find_entry(const TwoSegmentArgs& a) {
  const bool dropout = a.threshold > 0;
  for (const Entry& e : a.dtype == DType::bf16 ? kEntries<bf16> : kEntries<fp16>)
    if (e.block_n == a.block_n && e.cluster == a.cluster && e.contiguous_n == a.contiguous_n &&
        e.dropout == dropout)
      return &e;
  return nullptr;
}

}  // namespace

cudaError_t two_segment_sm90(const TwoSegmentArgs& a, cudaStream_t stream) {
  const Entry* const e = find_entry(a);
  if (!e || a.dtype == DType::f32 || a.m < 1 || a.n < 1 || a.k < 1 || a.r < 0)
    return cudaErrorInvalidValue;
  const Schedule schedule(a.m, a.n, e->block_n, e->cluster);
  const int64_t most = INT32_MAX - 2 * kBlockM;  // coordinates are 32-bit, past the last tile too
  if (std::max({a.m, a.n, a.k, a.r, schedule.units()}) > most) return cudaErrorInvalidConfiguration;

  Params p{};
  p.out_data = static_cast<uint16_t*>(a.out.data);
  p.out_pitch = a.out.row;
  p.bias = a.bias;
  p.bias_is_float = a.bias_dtype == DType::f32;
  p.m = int(a.m), p.n = int(a.n), p.k = int(a.k), p.r = int(a.r);
  p.scale = a.scale;
  p.seed = a.seed;
  p.threshold = a.threshold;
  p.keep_scale = a.keep_scale;

  Encode encode;
  if (const cudaError_t error = find_encode(&encode)) return error;
  const auto map = [&](CUtensorMap* to, const Matrix& t, int64_t rows, int64_t cols, int box_rows) {
    return make_map(encode, a.dtype, map_spec(t.data, rows, cols, t.row, box_rows), to);
  };
  // W and B: rows of K (boxes of 64 x a block's share of the tile), or of N (boxes of 64 x 64).
  const auto map_right = [&](CUtensorMap* to, const Matrix& t, int64_t depth) {
    return a.contiguous_n ? map(to, t, depth, a.n, kBlockK)
                          : map(to, t, a.n, depth, e->block_n / e->cluster);
  };
  if (const cudaError_t error = map(&p.left, a.x, a.m, a.k, kBlockM)) return error;
  if (const cudaError_t error = map_right(&p.right, a.w, a.k)) return error;
  if (a.r > 0) {
    if (const cudaError_t error = map(&p.low_left, a.p, a.m, a.r, kBlockM)) return error;
    if (const cudaError_t error = map_right(&p.low_right, a.b, a.r)) return error;
  }
  p.stores_by_tma = has_map(map_spec(a.out.data, a.m, a.n, a.out.row, kBlockM / kConsumers));
  if (p.stores_by_tma)
    if (const cudaError_t error = map(&p.out, a.out, a.m, a.n, kBlockM / kConsumers)) return error;

  int device, processors;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))
    return error;
  if (const cudaError_t error = cudaFuncSetAttribute(
          e->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, e->shared))
    return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(e->cluster), 1, 1};
  cudaLaunchConfig_t config{};
  // A cluster of two is the two SMs of one TPC, so that as many fit as there are pairs of SMs.
  config.gridDim = dim3(unsigned(
      std::min<int64_t>(schedule.units(), std::max(1, processors / e->cluster)) * e->cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(e->shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = e->cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, e->kernel, p);
}

}  // namespace relora
