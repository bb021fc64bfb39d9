// The functions of csrc/numerics.cuh for whole arrays, for ctypes. Compiled without any CUDA header, real or fake.
#include <algorithm>

#include "numerics.cuh"

using namespace relora;

template <typename T>
static void round_all(const float* v, const uint32_t* rand16, int64_t n, uint16_t* out) {
  if (!rand16)
    for (int64_t i = 0; i < n; ++i) out[i] = round_nearest<T>(v[i]).bits;
  for (int64_t i = 0; rand16 && i < n; i += 8) {  // a strip at a time, like the kernels
    Neighbours<float> pairs[4] = {};
    Neighbours<T> rounded[4];
    uint32_t rand[4] = {};
    for (int64_t j = 0; j < std::min<int64_t>(8, n - i); ++j) {
      set_half(pairs[j / 2], j % 2, v[i + j]);
      rand[j / 2] |= rand16[i + j] << (j % 2 * 16);
    }
    pairs_stochastic(pairs, rand, rounded);
    memcpy(out + i, rounded, 2 * std::min<int64_t>(8, n - i));
  }
}

extern "C" {

void widen_bf16(const uint16_t* v, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(bf16{v[i]});
}
void widen_fp16(const uint16_t* v, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(fp16{v[i]});
}
// rand16 null: rounds to nearest.
void round_bf16(const float* v, const uint32_t* rand16, int64_t n, uint16_t* out) {
  round_all<bf16>(v, rand16, n, out);
}
void round_fp16(const float* v, const uint32_t* rand16, int64_t n, uint16_t* out) {
  round_all<fp16>(v, rand16, n, out);
}
// `v` as pairs of fp16, scaled for values up to `largest`; also the scale, and the value of 1.0 in the scaled fp16.
void scale_half(const float* v, int64_t pairs, float largest, float* scale, float* unit,
                uint32_t* out) {
  *scale = half_scale(largest), *unit = half_unit(*scale);
  for (int64_t i = 0; i < pairs; ++i) 
    out[i] = pair_nearest<fp16>({*scale * v[2 * i], *scale * v[2 * i + 1]}).bits;
}
void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  Words words[1];
  memcpy(words, counter, sizeof words);
  philox4x32(words, key[0], key[1]);
  memcpy(out, words, sizeof words);
}
// width 16 or 32: the random bits of elements (row, col), (row, col + 1), ...
void random_bits(uint64_t seed, uint32_t stream, int width, int64_t row, int64_t col, int64_t n,
                 uint32_t* out) {
  const int shared = 128 / width;
  for (int64_t i = 0; i < n; ++i) {
    const Words words = draw(seed, stream, row, (col + i) / shared);
    const int lane = int((col + i) % shared);
    out[i] = width == 16 ? bits16(words, lane) : bits32(words, lane);
  }
}

// Keys of magnitudes. dtype as in launch.h: 0 float32, 1 bfloat16, 2 float16.
void key_values(int dtype, const uint32_t* keys, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = dtype == 0   ? Keys<float>::value(keys[i])
             : dtype == 1 ? Keys<bf16>::value(keys[i])
                          : Keys<fp16>::value(keys[i]);
}
void nearest_keys(int dtype, const float* v, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = dtype == 0   ? Keys<float>::nearest(v[i])
             : dtype == 1 ? Keys<bf16>::nearest(v[i])
                          : Keys<fp16>::nearest(v[i]);
}
uint32_t infinity_key(int dtype) {
  return dtype == 0 ? Keys<float>::infinity : dtype == 1 ? Keys<bf16>::infinity : Keys<fp16>::infinity;
}
uint32_t key_of_32(uint32_t bits) { return magnitude_key(bits); }
uint32_t key_of_16(uint16_t bits) { return magnitude_key(bits); }
int64_t rank_of(int64_t n, double ratio, int64_t float_ranks, float* weight) {
  const Rank rank = quantile_rank(n, {ratio, float_ranks});
  *weight = rank.weight;
  return rank.low;
}
uint32_t threshold_of(int dtype, uint32_t low, uint32_t high, float weight) {
  return dtype == 0   ? threshold_key<float>(low, high, weight)
         : dtype == 1 ? threshold_key<bf16>(low, high, weight)
                      : threshold_key<fp16>(low, high, weight);
}

}  // extern "C"
