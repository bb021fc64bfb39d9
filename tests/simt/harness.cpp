// csrc/merge.cu, as it is, on the CPU: a C interface for ctypes.
#include "merge.cu"

extern "C" {

// Returns the cudaError_t; `blocks` receives how many blocks ran.
int simt_merge(const relora::MergeArgs* args, unsigned order, long* blocks) {
  simt::order = order;
  simt::blocks_run = 0;
  const int error = relora::merge(*args, nullptr);
  *blocks = simt::blocks_run;
  return error;
}

}  // extern "C"
