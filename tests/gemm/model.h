// A host model of everything that csrc/ptx.cuh declares. The kernels' own source runs on it, block by
// block and thread by thread.
//
// Threads are fibers that run until they wait. Asynchronous operations take effect as late or as oddly as the
// hardware allows: a TMA load or store at a random time after its issue; a wgmma usually only when its group is
// waited for, a cp.async half of the time, otherwise at once. Warps advance at random speeds. A stage that is
// overwritten or read too early then holds the wrong numbers. A barrier that never completes is reported as a
// deadlock. Shared memory starts out as NaN, or as large numbers. Swizzle and descriptors are decoded as the PTX ISA
// describes them ("Tensor swizzling modes", "Matrix descriptor format", canonical layouts), not by the kernel's own
// functions.
#define RELORA_PTX_CUH
#pragma once

#include <array>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../fibers.h"
#include "cuda_runtime.h"
#include "numerics.cuh"

namespace model {

constexpr uint32_t kBase = 1024;  // where a block's own shared memory starts
constexpr int kWarp = 32, kWarpgroup = 128;

struct Barrier { int64_t expected, pending, bytes; uint32_t phase; };
struct Rendezvous { int arrived = 0, round = 0; };  // __syncthreads and the like

using Lane = std::array<uint32_t, 6>;  // what a lane shows the others of its warp

struct Warp {
  Rendezvous meeting;
  std::array<Lane, kWarp> lanes[2];
};

struct Block;
struct Thread {
  fibers::Fiber fiber;
  Block* block;
  int index;
  bool done = false;
  std::function<bool()> ready;  // what it waits for; empty: nothing
  int turns = 0;                // to sit out
  std::deque<std::vector<std::function<void()>>> products;  // committed groups of wgmma
  std::vector<std::function<void()>> open_products;
  std::deque<std::vector<std::function<void()>>> copies;  // committed groups of cp.async
  std::vector<std::function<void()>> open_copies;
  std::deque<std::shared_ptr<int>> stores;  // per committed group, how many have not read yet
  std::shared_ptr<int> open_stores;
  bool may_multiply = false;  // has fenced its registers since it last waited for products
  bool unfenced = false;  // wrote shared memory that TMA may not see yet
  std::vector<uint32_t> written;  // 16-bit words that it has written since its last fence
};

struct Block {
  std::vector<uint8_t> memory;
  std::vector<bool> unfenced;  // per 16-bit word: wgmma may not see it yet
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Rendezvous> named;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned rank, index;
  int cluster;
};

struct Machine {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Rendezvous> clusters;
  std::vector<std::function<void()>> in_flight;  // TMA operations, which complete in any order
  int cluster_size = 1;
  std::mt19937 random;
  Thread* current = nullptr;
  std::string error;
  std::function<void()> kernel;
  long loads = 0, stores = 0, wgmmas = 0;
};

inline Machine* machine = nullptr;
inline int processors = 1;
inline unsigned seed = 0;
// What cp.async may read; empty: anything.
inline std::vector<std::pair<uintptr_t, uintptr_t>> readable;

inline void back_to_scheduler() {
  fibers::leave(machine->current->fiber);
}

inline void fail(const std::string& what) {
  if (machine->error.empty()) {
    machine->error = what;
    if (machine->current)
      machine->error += " (block " + std::to_string(machine->current->block->index) + ", thread " +
                        std::to_string(machine->current->index) + ")";
  }
  if (machine->current)
    for (;;) back_to_scheduler();  // which gives up; the fiber is never resumed
}

inline Thread& self() { return *machine->current; }

inline void until(std::function<bool()> ready) {
  if (ready()) return;
  self().ready = std::move(ready);
  back_to_scheduler();
}

// Now and then a single lane falls a few turns behind the others of its warp.
inline void dawdle() {
  if (machine->random() % 32) return;
  self().turns = int(machine->random() % 8);
  back_to_scheduler();
}

inline void meet(Rendezvous& r, int count) {
  const int round = r.round;
  if (++r.arrived == count) r.arrived = 0, ++r.round;
  until([&r, round] { return r.round != round; });
}

// A lockstep exchange of a warp: every lane shows a value, and all lanes see all values. Two alternating
// buffers are enough, because no lane is more than one step ahead of another.
inline const std::array<Lane, kWarp>& exchange(const Lane& shown) {
  Warp& warp = self().block->warps[size_t(self().index / kWarp)];
  auto& lanes = warp.lanes[warp.meeting.round % 2];
  lanes[size_t(self().index % kWarp)] = shown;
  meet(warp.meeting, kWarp);
  return lanes;
}

[[gnu::cold, gnu::noinline]] inline void fail_outside(uint32_t address) {
  fail("shared memory address " + std::to_string(address) + " is outside");
}

inline uint8_t* at(Block& block, uint32_t address, uint32_t bytes) {
  if (address < kBase || address + bytes > kBase + block.memory.size()) fail_outside(address);
  return block.memory.data() + (address - kBase);
}

inline Barrier& barrier(Block& block, uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end())
    fail("no barrier was initialised at " + std::to_string(address));
  return found->second;
}

