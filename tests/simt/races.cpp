// The detector that races.h describes. It tracks what each thread knows of the others. Times count the events
// that order accesses, from 0; an access has the time of the next such event. If a thread is known up to some
// time, what it did up to then is ordered before what the knowing thread does next.
#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

namespace {

using Time = uint32_t;

// ---- What threads know --------------------------------------------------------------------------

using Times = std::vector<Time>;  // up to when each thread of a block is known
using Blocks = std::map<uint32_t, std::shared_ptr<const Times>>;  // by block number

void add(Blocks& to, uint32_t block, const std::shared_ptr<const Times>& times) {
  auto& known = to[block];
  if (known == times) return;
  if (!known) return void(known = times);
  auto both = std::make_shared<Times>(*known);
  for (size_t i = 0; i < both->size(); ++i) (*both)[i] = std::max((*both)[i], (*times)[i]);
  known = both;
}
void add(Blocks& to, const Blocks& more) {
  if (&to == &more) return;
  for (const auto& [block, times] : more) add(to, block, times);
}

struct Cluster {
  unsigned threads;
  std::vector<Time> arrivals[3];  // at a barrier, by thread; no thread is three barriers ahead of another
};

struct Thread {
  std::array<Time, 32> lanes;  // up to when the lanes of its warp are known
  int in_shim = 1;             // nesting depth in the shim; a thread starts inside it
  unsigned arrivals;           // at barriers of the cluster
  unsigned opened;             // how many of these barriers it knows to be complete
  bool waited;                 // for the previous launch
  bool fenced;                 // since the block's last barrier
  Blocks others;               // what it knows of other blocks
  Blocks seen;                 // through atomics: known from its next fence on
  Blocks published;            // by its last fence, including its own block
};

struct Block {
  uint32_t number;
  std::shared_ptr<Cluster> cluster;
  unsigned rank;
  const char *shared, *shared_at;  // its shared memory, and where it is while the block is switched in
  size_t shared_bytes;
  std::vector<Thread> threads;
  Time barrier;  // time of the last one
  bool waited;
  unsigned opened;
  Blocks others, seen, published;
};

// A block's place in its cluster. Kept by block number, for ended blocks too.
struct Place {
  std::shared_ptr<Cluster> cluster;
  unsigned rank;
};

struct Interval { Time from, upto; };  // (from, upto]

Time now;
bool watching;
unsigned threads_a_block;
std::vector<Block> slots;
std::vector<Place> places;
std::map<unsigned, std::shared_ptr<Cluster>> clusters;
Block* inside;
Thread* current;
unsigned current_index;
const char *stack_begin, *stack_end, *program_begin, *program_end;

// Launches.
Time known_to_all;  // up to here everything is known to each thread of the current launch
bool kernel_before, waited_in_launch;  // the stream's last operation was a kernel; a thread of this launch has waited
Time launch_begin;
std::vector<Interval> known_when_waited;  // known to a thread that has waited for the previous launch

std::map<const char*, Blocks> carried;  // what the atomics at an address pass on

// ---- Accesses -----------------------------------------------------------------------------------

enum Kind : uint8_t { kRead, kWrite, kAtomic };

struct Access {
  Time time;
  uint32_t block;
  uint32_t code;  // offset in the program
  uint16_t thread;
  uint8_t bytes;  // of the word, one bit each
  Kind kind;
};
constexpr int kKept = 4;
struct Word {
  Access kept[kKept];
  uint8_t count;
};
constexpr uintptr_t kPageBytes = 4096;
struct Page {
  bool used = false;
  Word words[kPageBytes / 4];
};
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page_number = ~uintptr_t(0);
Page* last_page;

Page& page_of(uintptr_t at) {
  const uintptr_t number = at / kPageBytes;
  if (number != last_page_number) {
    auto& page = pages[number];
    if (!page) page.reset(new Page);
    last_page_number = number, last_page = page.get();
  }
  if (!last_page->used) {
    std::memset(last_page->words, 0, sizeof last_page->words);
    last_page->used = true;
  }
  return *last_page;
}

void forget(uintptr_t at, size_t bytes) {
  for (const uintptr_t end = at + bytes; at < end;) {
    const uintptr_t next = std::min((at / kPageBytes + 1) * kPageBytes, end);
    const auto page = pages.find(at / kPageBytes);
    if (page != pages.end() && page->second->used) {
      if (next - at == kPageBytes) page->second->used = false;
      else std::memset(&page->second->words[at % kPageBytes / 4], 0, (next - at + 3) / 4 * sizeof(Word));
    }
    at = next;
  }
}

void forget_all() {
  pages.clear();
  last_page_number = ~uintptr_t(0);
}

bool knows(const Access& a) {
  if (a.time <= known_to_all) return true;
  if (current->waited || inside->waited)
    for (const Interval& i : known_when_waited)
      if (i.from < a.time && a.time <= i.upto) return true;
  if (a.block == inside->number) {
    if (a.time <= inside->barrier || a.thread == current_index) return true;
    if (a.thread / 32 == current_index / 32 && a.time <= current->lanes[a.thread % 32]) return true;
  }
  const Place& place = places[a.block];
  const unsigned opened = std::max(current->opened, inside->opened);
  if (opened && place.cluster == inside->cluster &&
      a.time <= place.cluster->arrivals[(opened - 1) % 3][place.rank * threads_a_block + a.thread])
    return true;
  for (const Blocks* others : {&current->others, &inside->others}) {
    const auto known = others->find(a.block);
    if (known != others->end() && a.time <= (*known->second)[a.thread]) return true;
  }
  return false;
}

uint32_t code_of(const void* returns_to) { return uint32_t(static_cast<const char*>(returns_to) - program_begin); }

void say_where(uint32_t code) {
  Dl_info info;
  if (!dladdr(program_begin + code, &info)) return;
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -Cfips -e '%s' %#x >&2", info.dli_fname, code - 1);
  if (std::system(command)) std::fprintf(stderr, "at %s + %#x\n", info.dli_fname, code);
}

const char* verb(const Access& a) {
  return a.kind == kRead ? "reads" : a.kind == kWrite ? "writes" : "changes by an atomic";
}
[[noreturn]] void say_who(const Access& first) {
  std::fprintf(stderr, "thread %u of block %u %s, in no order with it\n", first.thread, first.block, verb(first));
  say_where(first.code);
  std::abort();
}
[[noreturn]] void die(const Access& first, const Access& second) {
  std::fprintf(stderr, "simt: race: thread %u of block %u %s\n", second.thread, second.block, verb(second));
  say_where(second.code);
  std::fprintf(stderr, "what ");
  say_who(first);
}

// Whether any access that races with `a` also races with the later access `b`.
bool covers(const Access& b, const Access& a) {
  return (a.bytes & ~b.bytes) == 0 && (b.kind == kWrite || b.kind == a.kind);
}

void meet(Word& word, const Access& mine) {
  int kept = 0;
  for (int i = 0; i < word.count; ++i) {
    const Access& other = word.kept[i];
    const bool ordered = knows(other);
    if (!ordered && (other.bytes & mine.bytes) && other.kind + mine.kind != 2 * kRead &&
        !(other.kind == kAtomic && mine.kind == kAtomic))
      die(other, mine);
    // An atomic follows the earlier atomics at its address, and whatever follows it follows them, too.
    if ((ordered || other.kind == kAtomic) && covers(mine, other)) continue;
    word.kept[kept++] = other;
  }
  // If the word is full, one access is evicted: a read or atomic of the same kind if there is any, else each in turn.
  if (kept == kKept) {
    static unsigned turn = 0;
    kept = int(++turn % kKept);
    for (int i = 0; i < kKept; ++i)
      if (word.kept[i].kind == mine.kind && word.kept[i].kind != kWrite) kept = i;
    word.kept[kept] = mine;
    word.count = kKept;
    return;
  }
  word.kept[kept] = mine;
  word.count = uint8_t(kept + 1);
}

void nothing_carried(const char* at, size_t bytes) {
  if (!carried.empty()) carried.erase(carried.lower_bound(at), carried.lower_bound(at + bytes));
}

// Maps a block's shared memory to the same address whether or not the block is switched in.
const char* address_of(const void* where) {
  const char* const at = static_cast<const char*>(where);
  const size_t offset = size_t(at - inside->shared_at);
  return offset < inside->shared_bytes ? inside->shared + offset : at;
}

void access(const void* where, size_t bytes, Kind kind, const void* code) {
  const char* at = static_cast<const char*>(where);
  if ((stack_begin <= at && at < stack_end) || (program_begin <= at && at < program_end)) return;
  at = address_of(at);
  if (kind == kWrite) nothing_carried(at, bytes);
  Access mine{now, inside->number, code_of(code), uint16_t(current_index), 0, kind};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(at), end = begin + bytes;
  for (uintptr_t word = begin & ~uintptr_t(3); word < end; word += 4) {
    const unsigned first = word < begin ? begin - word : 0, last = std::min(end - word, uintptr_t(4));
    mine.bytes = uint8_t((1u << last) - (1u << first));
    meet(page_of(word).words[word % kPageBytes / 4], mine);
  }
}

}  // namespace

