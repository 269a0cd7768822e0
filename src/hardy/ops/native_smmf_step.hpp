// How a run of SMMF's sweep is stepped, in loops for the compiler to make vectors of; the same element by element
// as native_smmf_wide.hpp.
#pragma once

#include "native_smmf_run.hpp"

namespace hardy {

struct Moments {
  float m, v, square;
};

// One element; `expected` is beta1 s row_m col_m, `decayed` is beta2 row_v col_v.
template <bool MOMENTUM, bool SKIP>
inline Moments step_element(float &weight, float grad, float expected, float decayed, const Numbers &c) {
  const float g = grad * c.inverse_scale + (c.l2 != 0 ? c.l2 * weight : 0.f);
  const float m = MOMENTUM ? expected + (1 - c.beta1) * g : g;
  const float square = g * g;
  const float v = decayed + (1 - c.beta2) * square;
  float u = m / (std::sqrt(v) + c.eps);
  u = u > c.max_update ? c.max_update : (u < -c.max_update ? -c.max_update : u);  // a NaN stays
  if (SKIP) u = grad == 0 ? 0.f : u;
  weight = c.keep * weight - c.lr * u;
  return {m, v, square};
}

// Steps one run, or two of neighbouring matrix rows: these share loads and sums of columns, and twice as many
// streams from memory are on their way. Adds to total[ROWS]: sums over the run of |m|, v.
template <int ROWS, bool MOMENTUM, bool SKIP>
LOOP double step_runs(Run *runs, const float *row_m, const float *row_v, const Columns &columns,
                      const Numbers &numbers, int64_t n, RowSum *total) {
  const Numbers c = numbers;
  constexpr int LAST = ROWS - 1;
  float *__restrict w0 = runs[0].weight, *__restrict w1 = runs[LAST].weight;
  const float *__restrict g0 = runs[0].grad, *__restrict g1 = runs[LAST].grad;
  uint8_t *__restrict s0 = runs[0].sign, *__restrict s1 = runs[LAST].sign;
  const float *__restrict col_m = columns.col_m, *__restrict col_v = columns.col_v;
  float *__restrict sum_m = columns.sum_m, *__restrict sum_v = columns.sum_v;
  const float rm0 = MOMENTUM ? c.beta1 * row_m[0] : 0, rm1 = MOMENTUM ? c.beta1 * row_m[LAST] : 0;
  const float rv0 = c.beta2 * row_v[0], rv1 = c.beta2 * row_v[LAST];
  double squares = 0;
  for (int64_t begin = 0; begin < n; begin += SUM_LENGTH) {
    const int64_t end = std::min(n, begin + SUM_LENGTH);
    float m0 = 0, v0 = 0, m1 = 0, v1 = 0, square = 0;
    // 16 signs a vector: with more of these bytes at a time there are not enough registers for the rest.
#pragma omp simd simdlen(16) reduction(+ : m0, v0, m1, v1, square)
    for (int64_t j = begin; j < end; j++) {
      const float expected0 = MOMENTUM ? (s0[j] ? rm0 : -rm0) * col_m[j] : 0.f;
      const Moments a = step_element<MOMENTUM, SKIP>(w0[j], g0[j], expected0, rv0 * col_v[j], c);
      float m = std::fabs(a.m), v = a.v;
      m0 += m, v0 += v, square += a.square;
      if (MOMENTUM) s0[j] = a.m > 0;
      if (ROWS == 2) {
        const float expected1 = MOMENTUM ? (s1[j] ? rm1 : -rm1) * col_m[j] : 0.f;
        const Moments b = step_element<MOMENTUM, SKIP>(w1[j], g1[j], expected1, rv1 * col_v[j], c);
        m1 += std::fabs(b.m), v1 += b.v, square += b.square;
        m += std::fabs(b.m), v += b.v;
        if (MOMENTUM) s1[j] = b.m > 0;
      }
      if (MOMENTUM) sum_m[j] += m;
      sum_v[j] += v;
    }
    total[0].m += m0, total[0].v += v0;
    if (ROWS == 2) total[1].m += m1, total[1].v += v1;
    squares += square;
  }
  return squares;
}

}  // namespace hardy
