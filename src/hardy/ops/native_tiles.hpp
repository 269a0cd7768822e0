// fp32 numbers as pieces for tile instructions (AMX), which take bf16 numbers; for native_tiled_sketch.hpp.
//
// A tile instruction multiplies 16 x 32 by 32 x 16 bf16 numbers and adds to 16 x 16 fp32 sums, some 16
// times as fast as fp32 instructions do. fp32 has 24 bits and bf16 has 8, so a number is three bf16
// numbers, exactly:
//
//     x = h + m + l,   h = x rounded to bf16,   m = x - h rounded to bf16,   l = x - h - m,
//
// and a product is six: l h' + m h' + m m' + h m' + h h' + h l'. What is left out (m l', l m', l l') is
// below 2^-23 of the product, some 2^-26 in the mean and of either sign; rounding a product to fp32 loses
// up to 2^-24. Sums are fp32. A number that bf16 can hold is one piece.
//
// Tile instructions take numbers and products below 2^-126 for 0, so gradients below 2^-100 lose their last
// bits; their squares, which the step needs too, are 0 in fp32. Where a gradient is infinite its sketch is
// NaN.
//
// Letters: K contracted length, C channels, R rank, as in native_apollo.hpp.
#pragma once

#include "native_apollo.hpp"

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && \
    defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__BMI2__)
#define HARDY_TILES

namespace hardy {

constexpr int64_t SIDE = 16, DEPTH = 32;   // channels or ranks of a tile, and its contracted elements
constexpr int64_t BLOCK_TILES = 64;        // of a gradient, worked on at a time: their pieces have 192 KB
constexpr int64_t BASIS_TILES = 256;       // of a projection, worked on with them: 768 KB
constexpr int64_t KEPT = 1 << 17;          // fp32 sums that one thread holds: 512 KB
constexpr int64_t BASIS_BYTES = 24 << 20;  // of a projection's pieces, which all threads share

// 32 bf16 numbers, those of contracted elements t and t + 16 side by side. As a row of a tile they are
// elements t = 0 ... 15 of one channel or rank (left factor), or 16 channels or ranks at one t (right
// factor).
struct alignas(64) Line {
  uint32_t pairs[16];
};
constexpr int64_t PIECES = 3, TILE = SIDE, ROOM = PIECES * TILE;  // TILE and ROOM, of all pieces, in lines

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }

// How a task is cut, by its rank and lengths alone. Rows of a gradient are read in runs of 2 KB (where
// channels are rows) or 1 KB: shorter ones are slow to come, and more rows than 128 push each other out of
// the cache.
struct Cut {
  explicit Cut(const SketchTask &task)
      : tall(!task.by_columns), length(tall ? task.cols : task.rows), channels(tall ? task.rows : task.cols),
        ranks(up(task.rank, SIDE)),
        steps(std::max<int64_t>(1, std::min<int64_t>(tall ? 16 : 4, BASIS_TILES / ranks))),
        group(std::max<int64_t>(2, std::min(BLOCK_TILES / steps, KEPT / (SIDE * SIDE * ranks) / 2 * 2))),
        band(std::max<int64_t>(1, BASIS_BYTES / (64 * ROOM * ranks * steps)) * steps) {}

  const bool tall;  // whether channels are rows
  const int64_t length, channels;
  const int64_t ranks;         // in tiles
  const int64_t steps, group;  // tiles of a block: along K, and of channels; these are an even number
  const int64_t band;          // tiles along K of the projection whose pieces are held at a time
};

// Two vectors as COUNT lines, TILE lines apart. The last piece is cut rather than rounded: that changes no
// number and keeps every NaN.
template <int64_t COUNT>
inline void split(__m512 a, __m512 b, Line *line) {
  const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(int(0xffff0000));
  for (int64_t piece = 0; piece < COUNT; piece++) {
    __m512i top_a = _mm512_castps_si512(a), top_b = _mm512_castps_si512(b);
    if (piece + 1 < COUNT) {
      top_a = _mm512_and_si512(_mm512_add_epi32(top_a, half), high);
      top_b = _mm512_and_si512(_mm512_add_epi32(top_b, half), high);
      a -= _mm512_castsi512_ps(top_a), b -= _mm512_castsi512_ps(top_b);
    }
    // (top_b & high) | (top_a >> 16)
    const __m512i both = _mm512_ternarylogic_epi32(top_b, high, _mm512_srli_epi32(top_a, 16), 0xea);
    _mm512_store_si512(line + piece * TILE, both);
  }
}

inline uint32_t first_lanes(int64_t count) {
  return _bzhi_u32(~0u, uint32_t(std::min<int64_t>(32, std::max<int64_t>(0, count))));
}

