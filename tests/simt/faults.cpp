// Small kernels, each sound or with one fault. tests/test_simt.py checks with them that the shim shows the faults.
#include "cuda_runtime.h"
#include "mma.cuh"

namespace {

thread_local uint4 dynamic_shared[simt::kDynamicMost / 16 + 64];
constexpr int kThreads = 64, kCluster = 2;

struct Given {
  bool fault;
  int* out;       // a number for each thread of the grid
  int* arrived;   // a zero, followed by one for each block
  int launch;     // index among the case's launches; each programmatically depends on the one before it
};

int* own(const Given& given) { return given.out + blockIdx.x * kThreads + threadIdx.x; }
int other() { return kThreads - 1 - int(threadIdx.x); }  // of another warp

void read_too_early(Given given) {
  __shared__ int words[kThreads];
  words[threadIdx.x] = int(threadIdx.x);
  if (!given.fault) __syncthreads();
  *own(given) = words[other()];
}

void overwritten_too_early(Given given) {
  __shared__ int words[kThreads];
  for (int i = 0; i < 3; ++i) {
    words[threadIdx.x] = i;
    __syncthreads();
    *own(given) += words[other()];
    if (!given.fault) __syncthreads();
  }
}

void read_too_early_in_a_warp(Given given) {
  __shared__ int words[kThreads];
  words[threadIdx.x] = int(threadIdx.x);
  if (!given.fault) __syncwarp();
  *own(given) = words[threadIdx.x ^ 31];
}

void shuffled_instead(Given given) {
  __shared__ int words[kThreads];
  words[threadIdx.x] = int(threadIdx.x);
  if (given.fault) __shfl_sync(~0u, 1, 0);
  else __syncwarp();
  *own(given) = words[threadIdx.x ^ 31];
}

void multiplied_instead(Given given) {
  __shared__ int words[kThreads];
  words[threadIdx.x] = int(threadIdx.x);
  if (!given.fault) __syncwarp();
  float sums[4] = {};
  relora::mma(sums, {}, {});
  *own(given) = words[threadIdx.x ^ 31];
}

// Copies four threads' numbers into shared memory while their owners overwrite them.
void overwritten_during_a_copy(Given given) {
  alignas(16) __shared__ int words[4 * kThreads];
  *own(given) = 1;
  __syncwarp();
  relora::copy_async<16>(words + 4 * threadIdx.x, given.out + (own(given) - given.out) / 4 * 4, 16);
  relora::commit_copies();
  if (!given.fault) relora::wait_for_copies<0>();
  __syncthreads();
  *own(given) = 2;
  relora::wait_for_copies<0>();
  __syncthreads();
  *own(given) += words[4 * threadIdx.x];
}

void never_written(Given given) {
  __shared__ int words[kThreads];
  if (!given.fault) words[threadIdx.x] = 0;
  *own(given) = words[threadIdx.x];
}

void outside_its_array(Given given) {
  __shared__ int words[kThreads];
  words[threadIdx.x] = 1;
  __syncthreads();
  *own(given) = words[threadIdx.x + unsigned(given.fault)];
}

void misaligned(Given given) {
  __shared__ uint4 words[kThreads + 1];
  words[threadIdx.x] = {1, 2, 3, 4};
  __syncthreads();
  const char* const at = reinterpret_cast<const char*>(words) + 8 * int(given.fault);
  *own(given) = int(*reinterpret_cast<const unsigned*>(at)) + int(reinterpret_cast<const uint4*>(at)->y);
}

// Launched with 16 bytes of dynamic shared memory for each thread.
void behind_dynamic(Given given) {
  dynamic_shared[threadIdx.x + unsigned(given.fault)].x = 1;
  *own(given) = int(dynamic_shared[threadIdx.x].x);
}

void barriers_of_two_lines(Given given) {
  if (given.fault && threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  *own(given) = 1;
}

void vote_of_lanes_that_left(Given given) {
  *own(given) = 1;
  if (given.fault && threadIdx.x % 32 == 7) return;
  *own(given) += __any_sync(~0u, 1);
}

// The last block sums up what all have written.
void announce(const Given& given, bool fence, bool barrier, bool second_fence) {
  __shared__ int last;
  *own(given) = int(threadIdx.x);
  if (fence) __threadfence();
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(given.arrived, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!last || threadIdx.x) return;
  if (second_fence) __threadfence();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x * kThreads; ++i) sum += given.out[i];
  given.out[0] = sum;
}
void announced_too_early(Given given) { announce(given, true, !given.fault, true); }
void announced_unfenced(Given given) { announce(given, !given.fault, true, true); }
void summed_up_unfenced(Given given) { announce(given, true, true, !given.fault); }

// The last of each pair of blocks announces both; the last pair sums up.
void announced_by_another(Given given) {
  __shared__ int last;
  *own(given) = int(threadIdx.x);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(given.arrived + 1 + blockIdx.x / 2, 1) == 1;
    if (!given.fault) __threadfence();
    last = last && atomicAdd(given.arrived, 1) == int(gridDim.x) / 2 - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x) return;
  __threadfence();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x * kThreads; ++i) sum += given.out[i];
  given.out[0] = sum;
}

