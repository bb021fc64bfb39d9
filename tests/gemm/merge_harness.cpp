// csrc/merge_sm90.cu on the CPU: a C interface for ctypes.
#include "model.h"

#include "merge_sm90.cu"

// Returns the cudaError_t. `error` receives what went wrong, `blocks` how many ran.
extern "C" int model_merge(relora::MergeLayer* layers, int count, bool narrow_factors, int rounding,
                           int processors, unsigned seed, const char** error, long* blocks) {
  using namespace relora;
  model::seed = seed;
  model::last_error.clear();
  *error = model::last_error.c_str();
  // A few layers travel as arguments, as in csrc/merge.cu. For odd seeds they do not, to test short tables as well.
  const bool as_arguments = count <= kInlineLayers && seed % 2 == 0;
  uint32_t taken = 0;
  MergeTable table{as_arguments ? nullptr : layers, count, 0, 0, &taken, false, Rounding(rounding), {}};
  MergeKernel merge;
  const cudaError_t planned =
      sm90_merge(layers, count, narrow_factors, Rounding(rounding), processors, table, merge);
  if (as_arguments) std::copy(layers, layers + count, table.first);
  // Copies may begin with the 16 bytes that hold the first element. All of their 16 bytes must be inside, because
  // memcheck counts all of them as read.
  model::readable.clear();
  for (int i = 0; i < count; ++i)
    for (const Matrix& m : {layers[i].weight, layers[i].residual}) {
      const auto begin = reinterpret_cast<uintptr_t>(m.data);
      if (begin && layers[i].n && layers[i].k)
        model::readable.push_back(
            {begin / 16 * 16, begin + 2 * uintptr_t((layers[i].n - 1) * m.row + layers[i].k)});
    }
  *blocks = planned == cudaSuccess ? std::min(table.units, processors) : 0;
  if (*blocks == 0) return planned;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(*blocks));
  config.blockDim = dim3(unsigned(merge.threads));
  config.dynamicSmemBytes = size_t(merge.shared);
  const int result = cudaLaunchKernelEx(&config, merge.kernel, table);
  *error = model::last_error.c_str();
  return result;
}
// Returns how many units `count` layers (n, k) are cut into, or -1. `steps`: per unit of the first and the last layer.
extern "C" int model_units(int64_t n, int64_t k, int count, int processors, int steps[2]) {
  using namespace relora;
  MergeLayer layer{};
  layer.n = n, layer.k = k, layer.r = 128, layer.scaling = 1;
  layer.weight = {nullptr, k, 1};
  std::vector<MergeLayer> layers(size_t(count), layer);
  MergeTable table{};
  MergeKernel merge;
  if (sm90_merge(layers.data(), count, false, Rounding::nearest, processors, table, merge)) return -1;
  steps[0] = int(layers.front().unit_steps), steps[1] = int(layers.back().unit_steps);
  return table.units;
}
extern "C" int model_merge_layer_bytes() { return sizeof(relora::MergeLayer); }
