// Numbers, for the device and for the host: random bits keyed by logical element, bf16 and fp16
// conversions, round-to-nearest-even and stochastic rounding, magnitude keys, quantiles. Needs no
// CUDA header, so the tests compile it with the host compiler and go through every 16-bit pattern.
//
// The contract is relora_kernels/reference/philox.py's: the same bits for the same element.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RELORA_HD __host__ __device__ __forceinline__
#else
#define RELORA_HD inline
#endif

namespace relora {

RELORA_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Storage only: 16 bits, with types of their own for overloads.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

RELORA_HD uint32_t float_bits(float v) {
  uint32_t b;
  memcpy(&b, &v, sizeof b);
  return b;
}

RELORA_HD float bits_float(uint32_t b) {
  float v;
  memcpy(&v, &b, sizeof v);
  return v;
}

// ---- Random bits -------------------------------------------------------------------------------

constexpr uint32_t kStreamRound = 0;    // stochastic rounding at a merge, bits16
constexpr uint32_t kStreamDropout = 1;  // dropout on the low-rank branch, bits16
constexpr uint32_t kStreamInit = 2;     // the draw of A, bits32
constexpr uint32_t kStreamPrune = 3;    // random pruning, bits32

struct Words { uint32_t w[4]; };

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. In place, kMany
// counters at a time: they are independent of each other and share the rounds' keys.
template <int kMany>
RELORA_HD void philox4x32(Words (&counters)[kMany], uint32_t key0, uint32_t key1) {
#ifdef __CUDACC__  // with one counter fully unrolled, a lane's draws would overlap and kernels spill
#pragma unroll kMany > 1 ? 10 : 2
#endif
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kMany; ++i) {
      const uint32_t(&c)[4] = counters[i].w;
      const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
      counters[i] = {{uint32_t(p1 >> 32) ^ c[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ key1,
                      uint32_t(p0)}};
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The four words shared by one row's columns [E * block, E * block + E): E = 8 for bits16, 4 for
// bits32. words[i] is for block + i * further.
template <int kMany>
RELORA_HD void draw(Words (&words)[kMany], uint64_t seed, uint32_t stream, int64_t row, int64_t block,
                    int further) {
  for (int i = 0; i < kMany; ++i)
    words[i] = {{uint32_t(block + i * further), uint32_t(row), stream, 0u}};
  philox4x32(words, uint32_t(seed), uint32_t(seed >> 32));
}
RELORA_HD Words draw(uint64_t seed, uint32_t stream, int64_t row, int64_t block) {
  Words words[1];
  draw(words, seed, stream, row, block, 0);
  return words[0];
}

// Column `lane` (mod 8 or mod 4) of a draw. In kernels `lane` is a constant after unrolling: an
// index known only at run time would push the words from registers to local memory.
RELORA_HD uint32_t bits16(const Words& words, int lane) {
  return (words.w[lane >> 1] >> (16 * (lane & 1))) & 0xFFFFu;
}
RELORA_HD uint32_t bits32(const Words& words, int lane) { return words.w[lane]; }

// U(-bound, bound) for step = fl32(bound * 2^-23): 24 bits, one rounding.
RELORA_HD float uniform(uint32_t word, float step) {
  return float(int32_t(word >> 8) - (1 << 23)) * step;
}

// ---- To fp32: exact ----------------------------------------------------------------------------

RELORA_HD float to_float(float v) { return v; }
RELORA_HD float to_float(bf16 v) { return bits_float(uint32_t(v.bits) << 16); }
RELORA_HD float to_float(fp16 v) {
#ifdef __CUDA_ARCH__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, mag = v.bits & 0x7FFFu;
  if (mag >= 0x7C00u) return bits_float(sign | 0x7F800000u | (mag << 13));  // inf, NaN
  if (mag >= 0x0400u) return bits_float(sign | ((mag << 13) + (112u << 23)));
  return bits_float(sign | float_bits(float(mag) * 0x1p-24f));  // subnormal
#endif
}

// ---- From fp32, to nearest even ----------------------------------------------------------------

template <typename T>
RELORA_HD T round_nearest(float v);

template <>
RELORA_HD float round_nearest<float>(float v) { return v; }

template <>
RELORA_HD bf16 round_nearest<bf16>(float v) {
#ifdef __CUDA_ARCH__
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
#else
  const uint32_t b = float_bits(v);
  if ((b & 0x7FFFFFFFu) > 0x7F800000u) return {uint16_t((b >> 16) | 0x0040u)};  // NaN stays NaN
  return {uint16_t((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16)};
#endif
}

template <>
RELORA_HD fp16 round_nearest<fp16>(float v) {
#ifdef __CUDA_ARCH__
  fp16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
#else
  const uint32_t sign = (float_bits(v) >> 16) & 0x8000u, mag = float_bits(v) & 0x7FFFFFFFu;
  if (mag > 0x7F800000u) return {uint16_t(sign | 0x7E00u)};   // NaN stays NaN
  if (mag >= 0x477FF000u) return {uint16_t(sign | 0x7C00u)};  // from 65520 on: infinity
  if (mag < 0x38800000u)  // below 2^-14 the unit is 2^-24, which is the fp32 unit just above 0.5
    return {uint16_t(sign | (float_bits(bits_float(mag) + 0.5f) - float_bits(0.5f)))};
  return {uint16_t(sign | ((mag - (112u << 23) + 0xFFFu + ((mag >> 13) & 1u)) >> 13))};
#endif
}

// ---- fp32 as fp16 times a power of two ----------------------------------------------------------
// fp16 has tf32's mantissa and twice its speed, but only five bits of exponent. That is enough for
// numbers that are summed with each other, once a power of two has brought the largest near the top:
// numbers of at least 2^-28 of it keep 11 bits, smaller ones have an error of up to 2^-39 of it.

// The power of two that brings `largest` >= 0 into [2^14, 2^15), limited so that it and its inverse
// are normal numbers. For an infinity, one that keeps the finite numbers beside it finite.
RELORA_HD float half_scale(float largest) {
  const uint32_t exponent = float_bits(largest) >> 23, scale = 268u - exponent;
  return bits_float((scale < 253u ? scale : 253u) << 23);
}
RELORA_HD float half_unit(float scale) { return bits_float((254u << 23) - float_bits(scale)); }

// ---- From fp32, stochastically: up with probability (v - lower) / (upper - lower) --------------
// `rand16` holds 16 random bits. Infinity, NaN and values above the type's largest round to
// nearest; representable values stay as they are.

template <typename T>
RELORA_HD T round_stochastic(float v, uint32_t rand16);

template <>
RELORA_HD bf16 round_stochastic<bf16>(float v, uint32_t rand16) {
  const uint32_t b = float_bits(v);
  if ((b & 0x7FFFFFFFu) > 0x7F7F0000u) return round_nearest<bf16>(v);
  return {uint16_t((b + rand16) >> 16)};
}

// Rounds v in [0, 2^32) up to a whole number.
RELORA_HD uint32_t round_up(float v) {
#ifdef __CUDA_ARCH__
  return __float2uint_ru(v);
#else
  return uint32_t(std::ceil(v));
#endif
}

template <>
RELORA_HD fp16 round_stochastic<fp16>(float v, uint32_t rand16) {
  const uint32_t sign = (float_bits(v) >> 16) & 0x8000u, mag = float_bits(v) & 0x7FFFFFFFu;
  const bool subnormal = mag < 0x38800000u, in_range = mag <= 0x477FE000u;  // 2^-14, 65504
  // Computes all three results: a branch per element costs the merge more.
  const fp16 nearest = round_nearest<fp16>(v);
  const uint32_t normal = mag - (112u << 23) + (rand16 >> 3);  // fp16 drops 13 bits of fp32's 23
  const uint32_t fixed = round_up(bits_float(subnormal ? mag : 0u) * 0x1p40f);  // 2^-24 is 2^16
  const uint32_t drawn = subnormal ? (fixed + 0xFFFFu - rand16) >> 16 : normal >> 13;
  return in_range ? fp16{uint16_t(sign | drawn)} : nearest;
}

// ---- Two neighbours at a time -------------------------------------------------------------------
// As they lie in memory: two elements of a 16-bit type are one word, the first in its lower half.

template <typename T>
struct Neighbours { uint32_t bits; };
template <>
struct Neighbours<float> { float first, second; };

// set_half sets one element of a pair in which it is zero, half_of returns one. `second` is a constant
// after unrolling.
template <typename T>
RELORA_HD void set_half(Neighbours<T>& pair, bool second, T v) {
  pair.bits |= uint32_t(v.bits) << (second ? 16 : 0);
}
RELORA_HD void set_half(Neighbours<float>& pair, bool second, float v) {
  (second ? pair.second : pair.first) = v;
}
template <typename T>
RELORA_HD T half_of(const Neighbours<T>& pair, bool second) {
  return {uint16_t(pair.bits >> (second ? 16 : 0))};
}
RELORA_HD float half_of(const Neighbours<float>& pair, bool second) {
  return second ? pair.second : pair.first;
}

RELORA_HD Neighbours<float> widen(Neighbours<float> v) { return v; }
RELORA_HD Neighbours<float> widen(Neighbours<bf16> v) {
  return {bits_float(v.bits << 16), bits_float(v.bits & 0xFFFF0000u)};
}
RELORA_HD Neighbours<float> widen(Neighbours<fp16> v) {
  return {to_float(fp16{uint16_t(v.bits)}), to_float(fp16{uint16_t(v.bits >> 16)})};
}

template <typename T>
RELORA_HD Neighbours<T> pair_nearest(Neighbours<float> v);
template <>
RELORA_HD Neighbours<float> pair_nearest<float>(Neighbours<float> v) { return v; }
template <>
RELORA_HD Neighbours<bf16> pair_nearest<bf16>(Neighbours<float> v) {
#ifdef __CUDA_ARCH__
  Neighbours<bf16> out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out.bits) : "f"(v.second), "f"(v.first));
  return out;
#else
  return {round_nearest<bf16>(v.first).bits | uint32_t(round_nearest<bf16>(v.second).bits) << 16};
#endif
}
template <>
RELORA_HD Neighbours<fp16> pair_nearest<fp16>(Neighbours<float> v) {
#ifdef __CUDA_ARCH__
  Neighbours<fp16> out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out.bits) : "f"(v.second), "f"(v.first));
  return out;
#else
  return {round_nearest<fp16>(v.first).bits | uint32_t(round_nearest<fp16>(v.second).bits) << 16};
#endif
}