namespace simt {

void Races::launch(unsigned threads, bool follows, const void* begin, const void* end) {
  program_begin = static_cast<const char*>(begin), program_end = static_cast<const char*>(end);
  if (follows && kernel_before) {
    std::vector<Interval> known{{launch_begin, now}};
    if (waited_in_launch) known.insert(known.end(), known_when_waited.begin(), known_when_waited.end());
    known_when_waited = known;
  } else {
    known_to_all = now;
    known_when_waited.clear();
    forget_all();
    carried.clear();
    places.clear();
  }
  launch_begin = now++;
  kernel_before = true;
  waited_in_launch = false;
  threads_a_block = threads;
  clusters.clear();
  inside = nullptr;
}

void Races::host_write() { kernel_before = false; }

void Races::start_block(unsigned slot, unsigned cluster, unsigned rank, unsigned blocks, const void* shared,
                        size_t bytes) {
  const Block* const before = inside;
  const size_t index = before ? size_t(before - slots.data()) : 0;
  if (slots.size() <= slot) slots.resize(slot + 1);
  if (before) inside = &slots[index];
  auto& of = clusters[cluster];
  if (!of) {
    of = std::make_shared<Cluster>();
    of->threads = blocks * threads_a_block;
    for (auto& arrivals : of->arrivals) arrivals.assign(of->threads, 0);
  }
  Block& block = slots[slot];
  block = Block{};
  block.number = uint32_t(places.size());
  block.cluster = of;
  block.rank = rank;
  block.shared = block.shared_at = static_cast<const char*>(shared);
  block.shared_bytes = bytes;
  block.threads.assign(threads_a_block, Thread{});
  places.push_back({of, rank});
  forget(reinterpret_cast<uintptr_t>(shared), bytes);
  nothing_carried(static_cast<const char*>(shared), bytes);
}

void Races::move_in(unsigned slot, const void* at) {
  if (inside) inside->shared_at = inside->shared;
  inside = &slots[slot];
  inside->shared_at = static_cast<const char*>(at);
}

// Accesses of other blocks to the block's shared memory must be ordered before its end.
void Races::end_block(unsigned slot) {
  Block& block = slots[slot];
  if (block.cluster->threads == block.threads.size()) return;
  const auto anyone_knows = [&](const Access& a) {
    for (current_index = 0; current_index < threads_a_block; ++current_index) {
      current = &block.threads[current_index];
      if (knows(a)) return true;
    }
    return false;
  };
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block.shared), end = begin + block.shared_bytes;
  for (uintptr_t at = begin; at < end; at += 4) {
    const auto page = pages.find(at / kPageBytes);
    if (page == pages.end() || !page->second->used) {
      at |= kPageBytes - 4;
      continue;
    }
    const Word& word = page->second->words[at % kPageBytes / 4];
    for (int i = 0; i < word.count; ++i)
      if (word.kept[i].block != block.number && !anyone_knows(word.kept[i])) {
        std::fprintf(stderr, "simt: race: block %u ends, whose shared memory\n", block.number);
        say_who(word.kept[i]);
      }
  }
}

