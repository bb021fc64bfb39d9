// The part of csrc/mma.cuh that csrc/merge_sm90.cu needs. That kernel multiplies and copies through ptx.cuh, which
// model.h replaces.
#pragma once

namespace relora {

template <typename T>
T* global_memory(void* p) { return static_cast<T*>(p); }
inline int lane_id() { return int(threadIdx.x) % 32; }

}  // namespace relora