RELORA_HD uint32_t upper_halves(uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
  return __byte_perm(first, second, 0x7632);
#else
  return first >> 16 | (second & 0xFFFF0000u);
#endif
}

// `rand`: 16 random bits for the first in the lower half, for the second in the upper.
template <typename T>
RELORA_HD Neighbours<T> pair_stochastic(Neighbours<float> v, uint32_t rand) {
  return {round_stochastic<T>(v.first, rand & 0xFFFFu).bits |
          uint32_t(round_stochastic<T>(v.second, rand >> 16).bits) << 16};
}

// kMany pairs at a time.
template <typename T, int kMany>
RELORA_HD void pairs_stochastic(const Neighbours<float> (&v)[kMany], const uint32_t (&rand)[kMany],
                                Neighbours<T> (&out)[kMany]) {
  for (int i = 0; i < kMany; ++i) out[i] = pair_stochastic<T>(v[i], rand[i]);
}
// Tests once for all pairs whether any value is out of range, and thus rounds to nearest.
template <int kMany>
RELORA_HD void pairs_stochastic(const Neighbours<float> (&v)[kMany], const uint32_t (&rand)[kMany],
                                Neighbours<bf16> (&out)[kMany]) {
  constexpr float kLargest = 0x1.FEp127f;
  bool in_range = true;
  for (int i = 0; i < kMany; ++i) {
    in_range &= fabsf(v[i].first) <= kLargest;  // false for a NaN
    in_range &= fabsf(v[i].second) <= kLargest;
  }
  for (int i = 0; i < kMany; ++i) {
    const uint32_t first = float_bits(v[i].first) + (rand[i] & 0xFFFFu);
    const uint32_t second = float_bits(v[i].second) + (rand[i] >> 16);
    out[i] = {upper_halves(first, second)};
  }
  if (in_range) return;
  for (int i = 0; i < kMany; ++i) out[i] = pair_stochastic<bf16>(v[i], rand[i]);
}