inline void settle(Barrier& b) {
  if (b.pending < 0) fail("more arrivals than a barrier expects");
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.expected;
}

// Tensor swizzling, 128 bytes: address bits 4-6 are xored with bits 7-9.
inline uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

struct Box { CUtensorMap map; int c[2]; };

inline void check_box(const Box& b, uint32_t address) {
  for (int i = 0; i < 2; ++i)
    if (b.c[i] < 0 || uint64_t(b.c[i]) >= b.map.extent[i])
      fail("a box starts at " + std::to_string(b.c[i]) + " of " + std::to_string(b.map.extent[i]));
  if (b.c[0] % 8) fail("a box starts at " + std::to_string(b.c[0]) + ", not at 16 bytes");
  if (address % 1024) fail("a swizzled box at address " + std::to_string(address));
}

template <typename Move>
void each_element(const Box& b, Block& block, uint32_t address, Move move) {
  for (uint32_t j = 0; j < b.map.box[1]; ++j)
    for (uint32_t i = 0; i < b.map.box[0]; ++i) {
      const uint64_t col = uint64_t(b.c[0]) + i, row = uint64_t(b.c[1]) + j;
      const bool inside = col < b.map.extent[0] && row < b.map.extent[1];
      uint8_t* global =
          inside ? static_cast<uint8_t*>(b.map.data) + row * b.map.pitch + col * 2 : nullptr;
      move(global, at(block, swizzle(address + (j * b.map.box[0] + i) * 2), 2));
    }
}

// ---- The machine -------------------------------------------------------------------------------

inline void fiber_main() {
  machine->kernel();
  Thread& t = self();
  if (!t.products.empty() || !t.open_products.empty()) fail("exits with wgmmas not waited for");
  if (!t.copies.empty() || !t.open_copies.empty()) {
    for (auto& group : t.copies)
      if (!group.empty()) fail("exits with copies not waited for");
  }
  if (!t.stores.empty() || t.open_stores) fail("exits with stores not waited for");
  t.done = true;
  back_to_scheduler();
}

inline void run_in_flight() {
  auto& list = machine->in_flight;
  std::swap(list[machine->random() % list.size()], list.back());
  const auto operation = std::move(list.back());
  list.pop_back();
  machine->current = nullptr;
  operation();
}

inline void run() {
  Machine& m = *machine;
  std::vector<Thread*> threads;
  for (auto& block : m.blocks)
    for (auto& thread : block->threads) threads.push_back(thread.get());
  const unsigned laziness = m.random() % 4;            // how often a warp sits a round out
  const unsigned delay = 1u << (m.random() % 4 * 3);  // of TMA, in turns of warps
  for (size_t left = threads.size(); left > 0;) {
    bool moved = false, sat_out = false;
    const size_t start = m.random() % threads.size() / kWarp * kWarp;
    bool skip = false;
    for (size_t i = 0; i < threads.size(); ++i) {
      Thread& t = *threads[(start + i) % threads.size()];
      if (t.index % kWarp == 0) skip = m.random() % 4 < laziness;
      if (!m.in_flight.empty() && t.index % kWarp == 0 && m.random() % delay == 0) {
        run_in_flight();
        moved = true;
      }
      if (!m.error.empty()) return;
      if (t.done) continue;
      if (t.ready && !t.ready()) continue;
      if (t.turns > 0) {
        --t.turns;
        sat_out = true;
        continue;
      }
      if (skip) {
        sat_out = true;
        continue;
      }
      t.ready = nullptr;
      m.current = &t;
      threadIdx = dim3(unsigned(t.index));
      blockIdx = dim3(t.block->index);
      fibers::enter(t.fiber);
      m.current = nullptr;
      if (!m.error.empty()) return;
      moved = true;
      left -= t.done;
    }
    if (moved || sat_out) continue;
    if (m.in_flight.empty()) return fail("deadlock: no thread can go on");
    run_in_flight();
  }
  while (!m.in_flight.empty() && m.error.empty()) run_in_flight();
}

