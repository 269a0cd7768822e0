// Random words, bf16 numbers and rounding, for native.cpp.
//
// Philox4x32-10: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. Which word belongs to
// which element, and how words round or become normal numbers, is said in philox.py and in updates.Rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hardy {

// A function with a marked loop stays one: copies that GCC makes when it inlines lose the mark and run
// element by element.
#define LOOP __attribute__((noinline))

constexpr int64_t BLOCK = 4096;  // elements worked on at a time
constexpr int64_t SUM_LENGTH = 1024;  // elements that are added up in fp32, in a vector of sums; then in fp64

// ---- Philox -----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 8;
#elif defined(__AVX2__)
constexpr int LANES = 4;
#else
constexpr int LANES = 2;
#endif
typedef uint64_t Lanes __attribute__((vector_size(LANES * 8)));
constexpr uint64_t WORD = 0xffffffffu;
constexpr int64_t COUNTERS_AT_ONCE = 2 * LANES;  // two vectors side by side hide the multiplier's latency
constexpr int64_t WORDS_ROOM = BLOCK + 8 + 4 * COUNTERS_AT_ONCE;  // for a block that begins within a counter

// The product of the low 32 bits of each lane. Compilers do not find this instruction by themselves.
inline Lanes wide_product(const Lanes &a, uint64_t factor) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64((long long)factor));
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x((long long)factor));
#else
  return (a & WORD) * factor;
#endif
}

