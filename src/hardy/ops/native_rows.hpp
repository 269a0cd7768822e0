// Numbers of the rows of a stack and weighted sums of them, for native.cpp: fp32, every number read once.
//
// Results depend on sizes alone, never on the number of threads: columns are cut into strips, what strips give
// is added up in their order.
#pragma once

#include "native_threads.hpp"
#include "native_values.hpp"

namespace hardy {

constexpr int64_t STRIP = 1 << 15;  // columns: of the trusted gradient they stay in a core's cache

// Adds the squared norm of a run to `square`, and its product with `g` to `dot` unless there is none.
template <bool WITH_DOT>
LOOP void add_products(const float *__restrict x, const float *__restrict g, int64_t n, double &square,
                       double &dot) {
  for (int64_t at = 0; at < n; at += SUM_LENGTH) {
    const int64_t end = std::min(n, at + SUM_LENGTH);
    float squares = 0, dots = 0;
#pragma omp simd reduction(+ : squares, dots)
    for (int64_t k = at; k < end; k++) {
      squares += x[k] * x[k];
      if (WITH_DOT) dots += x[k] * g[k];
    }
    square += squares;
    if (WITH_DOT) dot += dots;
  }
}

// Writes the squared norms of `count` rows and of `g` to out[0 ... count], and the rows' products with `g`, then
// a zero, behind them; `g` may be null, then those stay zero. 0, or 1 when memory ran out.
inline int row_sums(const float *rows, int64_t count, int64_t stride, int64_t columns, const float *g, double *out,
                    int64_t threads) {
  const int64_t strips = (columns + STRIP - 1) / STRIP, width = 2 * count + 2;
  std::fill(out, out + width, 0.0);
  std::unique_ptr<double[]> found(new (std::nothrow) double[size_t(strips * width)]());
  if (!found) return 1;
  threads = std::min(threads, 1 + count * columns / WORTH_A_THREAD);
  if (!run_pieces(strips, threads, [&](int64_t strip) {
        const int64_t begin = strip * STRIP, n = std::min(STRIP, columns - begin);
        double *own = found.get() + strip * width, none = 0;
        for (int64_t row = 0; row < count; row++) {
          const float *x = rows + row * stride + begin;
          if (g) add_products<true>(x, g + begin, n, own[row], own[count + 1 + row]);
          else add_products<false>(x, x, n, own[row], none);
        }
        if (g) add_products<false>(g + begin, g, n, own[count], none);
      }))
    return 1;
  for (int64_t strip = 0; strip < strips; strip++)
    for (int64_t k = 0; k < width; k++) out[k] += found[size_t(strip * width + k)];
  return 0;
}

LOOP void add_row(float *__restrict out, const float *__restrict x, float weight, int64_t n) {
  for (int64_t k = 0; k < n; k++) out[k] += weight * x[k];
}

// Writes the sum of `count` rows by weight to `out`: row after row for every column.
inline int mix_rows(const float *const *rows, const float *weights, int64_t count, int64_t columns, float *out,
                    int64_t threads) {
  const int64_t strips = (columns + STRIP - 1) / STRIP;
  threads = std::min(threads, 1 + count * columns / WORTH_A_THREAD);
  return !run_pieces(strips, threads, [&](int64_t strip) {
    const int64_t end = std::min(columns, (strip + 1) * STRIP);
    for (int64_t at = strip * STRIP; at < end; at += BLOCK) {
      const int64_t n = std::min(BLOCK, end - at);
      std::fill(out + at, out + at + n, 0.f);
      for (int64_t row = 0; row < count; row++) add_row(out + at, rows[row] + at, weights[row], n);
    }
  });
}

}  // namespace hardy
