// csrc/merge.cu and merge_streamed.cu, unmodified, on the CPU: a C interface for ctypes.
#include "merge.cu"
#include "merge_streamed.cu"

namespace relora {
namespace {
thread_local uint4 dynamic_shared[simt::kDynamicMost / 16 + 64];
}
}  // namespace relora

extern "C" {

// Returns the cudaError_t; `blocks` receives how many blocks ran.
int simt_merge(void* layers, int count, int weight_dtype, int factor_dtype, int restart_dtype,
               int rounding, int kind, void* table, unsigned order, long* blocks) {
  using namespace relora;
  simt::order = order;
  simt::blocks_run = 0;
  simt::dynamic_shared = reinterpret_cast<unsigned char*>(dynamic_shared);
  simt::dynamic_capacity = sizeof dynamic_shared;
  const int error =
      merge(static_cast<MergeLayer*>(layers), count, DType(weight_dtype), DType(factor_dtype),
            DType(restart_dtype), Rounding(rounding), MergeKind(kind), static_cast<MergeLayer*>(table),
            nullptr);
  *blocks = simt::blocks_run;
  return error;
}
// Unloads all kernels. From now on only `loads` of them can be loaded; negative: any number.
void simt_unload(int loads) {
  simt::loaded.clear();
  simt::loads_left = loads;
}
void simt_multiprocessors(int count) { multiprocessors = count; }
int simt_merge_layer_bytes() { return sizeof(relora::MergeLayer); }
int simt_merge_inline_layers() { return relora::kInlineLayers; }
int simt_merge_counter_bytes() { return relora::kCounterBytes; }
int simt_merge_most_rank() { return relora::kMostRank; }

}  // extern "C"
