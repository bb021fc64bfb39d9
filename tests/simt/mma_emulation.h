// csrc/mma.cuh on the host: the tensor-core product by an exchange between a warp's lanes, with the
// fragment layout of the PTX manual, and asynchronous copies that complete as late as allowed.
#pragma once

#include <map>
#include <vector>

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

namespace relora {

template <typename T>
T* global_memory(void* p) { return static_cast<T*>(p); }

inline int lane_id() { return int(threadIdx.x) % 32; }

struct WarpFragments { uint32_t l[32][4], r[32][2]; };
// Thread-local like shared memory, so that each block has its own.
inline thread_local WarpFragments fragments[32][2];  // per warp: of a product, and of the next one
inline thread_local unsigned products[1024];         // per thread: products it has taken part in

struct Copy { void* to; const void* from; int size, bytes; };
inline std::map<simt::Fiber*, std::vector<std::vector<Copy>>> copies;  // each thread's groups

inline void run_copies(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    simt::Races::access(copy.from, size_t(copy.bytes), false);
    simt::Races::access(copy.to, size_t(copy.size), true);
    std::memset(copy.to, 0, copy.size);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

// A group runs only when it is waited for, so a stage that is read too early is still NaN.
template <int kBytes>
void copy_async(void* shared, const void* global, int bytes) {
  const simt::InShim in_shim;
  simt::Races::access(global, size_t(bytes), false);
  simt::Races::access(shared, kBytes, true);
  if (reinterpret_cast<uintptr_t>(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes)
    simt::die("misaligned copy_async of bytes", kBytes, bytes);
  auto& groups = copies[simt::current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({shared, global, kBytes, bytes});
}
inline void commit_copies() {
  const simt::InShim in_shim;
  auto& groups = copies[simt::current];  // the last one is being filled
  groups.resize(std::max<size_t>(groups.size(), 1) + 1);
}
template <int kPending>
void wait_for_copies() {
  const simt::InShim in_shim;
  auto& groups = copies[simt::current];
  while (int(groups.size()) - 1 > kPending) {
    run_copies(groups.front());
    groups.erase(groups.begin());
  }
}

inline void prefetch_L2(const void*) {}

inline uint32_t to_tf32(uint32_t bits) { return bits + 0x1000u; }

// Operands are truncated to tf32.
inline void mma(float (&d)[4], const uint32_t (&l)[4], const uint32_t (&r)[2]) {
  const simt::InShim in_shim;
  const unsigned thread = threadIdx.x, lane = thread % 32;
  WarpFragments& all = fragments[thread / 32][products[thread]++ % 2];
  std::memcpy(all.l[lane], l, sizeof l);
  std::memcpy(all.r[lane], r, sizeof r);
  simt::wait(simt::Wait::warp, ~0u, __LINE__, false);
  const auto value = [](uint32_t word) { return bits_float(word & 0xFFFFE000u); };
  for (int i = 0; i < 4; ++i) {
    const int row = int(lane) / 4 + 8 * (i / 2), col = int(lane) % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8; ++k)
      sum += double(value(all.l[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)])) *
             value(all.r[col * 4 + k % 4][k / 4]);
    d[i] = float(sum);
  }
}

}  // namespace relora
