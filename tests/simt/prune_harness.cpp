// csrc/prune.cu, unmodified, on the CPU: a C interface for ctypes.
#include <cstddef>

#include "prune.cu"

namespace relora {
namespace {
thread_local uint4 dynamic_shared[simt::kDynamicMost / 16 + 64];
}
}  // namespace relora

// Returns what `run` returns; `blocks` receives how many blocks ran.
template <typename Run>
static int in_order(unsigned order, long* blocks, Run&& run) {
  simt::order = order;
  simt::blocks_run = 0;
  simt::dynamic_shared = reinterpret_cast<unsigned char*>(relora::dynamic_shared);
  simt::dynamic_capacity = sizeof relora::dynamic_shared;
  const int error = run();
  *blocks = simt::blocks_run;
  return error;
}

extern "C" {

// For a list's first tensor, after a prune of large tensors: returns whether a window held the quantile or a NaN was
// found. `window` receives the window's first key (if it held, or with 16 bits) and the number of its keys, 0 if there
// was no window.
bool simt_prune_settled(const void* workspace, uint32_t window[2]) {
  const auto& state = static_cast<const relora::Slot*>(workspace)->state;
  static_assert(offsetof(relora::State, settled) == 4 * 12);  // where the GPU tests read it
  window[0] = state.origin, window[1] = state.width;
  return state.settled;
}

long simt_questions() { return simt::questions; }

// cluster: blocks in the largest cluster that fits on the device; 0: no clusters; < 0: it rejects cluster settings.
void simt_device(int multiprocessors_, int cluster) {
  multiprocessors = multiprocessors_;
  simt::most_cluster = cluster;
}

int64_t simt_prune_workspace(const relora::PruneTensor* tensors, int64_t count) {
  int64_t bytes;
  return relora::prune_workspace(tensors, count, &bytes) ? -1 : bytes;
}
int simt_prune(const relora::PruneTensor* tensors, int64_t count, double ratio, int64_t float_ranks,
               void* workspace, int64_t bytes, unsigned order, long* blocks) {
  return in_order(order, blocks, [&] {
    return relora::prune(tensors, count, ratio, float_ranks, workspace, bytes, nullptr);
  });
}
int simt_prune_random(const relora::PruneTensor* tensors, int64_t count, uint64_t threshold,
                      unsigned order, long* blocks) {
  return in_order(order, blocks,
                  [&] { return relora::prune_random(tensors, count, threshold, nullptr); });
}
int simt_magnitude_counts(const relora::PruneTensor* tensors, int64_t count,
                          const int64_t* prefixes, int shift, int bits, int64_t* counts,
                          int64_t* lowest, int64_t* highest, unsigned order, long* blocks) {
  return in_order(order, blocks, [&] {
    return relora::magnitude_counts(tensors, count, prefixes, shift, bits, counts, lowest, highest,
                                    nullptr);
  });
}

}  // extern "C"