inline std::string last_error;
inline long counts[3];

inline cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  Machine m;
  machine = &m;
  m.random.seed(seed);
  m.kernel = std::move(kernel);
  if (config.numAttrs) m.cluster_size = int(config.attrs->val.clusterDim.x);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  if (gridDim.x == 0 || gridDim.x % unsigned(m.cluster_size)) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > 232448) return cudaErrorInvalidValue;
  m.clusters.resize(gridDim.x / unsigned(m.cluster_size));
  for (unsigned i = 0; i < gridDim.x; ++i) {
    m.blocks.push_back(std::make_unique<Block>());
    Block& block = *m.blocks.back();
    block.memory.assign(config.dynamicSmemBytes, seed / 2 % 2 ? 0x7F : 0xFF);
    block.unfenced.assign(config.dynamicSmemBytes / 2, false);
    block.warps.resize(blockDim.x / kWarp);
    block.index = i;
    block.rank = i % unsigned(m.cluster_size);
    block.cluster = int(i / unsigned(m.cluster_size));
    for (unsigned j = 0; j < blockDim.x; ++j) {
      block.threads.push_back(std::make_unique<Thread>());
      Thread& t = *block.threads.back();
      t.block = &block;
      t.index = int(j);
      fibers::prepare(t.fiber, 1 << 15, fiber_main);
    }
  }
  run();
  last_error = m.error;
  counts[0] = m.loads, counts[1] = m.stores, counts[2] = m.wgmmas;
  machine = nullptr;
  return last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

// ---- wgmma -------------------------------------------------------------------------------------

struct Descriptor { uint32_t start, leading, stride; };

inline Descriptor decode(uint64_t d) {
  if (d >> 62 != 1 || (d >> 49 & 7) != 0) fail("a descriptor with another swizzle or base offset");
  return {uint32_t(d & 0x3FFF) << 4, uint32_t(d >> 16 & 0x3FFF) << 4,
          uint32_t(d >> 32 & 0x3FFF) << 4};
}

// Element (i, k) of an operand, i along M or N. Canonical layouts for the 128-byte swizzle and 16-bit
// elements: K-major, an atom is 8 rows of 128 bytes, and atoms are `stride` apart; MN-major, an atom is
// 64 elements along i by 8 along k, and atoms are `leading` apart along i and `stride` apart along k.
// The swizzle applies to addresses.
template <typename T>
float element(Block& block, const Descriptor& d, bool mn_major, int i, int k) {
  const uint32_t offset =
      mn_major ? uint32_t(i / 64) * d.leading + uint32_t(k / 8) * d.stride + uint32_t(k % 8) * 128 +
                     uint32_t(i % 64) * 2
               : uint32_t(i / 8) * d.stride + uint32_t(i % 8) * 128 + uint32_t(k) * 2;
  T value;
  const uint32_t address = swizzle(d.start + offset);
  std::memcpy(&value, at(block, address, 2), 2);
  if (block.unfenced[(address - kBase) / 2]) fail("multiplies what a thread wrote and did not fence");
  return relora::to_float(value);
}

}  // namespace model

// ---- The names of ptx.cuh ----------------------------------------------------------------------

inline void __syncthreads() { model::meet(model::self().block->named[0], int(blockDim.x)); }