// Each block counts in its own shared memory, which lies where an earlier block has counted.
void counted_in_anothers_place(Given given) {
  __shared__ unsigned long long counts[kThreads];
  counts[threadIdx.x] = 0;
  *own(given) = 1;
  __threadfence();
  atomicAdd(reinterpret_cast<unsigned*>(&counts[threadIdx.x]) + 1, 1u);
  __threadfence();
  if (given.fault && blockIdx.x) *own(given) += own(given)[-kThreads];
}

void many_rounds(Given given) {
  for (int i = 0; i < 40; ++i) {
    __threadfence();
    atomicAdd(given.arrived, 1);
    __threadfence();
    if (!given.fault) __syncthreads();
    *own(given) += i;
  }
  if (given.fault) *own(given) += own(given)[threadIdx.x ? -1 : 0];
}

int* of_rank(int* words, unsigned rank) { return static_cast<int*>(__cluster_map_shared_rank(words, rank)); }

void cluster_read_too_early(Given given) {
  __shared__ int words[kThreads];
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  words[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  if (!given.fault) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }
  *own(given) = of_rank(words, __clusterRelativeBlockRank() ^ 1)[other()];
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

void cluster_written_before_it_begins(Given given) {
  __shared__ int words[kThreads];
  if (!given.fault) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }
  of_rank(words, __clusterRelativeBlockRank() ^ 1)[threadIdx.x] = 1;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  *own(given) = words[other()];
}

void cluster_left_too_early(Given given) {
  __shared__ int words[kThreads];
  words[threadIdx.x] = int(threadIdx.x);
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  *own(given) = of_rank(words, __clusterRelativeBlockRank() ^ 1)[other()];
  if (given.fault) return;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// Writes behind the other block's dynamic shared memory.
void behind_the_others_dynamic(Given given) {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  int* const theirs = of_rank(reinterpret_cast<int*>(dynamic_shared), __clusterRelativeBlockRank() ^ 1);
  theirs[4 * (threadIdx.x + unsigned(given.fault))] = 1;
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  *own(given) = 1;
}

void begun_too_early(Given given) {
  if (!given.fault) cudaGridDependencySynchronize();
  *own(given) += 1;
}

// The last launch waits for the one before it. With the fault, that one waits for nothing.
void ended_too_early(Given given) {
  if (given.launch != 1 || !given.fault) cudaGridDependencySynchronize();
  if (given.launch != 1) *own(given) += 1;
}

struct Case {
  const char* name;
  void (*kernel)(Given);
  bool clusters = false;
  int launches = 1;
};
constexpr Case kCases[] = {
    {"read too early", read_too_early},
    {"overwritten too early", overwritten_too_early},
    {"read too early in a warp", read_too_early_in_a_warp},
    {"shuffled instead of a barrier", shuffled_instead},
    {"multiplied instead of a barrier", multiplied_instead},
    {"overwritten during a copy", overwritten_during_a_copy},
    {"never written", never_written},
    {"outside its array", outside_its_array},
    {"misaligned", misaligned},
    {"behind dynamic memory", behind_dynamic},
    {"barriers of two lines", barriers_of_two_lines},
    {"vote of lanes that left", vote_of_lanes_that_left},
    {"announced too early", announced_too_early},
    {"announced without a fence", announced_unfenced},
    {"summed up without a fence", summed_up_unfenced},
    {"announced by another without a fence", announced_by_another},
    {"counted in another's place", counted_in_anothers_place},
    {"after many rounds", many_rounds},
    {"read too early in a cluster", cluster_read_too_early, true},
    {"written before a cluster begins", cluster_written_before_it_begins, true},
    {"left too early in a cluster", cluster_left_too_early, true},
    {"behind another block's dynamic memory", behind_the_others_dynamic, true},
    {"begun before another launch ended", begun_too_early, false, 2},
    {"ended before another launch ended", ended_too_early, false, 3},
};

}  // namespace

// Runs the case `name` with `blocks` blocks of kThreads. `out`: zeros, one for each thread, then Given::arrived's.
extern "C" int simt_fault(const char* name, bool fault, int blocks, unsigned order, int* out) {
  simt::order = order;
  simt::most_cluster = kCluster;
  simt::dynamic_shared = reinterpret_cast<unsigned char*>(dynamic_shared);
  simt::dynamic_capacity = sizeof dynamic_shared;
  for (const Case& one : kCases) {
    if (std::strcmp(one.name, name)) continue;
    cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension, {{kCluster, 1, 1}, 0}};
    cudaLaunchAttribute follows{cudaLaunchAttributeProgrammaticStreamSerialization, {{}, 1}};
    const cudaLaunchConfig_t config{dim3(unsigned(blocks)), dim3(kThreads), kThreads * sizeof(uint4), nullptr,
                                    one.clusters ? &cluster : &follows, one.clusters || one.launches > 1};
    simt::Races::host_write();  // the first launch follows nothing
    for (int i = 0; i < one.launches; ++i)
      if (const cudaError_t error =
              cudaLaunchKernelEx(&config, one.kernel, Given{fault, out, out + blocks * kThreads, i}))
        return error;
    return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