// The elements of 16 neighbours in memory that are within; 0 for the others.
template <bool HALF>
inline __m512 load_lanes(const void *data, int64_t at, uint32_t within) {
  if (!HALF) return _mm512_maskz_loadu_ps(__mmask16(within), static_cast<const float *>(data) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(__mmask16(within), static_cast<const uint16_t *>(data) + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Asks for what is wanted a row or two on: the processor itself foresees no jump from row to row.
template <bool HALF>
inline void fetch(const void *data, int64_t at) {
  _mm_prefetch(static_cast<const char *>(data) + at * (HALF ? 2 : 4), _MM_HINT_T0);
}

// A block of a gradient: `count` channels from `begin` on, contracted elements from ... from + DEPTH steps
// - 1; 0 outside of the matrix. Line 0 of a tile's first piece is at ((tile of channels) * steps + step) *
// ROOM. Adds to squares[channel].
template <bool HALF>
LOOP void split_rows(const SketchTask &task, int64_t begin, int64_t count, int64_t from, int64_t steps,
                     Line *to, double *squares) {
  const Grads grads = task.grads;
  for (int64_t c = 0; c < count; c++) {
    Line *line = to + c / SIDE * steps * ROOM + c % SIDE;
    __m512 sum = _mm512_setzero_ps();
    int64_t at = (begin + c) * grads.stride + from, left = begin + c < task.rows ? task.cols - from : 0;
    for (int64_t step = 0; step < steps; step++, line += ROOM, at += DEPTH, left -= DEPTH) {
      fetch<HALF>(grads.data, at + grads.stride), fetch<HALF>(grads.data, at + grads.stride + SIDE);
      const uint32_t within = first_lanes(left);
      const __m512 a = load_lanes<HALF>(grads.data, at, within);
      const __m512 b = load_lanes<HALF>(grads.data, at + SIDE, within >> SIDE);
      split<HALF ? 1 : PIECES>(a, b, line);
      sum += a * a + b * b;
    }
    squares[c] += double(_mm512_reduce_add_ps(sum));
  }
}

template <bool HALF>
LOOP void split_columns(const SketchTask &task, int64_t begin, int64_t count, int64_t from, int64_t steps,
                        Line *to, double *squares) {
  const Grads grads = task.grads;
  const int64_t below = SIDE * grads.stride, left = task.cols - begin;
  for (int64_t step = 0; step < steps; step++) {
    __m512 sums[BLOCK_TILES] = {};
    for (int64_t t = 0; t < SIDE; t++) {
      const int64_t i = from + step * DEPTH + t;
      const int64_t left_a = i < task.rows ? left : 0, left_b = i + SIDE < task.rows ? left : 0;
      Line *line = to + step * ROOM + t;
      for (int64_t c = 0; c < count; c += SIDE, line += steps * ROOM) {
        const int64_t at = i * grads.stride + begin + c, next = at + 2 * grads.stride;
        fetch<HALF>(grads.data, next), fetch<HALF>(grads.data, next + below);
        const __m512 a = load_lanes<HALF>(grads.data, at, first_lanes(left_a - c));
        const __m512 b = load_lanes<HALF>(grads.data, at + below, first_lanes(left_b - c));
        split<HALF ? 1 : PIECES>(a, b, line);
        sums[c / SIDE] += a * a + b * b;
      }
    }
    for (int64_t c = 0; c < count; c++) squares[c] += double(sums[c / SIDE][c % SIDE]);
  }
}

inline void split_grads(const SketchTask &task, int64_t begin, int64_t count, int64_t from, int64_t steps,
                        Line *to, double *squares) {
  const auto work = task.by_columns ? (task.grads.half ? split_columns<true> : split_columns<false>)
                                    : (task.grads.half ? split_rows<true> : split_rows<false>);
  work(task, begin, count, from, steps, to, squares);
}

// The tiles of `steps` steps along K and of all ranks of the projection, in the same order. Returns whether
// one piece of each number is enough.
LOOP inline bool split_projection(const SketchTask &task, const Cut &cut, int64_t from, int64_t steps,
                                  Line *to) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(task.rank)));
  auto along_ranks = [&](int64_t k, int64_t r) {
    const uint32_t within = k < cut.length ? first_lanes(task.rank - r) : 0;
    return load_lanes<false>(task.projection, k * task.rank + r, within);
  };
  auto along_length = [&](int64_t k, int64_t r) {
    const __mmask16 within = __mmask16(r < task.rank ? first_lanes(cut.length - k) : 0);
    const float *values = task.projection + k * task.rank + r;
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), within, rows, values, 4);
  };
  __m512i bits = _mm512_setzero_si512();
  for (int64_t tile = 0; tile < cut.ranks; tile++)
    for (int64_t step = 0; step < steps; step++)
      for (int64_t t = 0; t < SIDE; t++) {
        const int64_t k = from + step * DEPTH, r = tile * SIDE;
        const __m512 a = cut.tall ? along_ranks(k + t, r) : along_length(k, r + t);
        const __m512 b = cut.tall ? along_ranks(k + SIDE + t, r) : along_length(k + SIDE, r + t);
        split<PIECES>(a, b, to + (tile * steps + step) * ROOM + t);
        bits = _mm512_or_si512(bits, _mm512_or_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
      }
  return _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0xffff)) == 0;
}

}  // namespace hardy

#endif