namespace relora::ptx {

using model::machine;
using model::self;

inline uint32_t shared_memory() { return model::kBase; }
template <typename T>
T* shared_pointer(uint32_t address) {
  model::dawdle();
  if (address % alignof(T)) model::fail("an address in shared memory is not aligned");
  return reinterpret_cast<T*>(model::at(*self().block, address, sizeof(T)));
}
template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}
inline void named_barrier(int id, int threads) { model::meet(self().block->named[id], threads); }
inline uint32_t cluster_rank() { return self().block->rank; }
inline void cluster_sync() {
  model::meet(machine->clusters[size_t(self().block->cluster)],
              machine->cluster_size * int(blockDim.x));
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  if (barrier % 8) model::fail("a barrier at an address that is no multiple of 8");
  model::at(*self().block, barrier, 8);
  self().block->barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void barrier_init_fence() {}
inline void arrive_expect(uint32_t barrier, uint32_t bytes) {
  model::Barrier& b = model::barrier(*self().block, barrier);
  b.bytes += bytes;
  --b.pending;
  model::settle(b);
}
inline void arrive(uint32_t barrier) {
  model::Barrier& b = model::barrier(*self().block, barrier);
  --b.pending;
  model::settle(b);
}
inline void arrive_remote(uint32_t barrier, uint32_t rank) {
  const auto index = size_t(self().block->cluster * machine->cluster_size) + rank;
  model::Block& block = *machine->blocks[index];
  bool alive = false;
  for (auto& thread : block.threads) alive = alive || !thread->done;
  if (!alive) model::fail("arrives at a barrier of a block that has ended");
  model::Barrier& b = model::barrier(block, barrier);
  --b.pending;
  model::settle(b);
}
inline void wait(uint32_t barrier, uint32_t parity) {
  model::Barrier* b = &model::barrier(*self().block, barrier);
  model::until([b, parity] { return b->phase != parity; });
}

inline void load_multicast(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c0, int c1,
                           uint16_t blocks) {
  const model::Box box{*map, {c0, c1}};
  model::check_box(box, to);
  ++machine->loads;
  for (int rank = 0; rank < machine->cluster_size; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    model::Block* block =
        machine->blocks[size_t(self().block->cluster * machine->cluster_size + rank)].get();
    machine->in_flight.push_back([=] {
      model::each_element(box, *block, to, [](const uint8_t* global, uint8_t* shared) {
        const uint8_t zeros[2] = {};
        std::memcpy(shared, global ? global : zeros, 2);
      });
      model::Barrier& b = model::barrier(*block, barrier);
      b.bytes -= box.map.box[0] * box.map.box[1] * 2;
      model::settle(b);
    });
  }
}
inline void load(const CUtensorMap* map, uint32_t to, uint32_t barrier, int c0, int c1) {
  load_multicast(map, to, barrier, c0, c1, uint16_t(1 << self().block->rank));
}
inline void store(const CUtensorMap* map, uint32_t from, int c0, int c1) {
  const model::Box box{*map, {c0, c1}};
  model::check_box(box, from);
  model::Thread* const mine = &self();
  for (auto& t : mine->block->threads)
    if (t->index / model::kWarpgroup == mine->index / model::kWarpgroup && t->unfenced)
      model::fail("stores what a thread wrote and did not fence");
  ++machine->stores;
  if (!mine->open_stores) mine->open_stores = std::make_shared<int>(0);
  model::Block* const block = mine->block;
  const std::shared_ptr<int> open = mine->open_stores;
  ++*open;
  machine->in_flight.push_back([=] {
    model::each_element(box, *block, from, [](uint8_t* global, const uint8_t* shared) {
      if (global) std::memcpy(global, shared, 2);
    });
    --*open;
  });
}
inline void store_commit() {
  self().stores.push_back(self().open_stores ? self().open_stores : std::make_shared<int>(0));
  self().open_stores = nullptr;
}
template <int kPending>
void store_wait_read() {
  auto& groups = self().stores;
  while (groups.size() > size_t(kPending)) {
    model::until([&groups] { return *groups.front() == 0; });
    groups.pop_front();
  }
}
inline void fence_async_shared() {
  model::dawdle();
  self().unfenced = false;
  for (const uint32_t word : self().written) self().block->unfenced[word] = false;
  self().written.clear();
}

inline void wgmma_fence() { self().may_multiply = true; }
inline void wgmma_commit() {
  self().products.push_back(std::move(self().open_products));
  self().open_products.clear();
}
template <int kPending>
void wgmma_wait() {
  self().may_multiply = false;
  auto& groups = self().products;
  while (groups.size() > size_t(kPending)) {
    for (auto& product : groups.front()) product();
    groups.pop_front();
  }
}
template <int kCount> void hold(float (&)[kCount]) {}

// The tensor cores may also be fast: now and then everything issued so far is done at once.
inline void sometimes_done_at_once() {
  if (machine->random() % 8) return;
  for (auto& group : self().products) {
    for (auto& product : group) product();
    group.clear();
  }
  for (auto& product : self().open_products) product();
  self().open_products.clear();
}

// A thread's `count` sums: a's two rows by the columns of `right`.
template <typename T, bool kRightK>
void add_products(float* sums, int count, const std::array<std::array<float, 16>, 2>& a,
                  model::Block& block, int lane, uint64_t right, bool accumulate) {
  const model::Descriptor r = model::decode(right);
  for (int i = 0; i < count; i += i % 2 ? 3 : 1) {
    const int col = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    float b[16];
    for (int k = 0; k < 16; ++k) b[k] = model::element<T>(block, r, !kRightK, col, k);
    for (int half = 0; half < 2; ++half) {
      float sum = accumulate ? sums[i + 2 * half] : 0.f;
      for (size_t k = 0; k < 16; ++k) sum += a[size_t(half)][k] * b[k];
      sums[i + 2 * half] = sum;
    }
  }
}

template <typename T, bool kLeftK, bool kRightK, int kCount>
void wgmma(float (&d)[kCount], uint64_t left, uint64_t right, bool accumulate) {
  float* const sums = d;
  model::Block* const block = self().block;
  const int thread = self().index % model::kWarpgroup, lane = thread % model::kWarp;
  const int row = 16 * (thread / model::kWarp) + lane / 4;
  ++machine->wgmmas;
  if (!self().may_multiply) model::fail("multiplies into registers that no fence has followed");
  self().open_products.push_back([=] {
    const model::Descriptor l = model::decode(left);
    std::array<std::array<float, 16>, 2> a;
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k)
        a[size_t(half)][size_t(k)] = model::element<T>(*block, l, !kLeftK, row + 8 * half, k);
    add_products<T, kRightK>(sums, kCount, a, *block, lane, right, accumulate);
  });
  sometimes_done_at_once();
}