void Races::run(unsigned slot, unsigned thread, const void* stack, size_t bytes) {
  inside = &slots[slot];
  current_index = thread;
  current = &inside->threads[thread];
  stack_begin = static_cast<const char*>(stack), stack_end = stack_begin + bytes;
}

void Races::shim(int by) { watching = (current->in_shim += by) == 0; }

void Races::block_barrier() {
  Block& block = *inside;
  for (Thread& thread : block.threads) {
    if (thread.fenced) add(block.published, thread.published);
    thread.fenced = false, thread.published.clear();
    block.waited = block.waited || thread.waited;
    block.opened = std::max(block.opened, thread.opened);
    add(block.others, thread.others);
    add(block.seen, thread.seen);
    thread.others.clear(), thread.seen.clear();
  }
  block.barrier = now++;
}

void Races::warp_barrier(unsigned first, unsigned mask) {
  Thread* const warp = &inside->threads[first];
  Thread all{};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& thread = warp[lane];
    for (unsigned i = 0; i < 32; ++i) all.lanes[i] = std::max(all.lanes[i], thread.lanes[i]);
    all.lanes[lane] = now;
    all.opened = std::max(all.opened, thread.opened);
    all.waited = all.waited || thread.waited;
    add(all.others, thread.others);
    add(all.seen, thread.seen);
    if (!thread.fenced) continue;
    add(all.published, thread.published);
    all.fenced = true;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = warp[lane];
    all.in_shim = thread.in_shim, all.arrivals = thread.arrivals;
    thread = all;
  }
  ++now;
}

