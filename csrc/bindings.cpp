// The Python module relora_kernels._C: integers in (pointers, sizes, strides, a stream), launches
// out. The one file that includes pybind11, which takes longer to compile than every kernel.
// Importing it needs neither a GPU nor a driver; the first launch without one raises.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "build_info.h"  // written by cuda_build.py
#include "launch.h"

namespace py = pybind11;

namespace {

using Tensor = std::tuple<uintptr_t, int64_t, int64_t>;  // pointer, strides in elements

relora::Matrix matrix(const Tensor& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

const std::map<std::string, relora::DType> kDTypes = {
    {"float32", relora::DType::f32},
    {"bfloat16", relora::DType::bf16},
    {"float16", relora::DType::fp16},
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

void merge(const Tensor& weight, const Tensor& residual, const Tensor& lora_A, const Tensor& lora_B,
           std::tuple<int64_t, int64_t, int64_t> sizes, const std::string& weight_dtype,
           const std::string& factor_dtype, const std::string& rounding, double scaling,
           uint64_t seed, int64_t first_row, int device, uintptr_t stream) {
  const auto [n, k, r] = sizes;
  const relora::MergeArgs args{matrix(weight),
                               matrix(residual),
                               matrix(lora_A),
                               matrix(lora_B),
                               n,
                               k,
                               r,
                               code(kDTypes, "merge: dtype of weight", weight_dtype),
                               code(kDTypes, "merge: dtype of lora_A and lora_B", factor_dtype),
                               code(kRoundings, "merge: rounding", rounding),
                               float(scaling),
                               seed,
                               first_row};
  if (args.rounding == relora::Rounding::compensated && !args.residual.data && n && k)
    throw py::value_error("merge: rounding='compensated': expected a residual, got none");
  const std::string call = "merge: weight (" + std::to_string(n) + ", " + std::to_string(k) + ") " +
                           weight_dtype + ", r = " + std::to_string(r) + ", " + factor_dtype +
                           " factors, rounding='" + rounding + "', device " +
                           std::to_string(device);
  // The static runtime keeps a current device of its own, apart from torch's.
  check(cudaSetDevice(device), call);
  check(relora::merge(args, reinterpret_cast<cudaStream_t>(stream)), call);
}

// ---- The two-segment product -------------------------------------------------------------------

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

// (pointer to an int64 on the device or 0, threshold of 65536, scale of what is kept)
using Dropout = std::tuple<uintptr_t, uint32_t, double>;

relora::Dropout dropout_of(const Dropout& d) {
  const auto [seed, threshold, keep_scale] = d;
  return {reinterpret_cast<const int64_t*>(seed), threshold, float(keep_scale)};
}

void two_segment(const std::string& kernel, const std::string& form, const Tensor& out,
                 const Tensor& p, const Tensor& b, const Tensor& x, const Tensor& w, uintptr_t bias,
                 std::tuple<int64_t, int64_t, int64_t, int64_t> sizes, const std::string& dtype,
                 const std::string& bias_dtype, double scale, const Dropout& dropout,
                 int slab_steps, int block_n, int cluster, int device, uintptr_t stream) {
  const auto [m, n, k, r] = sizes;
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
                                    cluster};
  const Launcher launcher = code(kTwoSegment, "two_segment: kernel", kernel);
  const std::string call = "two_segment: " + kernel + " " + form + ", m = " + std::to_string(m) +
                           ", n = " + std::to_string(n) + ", k = " + std::to_string(k) +
                           ", r = " + std::to_string(r) + ", " + dtype + ", dropout of " +
                           std::to_string(args.dropout.threshold) + " / 65536, tile of " +
                           std::to_string(block_n) + ", cluster of " + std::to_string(cluster) +
                           ", device " + std::to_string(device);
  check(cudaSetDevice(device), call);
  check(launcher(args, reinterpret_cast<cudaStream_t>(stream)), call);
}

void mask_rows(const Tensor& out, const Tensor& x, std::tuple<int64_t, int64_t> sizes,
               const Dropout& dropout, int device, uintptr_t stream) {
  const auto [m, k] = sizes;
  const std::string call = "mask_rows: x (" + std::to_string(m) + ", " + std::to_string(k) +
                           "), device " + std::to_string(device);
  check(cudaSetDevice(device), call);
  check(relora::mask_rows({matrix(out), matrix(x), m, k, dropout_of(dropout)},
                          reinterpret_cast<cudaStream_t>(stream)),
        call);
}

void sum_slabs(const Tensor& out, const Tensor& in, std::tuple<int64_t, int64_t, int64_t> sizes,
               double scale, const std::string& dtype, int device, uintptr_t stream) {
  const auto [slabs, m, n] = sizes;
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of relora_kernels. Use them through relora_kernels.";
  m.attr("archs") = std::vector<std::string>{RELORA_ARCHS};  // machine code, e.g. "80", "90a"
  m.attr("ptx") = std::vector<std::string>{RELORA_PTX};      // for newer GPUs, at most one
  m.attr("nvcc_version") = RELORA_NVCC_VERSION;
  m.attr("cudart_version") = CUDART_VERSION;  // 1000 * major + 10 * minor
  m.def("driver_version", &driver_version);
  m.def("merge", &merge, py::arg("weight"), py::arg("residual"), py::arg("lora_A"),
        py::arg("lora_B"), py::arg("sizes"), py::arg("weight_dtype"), py::arg("factor_dtype"),
        py::arg("rounding"), py::arg("scaling"), py::arg("seed"), py::arg("first_row"),
        py::arg("device"), py::arg("stream"));
  m.attr("two_segment_kernels") = [] {
    std::vector<std::string> names;
    for (const auto& [name, unused] : kTwoSegment) names.push_back(name);
    return names;
  }();
  m.def("two_segment", &two_segment, py::arg("kernel"), py::arg("form"), py::arg("out"),
        py::arg("p"), py::arg("b"), py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("sizes"),
        py::arg("dtype"), py::arg("bias_dtype"), py::arg("scale"), py::arg("dropout"),
        py::arg("slab_steps"), py::arg("block_n"), py::arg("cluster"), py::arg("device"),
        py::arg("stream"));
  m.def("mask_rows", &mask_rows, py::arg("out"), py::arg("x"), py::arg("sizes"), py::arg("dropout"),
        py::arg("device"), py::arg("stream"));
  m.def("sum_slabs", &sum_slabs, py::arg("out"), py::arg("partial"), py::arg("sizes"),
        py::arg("scale"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
}