template <typename T, bool kRightK>
void wgmma(float (&d)[32], const uint32_t (&left)[4], uint64_t right, bool accumulate) {
  const std::array<uint32_t, 4> mine{left[0], left[1], left[2], left[3]};
  const auto& all = model::exchange({mine[0], mine[1], mine[2], mine[3]});
  const int lane = self().index % model::kWarp;
  std::array<std::array<float, 16>, 2> a;
  for (size_t half = 0; half < 2; ++half)
    for (size_t k = 0; k < 16; ++k)
      a[half][k] = to_float(T{uint16_t(
          all[size_t(lane / 4 * 4) + k % 8 / 2][k / 8 * 2 + half] >> (k % 2 * 16))});
  float* const sums = d;
  const uint32_t* const registers = left;
  model::Block* const block = self().block;
  ++machine->wgmmas;
  if (!self().may_multiply) model::fail("multiplies into registers that no fence has followed");
  self().open_products.push_back([=] {
    if (std::memcmp(registers, mine.data(), sizeof mine))
      model::fail("writes registers that a product reads");
    add_products<T, kRightK>(sums, 32, a, *block, lane, right, accumulate);
  });
  sometimes_done_at_once();
}

template <typename T>
uint32_t pack(float low, float high) {
  return round_nearest<T>(low).bits | uint32_t(round_nearest<T>(high).bits) << 16;
}
inline void store_matrices(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  const auto& rows = model::exchange({row});
  const int lane = self().index % model::kWarp;
  const uint32_t parts[4] = {m0, m1, m2, m3};
  for (int i = 0; i < 4; ++i) {
    const uint32_t address = rows[size_t(8 * i + lane / 4)][0];
    if (address % 16) model::fail("a row of stmatrix is not aligned");
    std::memcpy(model::at(*self().block, address + uint32_t(lane % 4) * 4, 4), &parts[i], 4);
  }
  self().unfenced = true;
}
template <typename V>
void store_shared(uint32_t address, V v) {
  model::dawdle();
  if (address % sizeof v) model::fail("a store to shared memory is not aligned");
  std::memcpy(model::at(*self().block, address, sizeof v), &v, sizeof v);
  for (uint32_t i = 0; i < sizeof v / 2; ++i) {
    const uint32_t word = (address - model::kBase) / 2 + i;
    self().block->unfenced[word] = true;
    self().written.push_back(word);
  }
}
inline void store_shared_16(uint32_t address, uint16_t bits) { store_shared(address, bits); }
inline void store_shared_32(uint32_t address, uint32_t bits) { store_shared(address, bits); }
inline void store_shared_64(uint32_t address, uint2 v) { store_shared(address, v); }
inline void store_shared_128(uint32_t address, uint4 v) { store_shared(address, v); }
inline uint32_t load_shared_32(uint32_t address) {
  model::dawdle();
  uint32_t bits;
  std::memcpy(&bits, model::at(*self().block, address, 4), 4);
  return bits;
}
inline uint4 load_shared_128(uint32_t address) {
  model::dawdle();
  uint4 v;
  if (address % 16) model::fail("a load of 16 bytes is not aligned");
  std::memcpy(&v, model::at(*self().block, address, 16), 16);
  return v;
}
inline uint16_t load_shared_16(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, model::at(*self().block, address, 2), 2);
  return bits;
}
template <typename T>
const T* further(const T* p, int64_t by) { return p + by; }
inline uint32_t funnel(uint32_t low, uint32_t high, int bits) {
  return uint32_t((uint64_t(high) << 32 | low) >> bits);
}
inline char* rows_further(char* p, int rows, int pitch) { return p + int64_t(rows) * pitch; }
inline uint32_t ballot(bool vote) {
  const auto& lanes = model::exchange({vote});
  uint32_t votes = 0;
  for (uint32_t lane = 0; lane < model::kWarp; ++lane) votes |= lanes[lane][0] << lane;
  return votes;
}
inline void sync_warp() { model::exchange({}); }
inline uint32_t shuffle(uint32_t value, int lane) {
  return model::exchange({value})[size_t(lane)][0];
}