// This does not pass on what is known of other blocks: kernels with clusters do not need it.
void Races::cluster_arrive() {
  Cluster& cluster = *inside->cluster;
  cluster.arrivals[current->arrivals++ % 3][inside->rank * threads_a_block + current_index] = now++;
}

void Races::cluster_open(unsigned thread) {
  Thread& its = inside->threads[thread];
  its.opened = its.arrivals;
}

[[gnu::noinline]] void Races::map_in_cluster(unsigned rank) {
  if (rank == inside->rank || current->opened || inside->opened) return;
  std::fprintf(stderr, "simt: race: thread %u of block %u looks into a block that may not have begun\n",
               current_index, inside->number);
  say_where(code_of(__builtin_return_address(0)));
  std::abort();
}

void Races::fence() {
  Thread& thread = *current;
  add(thread.others, thread.seen);
  add(thread.others, inside->seen);
  auto times = std::make_shared<Times>(threads_a_block, inside->barrier);
  for (unsigned i = current_index / 32 * 32; i < std::min(threads_a_block, current_index / 32 * 32 + 32); ++i)
    (*times)[i] = std::max(inside->barrier, thread.lanes[i % 32]);
  (*times)[current_index] = now++;
  thread.published = thread.others;
  add(thread.published, inside->others);
  add(thread.published, inside->number, times);
  thread.fenced = true;
}

void Races::wait_for_previous() { current->waited = waited_in_launch = true; }

[[gnu::noinline]] void Races::atomic(const void* at, size_t bytes) {
  ::access(at, bytes, kAtomic, __builtin_return_address(0));
  const char* const where = address_of(at);
  const auto found = carried.find(where);
  if (found == carried.end() && !current->fenced && inside->published.empty()) return;
  Blocks& of_address = found == carried.end() ? carried[where] : found->second;
  add(current->seen, of_address);
  add(of_address, inside->published);
  if (current->fenced) add(of_address, current->published);
}

[[gnu::noinline]] void Races::access(const void* at, size_t bytes, bool write) {
  ::access(at, bytes, write ? kWrite : kRead, __builtin_return_address(0));
}

}  // namespace simt

// ---- What the compiler calls --------------------------------------------------------------------

#define SIMT_HOOK(name, bytes, kind)                                            \
  void name(const void* at) {                                                  \
    if (watching) access(at, bytes, kind, __builtin_return_address(0));        \
  }
#define SIMT_HOOKS(bytes)                                                       \
  SIMT_HOOK(__tsan_read##bytes, bytes, kRead)                                  \
  SIMT_HOOK(__tsan_write##bytes, bytes, kWrite)                                \
  SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, kRead)                        \
  SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, kWrite)

extern "C" {
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(const void* at, size_t bytes) {
  if (watching) access(at, bytes, kRead, __builtin_return_address(0));
}
void __tsan_write_range(const void* at, size_t bytes) {
  if (watching) access(at, bytes, kWrite, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