// ---- Magnitudes and quantiles -------------------------------------------------------------------
// A magnitude's key is its bits without the sign: an unsigned integer that orders as |v| does, with
// infinity above every number and NaN above infinity.

constexpr uint32_t kDropAll = 0xFFFFFFFFu;  // a threshold that no key exceeds

RELORA_HD uint32_t magnitude_key(uint32_t bits) { return bits & 0x7FFFFFFFu; }
RELORA_HD uint32_t magnitude_key(uint16_t bits) { return bits & 0x7FFFu; }

template <typename T>
struct Keys;
template <>
struct Keys<float> {
  static constexpr uint32_t infinity = 0x7F800000u;
  static RELORA_HD float value(uint32_t key) { return bits_float(key); }
  static RELORA_HD uint32_t nearest(float v) { return magnitude_key(float_bits(v)); }
};
template <>
struct Keys<bf16> {
  static constexpr uint32_t infinity = 0x7F80u;
  static RELORA_HD float value(uint32_t key) { return to_float(bf16{uint16_t(key)}); }
  static RELORA_HD uint32_t nearest(float v) { return magnitude_key(round_nearest<bf16>(v).bits); }
};
template <>
struct Keys<fp16> {
  static constexpr uint32_t infinity = 0x7C00u;
  static RELORA_HD float value(uint32_t key) { return to_float(fp16{uint16_t(key)}); }
  static RELORA_HD uint32_t nearest(float v) { return magnitude_key(round_nearest<fp16>(v).bits); }
};

