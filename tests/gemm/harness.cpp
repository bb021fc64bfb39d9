// The two-segment product on the CPU: a C interface for ctypes. Its unmodified sources are compiled with
// model.h included before them.
#include "model.h"

#include "launch.h"


namespace {

// Returns the cudaError_t. `error` receives what went wrong, `counts` the launch's TMA loads, stores and wgmmas.
template <typename Launch>
int on_model(int processors, unsigned seed, const char** error, long counts[3], Launch launch) {
  model::processors = processors;
  model::seed = seed;
  model::last_error.clear();
  std::fill(model::counts, model::counts + 3, 0);
  const int result = launch();
  *error = model::last_error.c_str();
  std::copy(model::counts, model::counts + 3, counts);
  return result;
}

}  // namespace

#define RELORA_ENTRY(name, Args)                                                         \
  extern "C" int model_##name(const relora::Args* args, int processors, unsigned seed,   \
                              const char** error, long counts[3]) {                      \
    return on_model(processors, seed, error, counts,                                     \
                    [&] { return relora::name(*args, nullptr); });                       \
  }

RELORA_ENTRY(two_segment_sm90, TwoSegmentArgs)
RELORA_ENTRY(two_segment_sm80, TwoSegmentArgs)
RELORA_ENTRY(mask_rows, MaskArgs)
RELORA_ENTRY(sum_slabs, SumArgs)
