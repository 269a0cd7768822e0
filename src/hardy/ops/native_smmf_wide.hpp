// How a run of SMMF's sweep is stepped with AVX-512: 16 elements at a time, whose signs are one mask, so that packed
// signs are never unpacked. A mask also cuts off what lies behind the end of a run.
#pragma once

#include "native_smmf_run.hpp"

namespace hardy {

// Signs of up to 16 elements as a mask: packed from a whole byte on, or a byte each.
template <bool BITS>
struct Signs {
  static __mmask16 load(const uint8_t *signs, int64_t j, __mmask16 within) {
    if (!BITS) {
      const __m128i bytes = _mm_maskz_loadu_epi8(within, signs + j);
      return _mm_test_epi8_mask(bytes, bytes);
    }
    uint16_t bits = signs[j / 8];
    if (within > 0xff) std::memcpy(&bits, signs + j / 8, 2);
    return bits;
  }

  // Bits behind the end stay as they were.
  static void store(uint8_t *signs, int64_t j, __mmask16 within, __mmask16 before, __mmask16 after) {
    if (!BITS) return _mm_mask_storeu_epi8(signs + j, within, _mm_maskz_set1_epi8(after, 1));
    const uint16_t bits = uint16_t((after & within) | (before & ~within));
    if (within > 0xff) std::memcpy(signs + j / 8, &bits, 2);
    else signs[j / 8] = uint8_t(bits);
  }
};

struct WideNumbers {
  explicit WideNumbers(const Numbers &c)
      : scale(_mm512_set1_ps(c.inverse_scale)), l2(_mm512_set1_ps(c.l2)), share_m(_mm512_set1_ps(1 - c.beta1)),
        share_v(_mm512_set1_ps(1 - c.beta2)), eps(_mm512_set1_ps(c.eps)), most(_mm512_set1_ps(c.max_update)),
        least(_mm512_set1_ps(-c.max_update)), keep(_mm512_set1_ps(c.keep)), lr(_mm512_set1_ps(c.lr)),
        has_scale(c.inverse_scale != 1), has_l2(c.l2 != 0), has_most(!std::isinf(c.max_update)) {}

  const __m512 scale, l2, share_m, share_v, eps, most, least, keep, lr;
  const bool has_scale, has_l2, has_most;
};

struct WideRow {
  float *weight;
  const float *grad;
  uint8_t *sign;
  __m512 plus_m, minus_m, row_v, sum_m, sum_v;
};

template <int ROWS, bool MOMENTUM, bool SKIP, bool BITS>
LOOP double step_wide(const Run *runs, const float *row_m, const float *row_v, const Columns &columns,
                      const Numbers &numbers, int64_t n, RowSum *total) {
  const WideNumbers c(numbers);
  const __m512 zero = _mm512_setzero_ps();
  WideRow rows[ROWS];
  for (int r = 0; r < ROWS; r++) {
    WideRow &row = rows[r];
    row.weight = runs[r].weight, row.grad = runs[r].grad, row.sign = BITS ? runs[r].bits : runs[r].sign;
    row.plus_m = _mm512_set1_ps(MOMENTUM ? numbers.beta1 * row_m[r] : 0), row.minus_m = zero - row.plus_m;
    row.row_v = _mm512_set1_ps(numbers.beta2 * row_v[r]);
  }
  double squares = 0;
  for (int64_t begin = 0; begin < n; begin += SUM_LENGTH) {
    const int64_t end = std::min(n, begin + SUM_LENGTH);
    __m512 sum_square = zero;
    for (WideRow &row : rows) row.sum_m = row.sum_v = zero;
    for (int64_t j = begin; j < end; j += 16) {
      const __mmask16 within = end - j < 16 ? __mmask16((1 << (end - j)) - 1) : __mmask16(0xffff);
      const __m512 col_m = MOMENTUM ? _mm512_maskz_loadu_ps(within, columns.col_m + j) : zero;
      const __m512 col_v = _mm512_maskz_loadu_ps(within, columns.col_v + j);
      __m512 column_m = zero, column_v = zero;
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; r++) {
        WideRow &row = rows[r];
        const __m512 weight = _mm512_maskz_loadu_ps(within, row.weight + j);
        const __m512 grad = _mm512_maskz_loadu_ps(within, row.grad + j);
        __m512 g = c.has_scale ? grad * c.scale : grad;
        if (c.has_l2) g = _mm512_fmadd_ps(c.l2, weight, g);
        __m512 m = g;
        if (MOMENTUM) {
          const __mmask16 before = Signs<BITS>::load(row.sign, j, within);
          m = _mm512_fmadd_ps(c.share_m, g, _mm512_mask_blend_ps(before, row.minus_m, row.plus_m) * col_m);
          Signs<BITS>::store(row.sign, j, within, before, _mm512_cmp_ps_mask(m, zero, _CMP_GT_OQ));
        }
        const __m512 square = g * g;
        const __m512 v = _mm512_fmadd_ps(c.share_v, square, row.row_v * col_v);
        __m512 u = m / (_mm512_sqrt_ps(v) + c.eps);
        if (c.has_most) u = _mm512_max_ps(c.least, _mm512_min_ps(c.most, u));  // a NaN stays
        if (SKIP) u = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(grad, zero, _CMP_NEQ_UQ), u);
        _mm512_mask_storeu_ps(row.weight + j, within, _mm512_fnmadd_ps(c.lr, u, c.keep * weight));
        m = _mm512_abs_ps(m);
        row.sum_m += m, row.sum_v += v, sum_square += square;
        column_m += m, column_v += v;
      }
      if (MOMENTUM) {
        column_m += _mm512_maskz_loadu_ps(within, columns.sum_m + j);
        _mm512_mask_storeu_ps(columns.sum_m + j, within, column_m);
      }
      column_v += _mm512_maskz_loadu_ps(within, columns.sum_v + j);
      _mm512_mask_storeu_ps(columns.sum_v + j, within, column_v);
    }
    for (int r = 0; r < ROWS; r++) {
      total[r].m += _mm512_reduce_add_ps(rows[r].sum_m);
      total[r].v += _mm512_reduce_add_ps(rows[r].sum_v);
    }
    squares += _mm512_reduce_add_ps(sum_square);
  }
  return squares;
}

// Steps one run, or two of neighbouring matrix rows; see native_smmf_step.hpp.
template <int ROWS, bool MOMENTUM, bool SKIP>
double step_runs(const Run *runs, const float *row_m, const float *row_v, const Columns &columns,
                 const Numbers &numbers, int64_t n, RowSum *total) {
  return runs[0].bits ? step_wide<ROWS, MOMENTUM, SKIP, true>(runs, row_m, row_v, columns, numbers, n, total)
                      : step_wide<ROWS, MOMENTUM, SKIP, false>(runs, row_m, row_v, columns, numbers, n, total);
}

}  // namespace hardy
