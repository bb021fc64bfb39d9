// csrc/two_segment_sm90.cu, as it is, on the CPU: a C interface for ctypes.
#include "model.h"

#include "two_segment_sm90.cu"

extern "C" {

// Returns the cudaError_t; `error` what went wrong, `counts` TMA loads, stores and wgmmas of the launch.
int model_two_segment_sm90(const relora::TwoSegmentArgs* args, int processors, unsigned seed,
                           const char** error, long counts[3]) {
  model::processors = processors;
  model::seed = seed;
  model::last_error.clear();
  const int result = relora::two_segment_sm90(*args, nullptr);
  *error = model::last_error.c_str();
  std::copy(model::counts, model::counts + 3, counts);
  return result;
}

}  // extern "C"
