// The Python module relora_kernels._C: integers in (pointers, sizes, strides, a stream), launches
// out. The only file that includes pybind11, which is slow to compile.
// Importing it needs neither a GPU nor a driver; the first launch without one raises.
#include <pybind11/pybind11.h>

#include <array>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>

#include "build_info.h"  // written by cuda_build.py
#include "launch.h"

namespace py = pybind11;

namespace {

const std::map<std::string, relora::DType> kDTypes = {
    {"float32", relora::DType::f32},
    {"bfloat16", relora::DType::bf16},
    {"float16", relora::DType::fp16},
};
const std::map<std::string, relora::MergeKind> kMergeKinds = {
    {"streamed", relora::MergeKind::streamed},
    {"sm90", relora::MergeKind::sm90},
};
const std::map<std::string, relora::Rounding> kRoundings = {
    {"nearest", relora::Rounding::nearest},
    {"stochastic", relora::Rounding::stochastic},
    {"compensated", relora::Rounding::compensated},
};

template <typename Code>
Code code(const std::map<std::string, Code>& codes, const char* what, const std::string& name) {
  const auto found = codes.find(name);
  if (found != codes.end()) return found->second;
  std::string expected;
  for (const auto& [known, unused] : codes) expected += (expected.empty() ? "" : ", ") + known;
  throw py::value_error(std::string(what) + ": expected " + expected + ", got " + name);
}

void check(cudaError_t error, const std::string& call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch failure must not be reported again by the next caller
  throw std::runtime_error(call + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

// ---- merge.cu: layers as MergeLayers, packed in one writable buffer -----------------------------

void merge(const py::buffer& layers, const std::string& weight_dtype,
           const std::string& factor_dtype, const std::string& restart_dtype,
           const std::string& rounding, uintptr_t table, int device, uintptr_t stream,
           const std::string& kind) {
  const py::buffer_info info = layers.request(true);
  const int64_t bytes = info.size * info.itemsize, each = sizeof(relora::MergeLayer);
  if (info.ndim != 1 || info.strides[0] != info.itemsize || bytes % each)
    throw py::value_error("merge: expected layers of " + std::to_string(each) +
                          " bytes in one contiguous buffer, got " + std::to_string(bytes));
  const auto first = static_cast<relora::MergeLayer*>(info.ptr);
  const auto last = first + bytes / each;
  const auto given = code(kRoundings, "merge: rounding", rounding);
  std::string call = "merge: " + std::to_string(last - first) + " layers, " + weight_dtype +
                     " weight, " + factor_dtype + " factors, rounding='" + rounding +
                     "', device " + std::to_string(device) + ", (out, in, r) =";
  for (auto layer = first; layer != last && layer != first + 3; ++layer)
    call += " (" + std::to_string(layer->n) + ", " + std::to_string(layer->k) + ", " +
            std::to_string(layer->r) + ")";
  if (last - first > 3) call += " ...";
  for (auto layer = first; layer != last; ++layer)
    if (given == relora::Rounding::compensated && !layer->residual.data && layer->n && layer->k)
      throw py::value_error(call + ": rounding='compensated': expected a residual, got none");
  if ((last - first > relora::kInlineLayers || kind == "sm90") && !table)
    throw py::value_error(call + ": expected a table in device memory, got none");
  // The caller's guard restores the thread's current device.
  check(cudaSetDevice(device), call);
  check(relora::merge(first, int(last - first),
                      code(kDTypes, "merge: dtype of weight", weight_dtype),
                      code(kDTypes, "merge: dtype of lora_A and lora_B", factor_dtype),
                      code(kDTypes, "merge: dtype of what restarts", restart_dtype), given,
                      code(kMergeKinds, "merge: kind", kind),
                      reinterpret_cast<relora::MergeLayer*>(table),
                      reinterpret_cast<cudaStream_t>(stream)),
        call);
}

// ---- prune.cu: tensors as rows of seven int64 (PruneTensor) in any buffer -----------------------

std::pair<const relora::PruneTensor*, int64_t> prune_tensors(const py::buffer_info& rows) {
  constexpr int64_t each = sizeof(relora::PruneTensor) / sizeof(int64_t);
  if (rows.itemsize != 8 || rows.ndim != 1 || rows.strides[0] != 8 || rows.size % each)
    throw py::value_error("prune: expected rows of " + std::to_string(each) +
                          " int64 in one contiguous buffer, got " + std::to_string(rows.size) +
                          " items of " + std::to_string(rows.itemsize) + " bytes");
  return {static_cast<const relora::PruneTensor*>(rows.ptr), rows.size / each};
}

template <typename Call>
void on_device(const char* name, int device, Call&& call) {
  check(cudaSetDevice(device), name);
  check(call(), name);
}

int64_t prune_workspace(const py::buffer& rows, int device) {
  const py::buffer_info info = rows.request();
  const auto [tensors, count] = prune_tensors(info);
  int64_t bytes = 0;
  on_device("prune_workspace", device, [&, tensors = tensors, count = count] {
    return relora::prune_workspace(tensors, count, &bytes);
  });
  return bytes;
}

void prune(const py::buffer& rows, double ratio, int64_t float_ranks, uintptr_t workspace, int64_t bytes,
           int device, uintptr_t stream) {
  const py::buffer_info info = rows.request();
  const auto [tensors, count] = prune_tensors(info);
  on_device("prune", device, [&, tensors = tensors, count = count] {
    return relora::prune(tensors, count, ratio, float_ranks, reinterpret_cast<void*>(workspace), bytes,
                         reinterpret_cast<cudaStream_t>(stream));
  });
}

void prune_random(const py::buffer& rows, uint64_t threshold, int device, uintptr_t stream) {
  const py::buffer_info info = rows.request();
  const auto [tensors, count] = prune_tensors(info);
  on_device("prune_random", device, [&, tensors = tensors, count = count] {
    return relora::prune_random(tensors, count, threshold, reinterpret_cast<cudaStream_t>(stream));
  });
}

void magnitude_counts(const py::buffer& rows, uintptr_t prefixes, int shift, int bits,
                      uintptr_t counts, uintptr_t lowest, uintptr_t highest, int device,
                      uintptr_t stream) {
  const py::buffer_info info = rows.request();
  const auto [tensors, count] = prune_tensors(info);
  on_device("magnitude_counts", device, [&, tensors = tensors, count = count] {
    return relora::magnitude_counts(
        tensors, count, reinterpret_cast<const int64_t*>(prefixes), shift, bits,
        reinterpret_cast<int64_t*>(counts), reinterpret_cast<int64_t*>(lowest),
        reinterpret_cast<int64_t*>(highest), reinterpret_cast<cudaStream_t>(stream));
  });
}

// ---- The two-segment product -------------------------------------------------------------------

// Unpacks a tuple of integers. A pybind11 caster per tuple type would be a fifth of this file's compile time.
template <int kCount>
std::array<int64_t, kCount> integers(const py::tuple& t) {
  if (t.size() != kCount)
    throw py::value_error("expected a tuple of " + std::to_string(kCount) + " integers, got " +
                          std::to_string(t.size()));
  std::array<int64_t, kCount> found;
  for (int i = 0; i < kCount; ++i) found[size_t(i)] = t[size_t(i)].cast<int64_t>();
  return found;
}

using Tensor = py::tuple;  // pointer, strides in elements

relora::Matrix matrix(const Tensor& t) {
  const auto [pointer, row, col] = integers<3>(t);
  return {reinterpret_cast<void*>(pointer), row, col};
}

const std::map<std::string, relora::Form> kForms = {
    {"nt", relora::Form::nt},
    {"nn", relora::Form::nn},
    {"tn", relora::Form::tn},
};

using Launcher = cudaError_t (*)(const relora::TwoSegmentArgs&, cudaStream_t);
const std::map<std::string, Launcher> kTwoSegment = {
#if RELORA_SM80
    {"sm80", relora::two_segment_sm80},
#endif
#if RELORA_SM90
    {"sm90", relora::two_segment_sm90},
#endif
};

// (pointer to the int64 seed in device memory or 0, threshold out of 65536, scale of the kept elements)
using Dropout = py::tuple;

relora::Dropout dropout_of(const Dropout& d) {
  if (d.size() != 3) throw py::value_error("dropout: expected (seed, threshold, scale)");
  return {reinterpret_cast<const int64_t*>(d[0].cast<int64_t>()), d[1].cast<uint32_t>(),
          float(d[2].cast<double>())};
}

void two_segment(const std::string& kernel, const std::string& form, const Tensor& out,
                 const Tensor& p, const Tensor& b, const Tensor& x, const Tensor& w, uintptr_t bias,
                 const py::tuple& sizes, const std::string& dtype,
                 const std::string& bias_dtype, double scale, const Dropout& dropout,
                 int slab_steps, int block_n, int cluster, const Tensor& sums, int device,
                 uintptr_t stream) {
  const auto [m, n, k, r] = integers<4>(sizes);
  const relora::TwoSegmentArgs args{code(kForms, "two_segment: form", form),
                                    matrix(out),
                                    matrix(p),
                                    matrix(b),
                                    matrix(x),
                                    matrix(w),
                                    m,
                                    n,
                                    k,
                                    r,
                                    code(kDTypes, "two_segment: dtype", dtype),
                                    float(scale),
                                    {reinterpret_cast<const void*>(bias),
                                     code(kDTypes, "two_segment: dtype of bias", bias_dtype)},
                                    dropout_of(dropout),
                                    slab_steps,
                                    block_n,
                                    cluster,
                                    matrix(sums)};
  const Launcher launcher = code(kTwoSegment, "two_segment: kernel", kernel);
  const std::string call = "two_segment: " + kernel + " " + form + ", m = " + std::to_string(m) +
                           ", n = " + std::to_string(n) + ", k = " + std::to_string(k) +
                           ", r = " + std::to_string(r) + ", " + dtype + ", dropout of " +
                           std::to_string(args.dropout.threshold) + " / 65536, tile of " +
                           std::to_string(block_n) + ", cluster of " + std::to_string(cluster) +
                           (args.sums.data ? ", with x^T p" : "") +
                           ", device " + std::to_string(device);
  check(cudaSetDevice(device), call);
  check(launcher(args, reinterpret_cast<cudaStream_t>(stream)), call);
}

void mask_rows(const Tensor& out, const Tensor& x, const py::tuple& sizes,
               const Dropout& dropout, int device, uintptr_t stream) {
  const auto [m, k] = integers<2>(sizes);
  const std::string call = "mask_rows: x (" + std::to_string(m) + ", " + std::to_string(k) +
                           "), device " + std::to_string(device);
  check(cudaSetDevice(device), call);
  check(relora::mask_rows({matrix(out), matrix(x), m, k, dropout_of(dropout)},
                          reinterpret_cast<cudaStream_t>(stream)),
        call);
}

void sum_slabs(const Tensor& out, const Tensor& in, const py::tuple& sizes,
               double scale, const std::string& dtype, int device, uintptr_t stream) {
  const auto [slabs, m, n] = integers<3>(sizes);
  const std::string call = "sum_slabs: (" + std::to_string(slabs) + ", " + std::to_string(m) +
                           ", " + std::to_string(n) + ") to " + dtype + ", device " +
                           std::to_string(device);
  check(cudaSetDevice(device), call);
  check(relora::sum_slabs({matrix(out), matrix(in), slabs, m, n, float(scale),
                           code(kDTypes, "sum_slabs: dtype", dtype)},
                          reinterpret_cast<cudaStream_t>(stream)),
        call);
}

// CUDA version the driver supports, as 1000 * major + 10 * minor; 0 with no driver.
int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "driver_version");
  return version;
}

py::list names(std::initializer_list<const char*> of) {
  py::list found;
  for (const char* name : of) found.append(name);
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of relora_kernels. Use them through relora_kernels.";
  m.attr("archs") = names({RELORA_ARCHS});  // machine code, e.g. "80", "90a"
  m.attr("ptx") = names({RELORA_PTX});      // for newer GPUs, at most one
  m.attr("nvcc_version") = RELORA_NVCC_VERSION;
  m.attr("sources") = RELORA_SOURCES;         // digest of csrc/
  m.attr("cudart_version") = CUDART_VERSION;  // 1000 * major + 10 * minor
  m.def("driver_version", &driver_version);
  m.attr("merge_layer_bytes") = sizeof(relora::MergeLayer);
  m.attr("merge_inline_layers") = relora::kInlineLayers;
  m.attr("merge_counter_bytes") = relora::kCounterBytes;
  m.attr("merge_most_rank") = relora::kMostRank;
  m.attr("merge_has_sm90") = bool(RELORA_SM90);
  m.def("merge", &merge, py::arg("layers"), py::arg("weight_dtype"), py::arg("factor_dtype"),
        py::arg("restart_dtype"), py::arg("rounding"), py::arg("table"), py::arg("device"),
        py::arg("stream"), py::arg("kind"));
  m.def("prune_workspace", &prune_workspace, py::arg("rows"), py::arg("device"));
  m.def("prune", &prune, py::arg("rows"), py::arg("ratio"), py::arg("float_ranks"), py::arg("workspace"),
        py::arg("bytes"), py::arg("device"), py::arg("stream"));
  m.def("prune_random", &prune_random, py::arg("rows"), py::arg("threshold"), py::arg("device"),
        py::arg("stream"));
  m.def("magnitude_counts", &magnitude_counts, py::arg("rows"), py::arg("prefixes"),
        py::arg("shift"), py::arg("bits"), py::arg("counts"), py::arg("lowest"),
        py::arg("highest"), py::arg("device"), py::arg("stream"));
  py::list kernels;
  for (const auto& [name, unused] : kTwoSegment) kernels.append(name);
  m.attr("two_segment_kernels") = kernels;
  m.def("two_segment", &two_segment, py::arg("kernel"), py::arg("form"), py::arg("out"),
        py::arg("p"), py::arg("b"), py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("sizes"),
        py::arg("dtype"), py::arg("bias_dtype"), py::arg("scale"), py::arg("dropout"),
        py::arg("slab_steps"), py::arg("block_n"), py::arg("cluster"), py::arg("sums"),
        py::arg("device"), py::arg("stream"));
  m.def("mask_rows", &mask_rows, py::arg("out"), py::arg("x"), py::arg("sizes"), py::arg("dropout"),
        py::arg("device"), py::arg("stream"));
  m.def("sum_slabs", &sum_slabs, py::arg("out"), py::arg("partial"), py::arg("sizes"),
        py::arg("scale"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
}
