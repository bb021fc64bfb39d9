// Checks of the schedule and layouts in csrc/two_segment.h, for ctypes. Compiled without any CUDA header, real or fake.
#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "two_segment.h"

using namespace relora::two_segment;
using relora::ceil_div;

static std::string message;

static const char* failed(const std::string& what) {
  message = what;
  return message.c_str();
}

// One producer and `consumers` consumers around a ring of kStages, in a random order. Barriers count
// phases as mbarriers do: a wait for parity p passes once the phase of that parity is over.
template <int kStages>
static const char* turn(int steps, int consumers, unsigned seed) {
  struct Barrier {
    int expected, pending;
    uint32_t phase = 0;
    bool over(uint32_t parity) const { return phase != parity; }
    void arrive() {
      if (--pending == 0) pending = expected, phase ^= 1;
    }
  };
  std::vector<Barrier> full(kStages, {1, 1}), empty(kStages, {consumers, consumers});
  std::vector<int> content(kStages, -1), readers(kStages, 0);
  std::vector<Ring<kStages>> ring(size_t(consumers) + 1);
  std::vector<int> at(size_t(consumers) + 1);
  std::mt19937 random(seed);
  for (int left = (consumers + 1) * steps, idle = 0; left > 0;) {
    const size_t who = random() % at.size();  // 0: the producer
    Ring<kStages>& mine = ring[who];
    const auto stage = size_t(mine.stage);
    const bool producer = who == 0;
    if (at[who] == steps ||
        !(producer ? empty[stage].over(mine.phase ^ 1) : full[stage].over(mine.phase))) {
      if (++idle > 10000 * consumers) return failed("deadlock");
      continue;
    }
    idle = 0;
    if (producer) {
      if (content[stage] >= 0 && readers[stage] != consumers)
        return failed("overwritten before it was read");
      content[stage] = at[who], readers[stage] = 0;
      full[stage].arrive();
    } else {
      if (content[stage] != at[who]) return failed("another step's data");
      ++readers[stage];
      empty[stage].arrive();
    }
    ++at[who], --left;
    mine.advance();
  }
  return nullptr;
}

