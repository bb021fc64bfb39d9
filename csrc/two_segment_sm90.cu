// out (M, N) = dropout'(P (M, r) @ B) + x (M, K) @ W + bias on Hopper: y and dx of lora_linear;
// with r = 0 the skinny products P and Q; transposed and cut into slabs of float32, dA and dB;
// or Q and dB in one launch, which alternates between the two.
//
// One persistent block per SM. One thread of the producer warpgroup keeps a ring of k-steps filled
// by TMA: first those of (P, B), then those of (x, W). The second segment only switches two tensor
// maps. Two consumer warpgroups multiply 64 rows each with wgmma into one float32 accumulator, add
// the bias, round once, and hand the tile to TMA to store while they go on with the next one. In a
// cluster of two the blocks share each tile of W: each fetches half of it, for both.
//
// FLOPs: 2 M N (K + r). Compiled for sm_90a only. Indices, phases and descriptors are computed in
// two_segment.h; instructions are in ptx.cuh.
#include <algorithm>

#include "launch.h"
#include "ptx.cuh"
#include "two_segment.cuh"
#include "two_segment.h"

namespace relora {
namespace {

using namespace two_segment;

struct Params {
  CUtensorMap low_left, left, right, low_right, out;  // in a pair, p is in low_left
  bool stores_by_tma;  // otherwise row by row to out_data: its start or pitch is no multiple of 16 bytes
  void* out_data;
  int64_t out_pitch;
  Matrix sums;  // of a pair
  int slab_steps;
  int m, n, k, r;
  float scale;  // of the whole sum
  Bias bias;
  Dropout dropout;
};
static_assert(sizeof(Params) <= 4096);  // limit of kernel parameters before CUDA 12.1

// A variant: the tile's width, the ring's depth, the blocks of a cluster, how the operands are stored,
// whether the low-rank sum is masked, whether it is half of a pair. Both halves of a pair fill whole
// stages of the same ring, which continues from units of one half to units of the other.
template <typename T_, int kBlockN_, int kStages_, int kCluster_, Form kForm_,
          bool kDropout_ = false, bool kPair_ = false>
struct Variant : Layout<kBlockN_, kStages_> {
  using T = T_;
  static constexpr int kBlockN = kBlockN_, kStages = kStages_, kCluster = kCluster_;
  static constexpr Form kForm = kForm_;
  static constexpr bool kDropout = kDropout_, kPair = kPair_;
  static constexpr bool kLeftK = kForm != Form::tn, kRightK = kForm == Form::nt;  // K-contiguous
  static constexpr int kLeftBox = kLeftK && !kPair ? kBlockM : kSpan;  // rows; a pair's fits both halves
  static constexpr bool kDown = kPair && kForm == Form::tn;  // x^T p, with p in low_left
  using Down = Variant<T, kBlockN, kStages, kCluster, Form::tn, false, true>;
};

template <typename V>
struct Barriers {
  uint32_t memory;
  __device__ uint32_t full(int stage) const { return memory + V::full + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return memory + V::empty + 8 * stage; }
};

// Calls call(variant, work) for each unit that this block computes, in order.
template <typename V, typename Call>
__device__ __forceinline__ void each_unit(const Params& p, int rank, Call&& call) {
  const int first = blockIdx.x / V::kCluster, stride = gridDim.x / V::kCluster;
  if constexpr (V::kPair) {
    const Pair pair(p.m, p.n, p.k, p.slab_steps, V::kBlockN, V::kCluster);
    const int units = int(pair.units());
    for (int unit = first; unit < units; unit += stride) {
      const Pair::Unit at = pair.at(unit);
      if (at.down)
        call(typename V::Down{}, pair.down.work(at.unit, rank));
      else
        call(V{}, pair.across.work(at.unit, rank));
    }
  } else {
    const int steps = Steps(p.r, p.k).total;
    const Schedule schedule(p.m, p.n, steps, p.slab_steps, V::kBlockN, V::kCluster);
    const int units = int(schedule.units());
    for (int unit = first; unit < units; unit += stride) call(V{}, schedule.work(unit, rank));
  }
}

// ---- Producer ----------------------------------------------------------------------------------

// Loads a box for this block, or the same box for all blocks of a cluster.
template <int kBlocks>
__device__ __forceinline__ void load(const CUtensorMap* map, uint32_t to, uint32_t full, int c0,
                                     int c1) {
  if constexpr (kBlocks == 1)
    ptx::load(map, to, full, c0, c1);
  else
    ptx::load_multicast(map, to, full, c0, c1, (1 << kBlocks) - 1);
}

template <typename V>
__device__ __forceinline__ void produce(const Params& p, uint32_t memory, int rank) {
  const Barriers<V> barriers{memory};
  const Steps steps(p.r, p.k);
  Ring<V::kStages> ring;
  const auto fetch = [&](auto variant, const Work& work) {
    using U = decltype(variant);
    const int m = U::kDown ? p.k : p.m;
    constexpr int kShare = V::kBlockN / V::kCluster;  // columns of W's tile that this block fetches
    for (int s = work.from; s < work.to; ++s, ring.advance()) {
      const Step step = steps.at(s);
      const CUtensorMap* const left_map = step.low ? &p.low_left : &p.left;
      const CUtensorMap* const right_map =
          U::kDown ? &p.low_left : step.low ? &p.low_right : &p.right;
      const uint32_t left = memory + ring.stage * V::stage_bytes, right = left + V::left_bytes;
      const uint32_t full = barriers.full(ring.stage);

      ptx::wait(barriers.empty(ring.stage), ring.phase ^ 1);
      ptx::arrive_expect(full, V::stage_bytes);
#pragma unroll
      for (int i = 0; i < kBlockM; i += U::kLeftBox) {
        const int row = box_start(work.row + i, m);
        ptx::load(left_map, left + i * kRowBytes, full, U::kLeftK ? step.k : row,
                  U::kLeftK ? row : step.k);
      }
      const int from = rank * kShare;
      if constexpr (U::kRightK) {
        load<V::kCluster>(right_map, right + from * kRowBytes, full, step.k,
                          box_start(work.col + from, p.n));
      } else {
#pragma unroll
        for (int i = from; i < from + kShare; i += kSpan)
          load<V::kCluster>(right_map, right + i * kRowBytes, full, box_start(work.col + i, p.n),
                            step.k);
      }
    }
  };
  each_unit<V>(p, rank, fetch);
}

// ---- Consumers ---------------------------------------------------------------------------------

template <typename V>
__device__ __forceinline__ void consume(const Params& p, uint32_t memory, int rank,
                                        int warpgroup, int thread) {
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
  const auto compute = [&](auto variant, const Work& work) {
    using U = decltype(variant);
    // Leaves one step's products in flight while the next step's are issued.
    const auto multiply = [&](int from, int to, bool accumulate) {
      int before = 0;
      for (int s = from; s < to; ++s, ring.advance()) {
        const uint32_t left = memory + ring.stage * V::stage_bytes, right = left + V::left_bytes;
        ptx::wait(barriers.full(ring.stage), ring.phase);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBlockK; k += 16)
          ptx::wgmma<T, U::kLeftK, U::kRightK>(
              acc, operand_descriptor<U::kLeftK>(left + warpgroup * V::left_bytes / kConsumers, k),
              operand_descriptor<U::kRightK>(right, k), accumulate || s > from || k > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (s > from) release(before);
        before = ring.stage;
      }
      ptx::wgmma_wait<0>();
      ptx::hold(acc);
      release(before);
    };
    const int& m = U::kDown ? p.k : p.m;  // read at each use: with one register more, wide tiles spill
    const int row = work.row + warpgroup * (kBlockM / kConsumers);
    if constexpr (V::kDropout) {
      multiply(0, steps.low, false);
      mask(acc, p.dropout, row + warp * 16 + lane / 4, work.col, lane);
      multiply(steps.low, steps.total, true);
    } else {
      multiply(work.from, work.to, false);
    }

    // Epilogue. Partial sums are stored as they are, in whole 32-byte sectors.
    const int my_col = work.col + lane % 4 * 2;
    if constexpr (U::kForm == Form::tn) {
      const int my_row = row + warp * 16 + lane / 4;
      const int64_t pitch = U::kDown ? p.sums.row : p.out_pitch;
      float* const out = static_cast<float*>(U::kDown ? p.sums.data : p.out_data) +
                         (int64_t(work.slab) * m + my_row) * pitch + my_col;
#pragma unroll
      for (int i = 0; i < V::kBlockN / 2; i += 2) {
        const int down = i / 2 % 2 * 8, across = i / 4 * 8;
        if (my_row + down < m && my_col + across < p.n)
          *reinterpret_cast<float2*>(out + down * pitch + across) = {acc[i], acc[i + 1]};
      }
      return;
    }
    // The output: 64 columns at a time through shared memory.
    if (row >= m) return;
    finish<T>(acc, p.scale, p.bias, my_col, p.n);
#pragma unroll
    for (int chunk = 0; chunk < V::kBlockN / kSpan; ++chunk) {
      const int col = work.col + chunk * kSpan;
      if (col >= p.n) break;
      const uint32_t to = buffers + buffer.stage * V::buffer_bytes;
      buffer.advance();
      if (thread == 0) ptx::store_wait_read<V::buffers - 1>();
      ptx::named_barrier(1 + warpgroup, 128);  // the buffer's earlier contents have been read
#pragma unroll
      for (int sixteen = 0; sixteen < kSpan / 16; ++sixteen) {
        uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // columns from 8 (i / 2) on, rows from 8 (i % 2) on
          const float* pair = acc + (chunk * kSpan + sixteen * 16) / 2 + i * 2;
          packed[i] = ptx::pack<T>(pair[0], pair[1]);
        }
        const int line = warp * 16 + lane % 16;  // of the accumulators
        ptx::store_matrices(to + swizzled(line, sixteen * 2 + lane / 16), packed[0], packed[1],
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
        uint16_t* const out = static_cast<uint16_t*>(p.out_data);
        for (int i = warp * 16; i < warp * 16 + 16 && row + i < m; ++i)
#pragma unroll
          for (int j = lane; j < kSpan; j += 32)
            if (col + j < p.n)
              out[(row + i) * p.out_pitch + col + j] =
                  ptx::load_shared_16(to + swizzled(i, j / 8) + j % 8 * 2);
      }
    }
  };
  each_unit<V>(p, rank, compute);
  if (thread == 0) ptx::store_wait_read<0>();  // shared memory has to outlive its readers
}

// ---- The kernel --------------------------------------------------------------------------------

template <typename V>
__global__ void __launch_bounds__(kThreads, 1)
    two_segment_kernel(const __grid_constant__ Params p) {
  const uint32_t memory = ptx::shared_memory();
  const Barriers<V> barriers{memory};
  const int rank = V::kCluster == 1 ? 0 : int(ptx::cluster_rank());
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
    if (threadIdx.x == 0) produce<V>(p, memory, rank);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    consume<V>(p, memory, rank, warpgroup - 1, threadIdx.x % 128);
  }
  if constexpr (V::kCluster > 1)
    ptx::cluster_sync();  // the other block still arrives at our barriers
}

// ---- Launcher ----------------------------------------------------------------------------------

using Encode = decltype(&cuTensorMapEncodeTiled);

// Looked up in the loaded driver: nothing links against it, so that the module imports without a driver.
// Null if the driver does not have it.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<Encode>(found) : nullptr;
}