// The quantile lies between order statistics `low` and `low + 1` (from 0), at fraction `weight`.
struct Rank {
  int64_t low;
  float weight;
};

// Products that the compiler may not contract into an fma with the operation that follows.
RELORA_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
RELORA_HD double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Which quantile. The ranks of tensors of up to `float_ranks` elements are computed in float32, others in float64.
struct Quantile {
  double ratio;
  int64_t float_ranks;
};

RELORA_HD Rank quantile_rank(int64_t n, const Quantile& quantile) {
  if (n > quantile.float_ranks) {
    const double rank = product(quantile.ratio, double(n - 1));
    const int64_t low = int64_t(rank) < n - 1 ? int64_t(rank) : n - 1;
    return {low, low < n - 1 ? float(rank - double(low)) : 0.f};
  }
  const float rank = product(float(quantile.ratio), float(n - 1));
  const int64_t low = int64_t(rank) < n - 1 ? int64_t(rank) : n - 1;
  return {low, low < n - 1 ? rank - float(low) : 0.f};
}

// torch.lerp, with the same fused multiply-adds: without them one quantile in fifty differs.
RELORA_HD float interpolate(float a, float b, float weight) {
  return weight < 0.5f ? fmaf(weight, b - a, a) : fmaf(-(b - a), 1.0f - weight, b);
}

// Elements whose keys are at most this are dropped. `low`, `high`: keys of the two order statistics.
template <typename T>
RELORA_HD uint32_t threshold_key(uint32_t low, uint32_t high, float weight) {
  const float threshold =
      interpolate(Keys<T>::value(low), Keys<T>::value(weight == 0.f ? low : high), weight);
  return threshold != threshold ? kDropAll : Keys<T>::nearest(threshold);
}

}  // namespace relora