extern "C" {

// Checks everything that `blocks` blocks compute and read. Returns null, or what is wrong.
const char* walk(int64_t m, int64_t n, int64_t k, int64_t r, int slab_steps, int block_n,
                 int cluster, int blocks) {
  const Steps steps(r, k);
  const Schedule schedule(m, n, steps.total, slab_steps, block_n, cluster);
  const int64_t slabs = ceil_div(steps.total, slab_steps), cols = ceil_div(n, block_n);
  const int64_t rows = ceil_div(m, kBlockM);
  std::vector<int> done(size_t(rows * cols * steps.total));  // by tile and k-step
  for (int block = 0; block < blocks; ++block)
    for (int64_t unit = block / cluster; unit < schedule.units(); unit += blocks / cluster) {
      const Work work = schedule.work(int(unit), block % cluster);
      if (work.row < 0 || work.row % kBlockM || work.col < 0 || work.col >= n || work.col % block_n)
        return failed("a tile at (" + std::to_string(work.row) + ", " + std::to_string(work.col) +
                      ")");
      if (work.row >= m && (cluster == 1 || work.row >= m + kBlockM))
        return failed("rows of nothing but padding, without a partner that needs W");
      if (work.slab >= slabs || work.from >= work.to || work.to > steps.total)
        return failed("an empty slab");
      for (int i = 0; i < block_n; i += kSpan)
        if (box_start(work.col + i, int(n)) >= n || box_start(work.row + i % kBlockM, int(m)) >= m)
          return failed("a box outside");
      for (int s = work.from; s < work.to && work.row < m; ++s)
        ++done[size_t(((work.row / kBlockM) * cols + work.col / block_n) * steps.total + s)];
    }
  for (int count : done)
    if (count != 1) return failed("a k-step of a tile is done " + std::to_string(count) + " times");
  std::vector<int> low(r, 0), base(k, 0);
  for (int s = 0; s < steps.total; ++s) {
    const Step step = steps.at(s);
    auto& segment = step.low ? low : base;
    if (step.k < 0 || size_t(step.k) >= segment.size())
      return failed("a k-step outside its segment");
    for (size_t i = size_t(step.k); i < std::min(segment.size(), size_t(step.k + kBlockK)); ++i)
      ++segment[i];
    if (s && !steps.at(s - 1).low && step.low) return failed("the low-rank segment is not first");
  }
  for (const auto* segment : {&low, &base})
    for (int count : *segment)
      if (count != 1) return failed("a k is multiplied " + std::to_string(count) + " times");
  return nullptr;
}

// Checks both products of a pair as `blocks` blocks compute them: every unit once, slab after slab, and
// in each slab the tiles of x W before the sums.
const char* walk_pair(int64_t m, int64_t n, int64_t k, int slab_steps, int block_n, int cluster,
                      int blocks) {
  const Pair pair(m, n, k, slab_steps, block_n, cluster);
  std::vector<int> done[2] = {std::vector<int>(size_t(pair.across.units())),
                              std::vector<int>(size_t(pair.down.units()))};
  for (int block = 0; block < blocks; block += cluster)
    for (int64_t unit = block / cluster; unit < pair.units(); unit += blocks / cluster) {
      const Pair::Unit at = pair.at(int(unit));
      if (at.unit < 0 || size_t(at.unit) >= done[at.down].size()) return failed("no such unit");
      ++done[at.down][size_t(at.unit)];
    }
  for (const auto& units : done)
    for (int count : units)
      if (count != 1) return failed("a unit is done " + std::to_string(count) + " times");
  int64_t begun = 0;  // rows of x multiplied by W so far, if x W has a single tile of columns
  for (int unit = 0; unit < pair.units(); ++unit) {
    const Pair::Unit at = pair.at(unit);
    const Work work = at.down ? pair.down.work(at.unit, 0) : pair.across.work(at.unit, cluster - 1);
    const int64_t slab = int64_t(slab_steps) * kBlockK;
    if (at.down ? n <= block_n && begun != std::min((work.slab + 1) * slab, ceil_div(m, kBlockM * cluster) * kBlockM * cluster)
                : n <= block_n && work.row != begun + kBlockM * (cluster - 1))
      return failed("not slab by slab");
    if (!at.down) begun += kBlockM * cluster;
    if (at.down && (work.from != work.slab * slab_steps || work.to <= work.from))
      return failed("not the slab's steps");
  }
  return nullptr;
}

const char* turn_ring(int stages, int steps, int consumers, unsigned seed) {
  switch (stages) {
    case 1: return turn<1>(steps, consumers, seed);
    case 2: return turn<2>(steps, consumers, seed);
    case 3: return turn<3>(steps, consumers, seed);
    case 4: return turn<4>(steps, consumers, seed);
    default: return turn<6>(steps, consumers, seed);
  }
}

uint64_t descriptor(int contiguous_k, uint32_t address, int k) {
  return contiguous_k ? operand_descriptor<true>(address, k)
                      : operand_descriptor<false>(address, k);
}

int swizzle(int row, int chunk) { return swizzled(row, chunk); }

// extent[2], pitch, box[2], has_map
void map_of(uintptr_t data, int64_t rows, int64_t cols, int64_t pitch, int box_rows,
            uint64_t out[6]) {
  const MapSpec s = map_spec(reinterpret_cast<void*>(data), rows, cols, pitch, box_rows);
  const uint64_t all[6] = {s.extent[0], s.extent[1], s.pitch, s.box[0], s.box[1], has_map(s)};
  std::copy(all, all + 6, out);
}

// One member of a variant's Layout; `which` is its index in the list below.
int layout(int block_n, int stages, int which) {
  const auto values = [which](auto l) {
    using L = decltype(l);
    const int all[] = {L::bytes, L::left_bytes, L::stage_bytes, L::output, L::buffer_bytes, L::full,
                       L::buffers};
    return all[which];
  };
  return block_n == 256 && stages == 4   ? values(Layout<256, 4>{})
         : block_n == 256 && stages == 3 ? values(Layout<256, 3>{})
                                         : values(Layout<128, 6>{});
}

}  // extern "C"
