// What csrc/merge_sm90.cu needs of csrc/mma.cuh: it multiplies and copies by ptx.cuh's means, of which
// model.h is the model.
#pragma once

namespace relora {

template <typename T>
T* global_memory(void* p) { return static_cast<T*>(p); }
inline int lane_id() { return int(threadIdx.x) % 32; }

}  // namespace relora