cudaError_t make_map(Encode encode, DType dtype, const MapSpec& spec, CUtensorMap* map) {
  if (!has_map(spec)) return cudaErrorInvalidValue;
  const cuuint32_t steps[2] = {1, 1};
  const cuuint64_t extent[2] = {spec.extent[0], spec.extent[1]}, pitch[1] = {spec.pitch};
  const CUresult result = encode(
      map,
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      spec.data, extent, pitch, spec.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // beyond the edge: zeros
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

using Kernel = void (*)(Params);

struct Entry {
  int block_n, cluster;
  Form form;
  bool dropout, pair;
  int left_box, shared;
  Kernel kernel;
};

template <typename V>
constexpr Entry entry() {
  return {V::kBlockN, V::kCluster, V::kForm,  V::kDropout,
          V::kPair,   V::kLeftBox, V::bytes, two_segment_kernel<V>};
}

// 128 x 256 for the large products; 128 x 128 where N is small (P, Q, narrow layers) and for dA and
// dB.
template <typename T>
constexpr Entry kEntries[] = {
    entry<Variant<T, 256, 4, 1, Form::nt>>(),       entry<Variant<T, 256, 4, 2, Form::nt>>(),
    entry<Variant<T, 256, 4, 1, Form::nn>>(),       entry<Variant<T, 256, 4, 2, Form::nn>>(),
    entry<Variant<T, 256, 4, 1, Form::nn, true>>(), entry<Variant<T, 128, 6, 1, Form::nt>>(),
    entry<Variant<T, 128, 6, 1, Form::nn>>(),       entry<Variant<T, 128, 6, 1, Form::tn>>(),
    entry<Variant<T, 128, 6, 1, Form::nn, false, true>>(),
    entry<Variant<T, 128, 6, 2, Form::nn, false, true>>(),
};

const Entry* find_entry(const TwoSegmentArgs& a) {
  for (const Entry& e : a.dtype == DType::bf16 ? kEntries<bf16> : kEntries<fp16>)
    if (e.block_n == a.block_n && e.cluster == a.cluster && e.form == a.form &&
        e.dropout == (a.dropout.threshold > 0) && e.pair == (a.sums.data != nullptr))
      return &e;
  return nullptr;
}

}  // namespace

cudaError_t two_segment_sm90(const TwoSegmentArgs& a, cudaStream_t stream) {
  const Entry* const e = find_entry(a);
  const bool partial = a.form == Form::tn, pair = a.sums.data, slabs = partial || pair;
  if (!e || a.dtype == DType::f32 || a.m < 1 || a.n < 1 || a.k < 1 || a.r < 0 ||
      (slabs && (a.r > 0 || a.slab_steps < 1 || (pair ? a.sums : a.out).row % 2)) ||
      (pair && a.slab_steps % (kBlockM / kBlockK * e->cluster)) ||
      (a.dropout.threshold > 0 && a.r < 1))
    return cudaErrorInvalidValue;
  const int64_t most = INT32_MAX - 2 * kBlockM;  // coordinates are 32-bit, past the last tile too
  if (std::max({a.m, a.n, a.k, a.r}) > most) return cudaErrorInvalidConfiguration;
  const int steps = Steps(a.r, a.k).total, slab_steps = slabs ? a.slab_steps : steps;
  const int64_t units =
      pair ? Pair(a.m, a.n, a.k, slab_steps, e->block_n, e->cluster).units()
           : Schedule(a.m, a.n, steps, slab_steps, e->block_n, e->cluster).units();
  if (units > most) return cudaErrorInvalidConfiguration;

  Params p{};
  p.out_data = a.out.data;
  p.out_pitch = a.out.row;
  p.sums = a.sums;
  p.slab_steps = slab_steps;
  p.m = int(a.m), p.n = int(a.n), p.k = int(a.k), p.r = int(a.r);
  p.scale = a.scale;
  p.bias = a.bias;
  p.dropout = a.dropout;

  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  cudaError_t error = cudaSuccess;  // the first error
  const auto map = [&](CUtensorMap* to, const MapSpec& spec) {
    if (!error) error = make_map(encode, a.dtype, spec, to);
  };
  // K-contiguous operands come in boxes of 64 k by a block's rows, or 64; others of 64 x 64.
  const auto left_spec = [&](const Matrix& t, int64_t depth) {
    return partial ? map_spec(t.data, depth, a.m, t.row, kBlockK)
                   : map_spec(t.data, a.m, depth, t.row, e->left_box);
  };
  const auto right_spec = [&](const Matrix& t, int64_t depth) {
    return a.form == Form::nt ? map_spec(t.data, a.n, depth, t.row, e->block_n / e->cluster)
                              : map_spec(t.data, depth, a.n, t.row, kBlockK);
  };
  // The right operand of x^T.
  const Matrix& under = pair ? a.p : a.w;
  const MapSpec under_spec = map_spec(under.data, pair ? a.m : a.k, a.n, under.row, kBlockK);
  map(&p.left, left_spec(a.x, a.k));
  if (a.r > 0) map(&p.low_left, left_spec(a.p, a.r));
  if (a.r > 0) map(&p.low_right, right_spec(a.b, a.r));
  if (slabs) map(pair ? &p.low_left : &p.right, under_spec);
  if (!partial) map(&p.right, right_spec(a.w, a.k));
  const MapSpec out_spec = map_spec(a.out.data, a.m, a.n, a.out.row, kBlockM / kConsumers);
  p.stores_by_tma = !partial && has_map(out_spec);
  if (p.stores_by_tma) map(&p.out, out_spec);

  int device, processors;
  if (!error) error = cudaGetDevice(&device);
  if (!error)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error)
    error = cudaFuncSetAttribute(e->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, e->shared);
  if (error) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(e->cluster), 1, 1};
  cudaLaunchConfig_t config{};
  // A cluster of two occupies the two SMs of a TPC, so as many fit as there are pairs of SMs.
  config.gridDim = dim3(unsigned(
      std::min<int64_t>(units, std::max(1, processors / e->cluster)) * e->cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(e->shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = e->cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, e->kernel, p);
}

}  // namespace relora