// ---- sm_80 -------------------------------------------------------------------------------------

template <bool kWithNext = false>
void copy_16(uint32_t to, const void* from, int bytes) {
  model::Block* const block = self().block;
  const auto at = reinterpret_cast<uintptr_t>(from);
  if (to % 16 || at % 16) model::fail("a copy that is not aligned");
  bool inside = bytes == 0 || model::readable.empty();
  for (const auto& [begin, end] : model::readable) inside = inside || (at >= begin && at + 16 <= end);
  if (!inside) model::fail("copies from beyond a matrix");
  const auto copy = [=] {
    uint8_t* const shared = model::at(*block, to, 16);
    std::memset(shared, 0, 16);
    std::memcpy(shared, from, size_t(bytes));
  };
  if (machine->random() % 2) copy();
  else self().open_copies.push_back(copy);
}
inline void copy_commit() {
  self().copies.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}
template <int kPending>
void copy_wait() {
  auto& groups = self().copies;
  while (groups.size() > size_t(kPending)) {
    for (auto& copy : groups.front()) copy();
    groups.pop_front();
  }
}

template <bool kTranspose>
void load_matrices(uint32_t (&m)[4], uint32_t row) {
  const auto& rows = model::exchange({row});
  const int lane = self().index % model::kWarp;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int line = kTranspose ? 2 * (lane % 4) + e : lane / 4;
      const int at = kTranspose ? lane / 4 : 2 * (lane % 4) + e;
      const uint32_t address = rows[size_t(8 * i + line)][0];
      if (address % 16) model::fail("a row of ldmatrix is not aligned");
      std::memcpy(&pair[e], model::at(*self().block, address + uint32_t(at) * 2, 2), 2);
    }
    m[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

template <typename T>
void mma(float* d, const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  const auto& all = model::exchange({left[0], left[1], left[2], left[3], right0, right1});
  const auto value = [&](int lane, int reg, int e) {
    return to_float(T{uint16_t(all[size_t(lane)][size_t(reg)] >> (16 * e))});
  };
  const int lane = self().index % model::kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, col = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k)
      d[i] += value(row * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k % 2) *
              value(col * 4 + k % 8 / 2, 4 + k / 8, k % 2);
  }
}

}  // namespace relora::ptx

// ---- The runtime API the launcher uses ---------------------------------------------------------

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* data, const cuuint64_t* extent,
                                       const cuuint64_t* pitch, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  bool ok = rank == 2 && data && reinterpret_cast<uintptr_t>(data) % 16 == 0 && *pitch % 16 == 0 &&
            *pitch < uint64_t(1) << 40 && box[0] * 2 <= 128 && box[0] * 2 % 16 == 0;
  for (int i = 0; i < 2; ++i)
    ok = ok && steps[i] == 1 && box[i] >= 1 && box[i] <= 256 && extent[i] >= 1 &&
         extent[i] <= uint64_t(1) << 32;
  if (!ok) return CUDA_ERROR_INVALID_VALUE;
  *map = {data, {extent[0], extent[1]}, *pitch, {box[0], box[1]}};
  return CUDA_SUCCESS;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = model::processors, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  return model::launch(*config, [&] { kernel(args...); });
}