// Writes the words of counters first ... first + counters - 1, and of up to COUNTERS_AT_ONCE - 1 more.
inline void philox(uint32_t *out, uint64_t first, int64_t counters, uint32_t third, uint32_t fourth,
                   uint64_t key) {
  Lanes count;
  for (int lane = 0; lane < LANES; lane++) count[lane] = uint64_t(lane);
  for (int64_t i = 0; i < counters; i += COUNTERS_AT_ONCE) {
    Lanes c0[2], c1[2], c2[2], c3[2];
    for (int side = 0; side < 2; side++) {
      c0[side] = count + (first + uint64_t(i + side * LANES));
      c1[side] = c0[side] >> 32;
      c2[side] = count * 0 + third;
      c3[side] = count * 0 + fourth;
    }
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; round++) {
      for (int side = 0; side < 2; side++) {
        const Lanes p0 = wide_product(c0[side], 0xD2511F53u), p1 = wide_product(c2[side], 0xCD9E8D57u);
        // c1 and c3 keep their products' high words, which only the last masks below cut.
        c0[side] = (p1 >> 32) ^ c1[side] ^ uint64_t(k0);
        c2[side] = (p0 >> 32) ^ c3[side] ^ uint64_t(k1);
        c1[side] = p1;
        c3[side] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint64_t pairs[2][2 * LANES];
    for (int side = 0; side < 2; side++) {
      const Lanes low = (c0[side] & WORD) | (c1[side] << 32), high = (c2[side] & WORD) | (c3[side] << 32);
      std::memcpy(pairs[0] + side * LANES, &low, sizeof low);
      std::memcpy(pairs[1] + side * LANES, &high, sizeof high);
    }
    for (int lane = 0; lane < 2 * LANES; lane++) {
      std::memcpy(out + 4 * (i + lane), &pairs[0][lane], 8);
      std::memcpy(out + 4 * (i + lane) + 2, &pairs[1][lane], 8);
    }
  }
}

// Returns where in `room` (WORDS_ROOM words) the words of flat indices start ... start + n - 1 begin; n <=
// BLOCK.
inline const uint32_t *words_of(uint32_t *room, uint64_t start, int64_t n, uint32_t third, uint32_t fourth,
                                uint64_t key) {
  const uint64_t first = start / 4;
  philox(room, first, int64_t((start + uint64_t(n) + 3) / 4 - first), third, fourth, key);
  return room + start % 4;
}

// ---- bf16 -------------------------------------------------------------------------------------------------

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float from_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

inline uint16_t nearest_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Random bits below the mantissa, then a cut. An infinity comes through; a NaN could become a number.
inline uint16_t stochastic_bf16(float x, uint32_t word) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + (word >> 16)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// ---- What a task says about its tensors; each member is one word of the table -----------------------------

enum Mode : int64_t { NEAREST = 0, STOCHASTIC = 1, KAHAN = 2 };

struct Grads {
  const void *data;
  int64_t stride, half;  // elements from row to row; whether bf16 rather than fp32
};

struct Weights {
  void *data;
  int64_t stride, half;
  int64_t mode;
  uint64_t key;
  const float *step;
  int64_t base, place_stride;
  uint16_t *rest;
  int64_t rest_stride;
};
static_assert(sizeof(Weights) == 80 && sizeof(Grads) == 24, "words of the table");

// Columns j ... j + n - 1 of row i as fp32: where they lie, or in `room` (BLOCK floats).
inline const float *load(const Grads &grads, int64_t i, int64_t j, int64_t n, float *room) {
  const int64_t at = i * grads.stride + j;
  if (!grads.half) return static_cast<const float *>(grads.data) + at;
  const uint16_t *from = static_cast<const uint16_t *>(grads.data) + at;
  for (int64_t k = 0; k < n; k++) room[k] = from_bf16(from[k]);
  return room;
}

inline float *load(const Weights &weights, int64_t i, int64_t j, int64_t n, float *room) {
  const Grads as_read{weights.data, weights.stride, weights.half};
  return const_cast<float *>(load(as_read, i, j, n, room));
}

inline void store_stochastically(uint16_t *out, const Weights &weights, int64_t i, int64_t j, int64_t n,
                                 const float *values) {
  alignas(64) uint32_t room[WORDS_ROOM];
  const uint64_t start = uint64_t(weights.base + i * weights.place_stride + j);
  const uint32_t *words = words_of(room, start, n, uint32_t(int64_t(*weights.step)), 0, weights.key);
  for (int64_t k = 0; k < n; k++) out[k] = stochastic_bf16(values[k], words[k]);
}

// What does not move keeps its rest too.
inline void store_with_rest(uint16_t *__restrict out, uint16_t *__restrict rest, int64_t n,
                            const float *values) {
  for (int64_t k = 0; k < n; k++) {
    const float wanted = values[k] + from_bf16(rest[k]);
    const uint16_t rounded = nearest_bf16(wanted);
    const bool unchanged = values[k] == from_bf16(out[k]);
    rest[k] = unchanged ? rest[k] : nearest_bf16(wanted - from_bf16(rounded));
    out[k] = unchanged ? out[k] : rounded;
  }
}

// Puts back what `load` gave, after a change.
inline void store(const Weights &weights, int64_t i, int64_t j, int64_t n, const float *values) {
  if (!weights.half) return;
  uint16_t *out = static_cast<uint16_t *>(weights.data) + i * weights.stride + j;
  if (weights.mode == STOCHASTIC) return store_stochastically(out, weights, i, j, n, values);
  if (weights.mode == KAHAN)
    return store_with_rest(out, weights.rest + i * weights.rest_stride + j, n, values);
  for (int64_t k = 0; k < n; k++) out[k] = nearest_bf16(values[k]);
}

// ---- Normal numbers ---------------------------------------------------------------------------------------

// ln u for u = number / 2^24, number odd and below 2^24; 2 atanh of (m - 1) / (m + 1), in fp64 to 1e-11.
inline double log_of_odd(uint32_t number) {
  const uint32_t bits = bits_of(float(int32_t(number)));
  const uint32_t high = (bits & 0x7fffffu) > 0x3504f3u;  // mantissa above sqrt 2
  const int32_t exponent = int32_t(bits >> 23) - 127 - 24 + int32_t(high);
  const double m = from_bits((bits & 0x7fffffu) | ((127u - high) << 23));
  const double s = (m - 1) / (m + 1), z = s * s;
  double tail = 1 / 13.;
  for (int term = 11; term > 0; term -= 2) tail = tail * z + 1. / term;
  return 0.69314718055994530942 * exponent + 2 * s * tail;
}

// Box-Muller: two normal numbers of two words.
inline void normal_pair(uint32_t word0, uint32_t word1, float *out) {
  const double length = std::sqrt(-2 * log_of_odd(2 * (word0 >> 9) + 1));
  const int32_t turns = int32_t(2 * (word1 >> 9) + 1);  // of 2^-24
  const int32_t quarter = (turns + (1 << 21)) >> 22;
  const double a = (turns - quarter * (1 << 22)) * (3.14159265358979323846 / (1 << 23)), z = a * a;
  const double sine =
      a * (1 - z * (1 / 6. - z * (1 / 120. - z * (1 / 5040. - z * (1 / 362880. - z * (1 / 39916800.))))));
  const double cosine =
      1 - z * (.5 - z * (1 / 24. - z * (1 / 720. - z * (1 / 40320. - z * (1 / 3628800. - z / 479001600.)))));
  const double x = quarter & 1 ? -sine : cosine, y = quarter & 1 ? cosine : sine;
  const double sign = quarter & 2 ? -length : length;
  out[0] = float(sign * x);
  out[1] = float(sign * y);
}

}  // namespace hardy
