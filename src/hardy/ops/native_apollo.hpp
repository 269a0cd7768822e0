// APOLLO's work on a gradient and its sketch (paper 2412.05270; formulas at updates.SketchTask and
// MomentTask), for native.cpp. Letters: K contracted length, C channels, R rank.
#pragma once

#include "native_threads.hpp"
#include "native_values.hpp"

namespace hardy {

constexpr int64_t FLUSH_SUMS = 64;  // fp32 sums of this many rows are added up in fp64

// Columns of a panel that one thread walks down: all threads have equally many, and rows are read in long
// runs.
inline int64_t panel_width(int64_t cols, int64_t threads) {
  const int64_t panels = ((cols + BLOCK - 1) / BLOCK + threads - 1) / threads * threads;
  return std::min(BLOCK, std::max<int64_t>(512, (cols / std::max<int64_t>(1, panels) + 64) / 64 * 64));
}

struct SketchTask {
  Grads grads;
  int64_t rows, cols;
  const float *projection;  // [K, R]; R may be 0: squares only
  int64_t rank, by_columns;
  float *sketch, *squares;
  int64_t add;  // whether to add to `squares`, where channels are columns
  float *copy;  // null, or where the gradient goes as fp32, [rows, cols]
};

LOOP inline double dot(const float *a, const float *b, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += SUM_LENGTH) {
    const int64_t end = std::min(n, begin + SUM_LENGTH);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = begin; k < end; k++) sum += a[k] * b[k];
    total += sum;
  }
  return total;
}

LOOP inline void add_product(float *__restrict to, float factor, const float *__restrict x, int64_t n) {
  for (int64_t k = 0; k < n; k++) to[k] += factor * x[k];
}

LOOP inline void add_square(float *__restrict to, const float *__restrict x, int64_t n) {
  for (int64_t k = 0; k < n; k++) to[k] += x[k] * x[k];
}

inline const float *load_and_copy(const SketchTask &task, int64_t i, int64_t j, int64_t n, float *room) {
  const float *grad = load(task.grads, i, j, n, room);
  if (task.copy) std::memcpy(task.copy + i * task.cols + j, grad, size_t(n) * 4);
  return grad;
}

// Rows begin ... end - 1 of sketch = grad @ projection, and their squares.
inline void sketch_rows(const SketchTask &task, int64_t begin, int64_t end) {
  const int64_t rank = task.rank;
  std::vector<float> by_column(size_t(rank > 1 ? rank * task.cols : 0));  // the projection, transposed
  for (int64_t r = 0; r < rank && rank > 1; r++)
    for (int64_t k = 0; k < task.cols; k++)
      by_column[size_t(r * task.cols + k)] = task.projection[k * rank + r];
  const float *projection = rank > 1 ? by_column.data() : task.projection;
  std::vector<double> sums(size_t(rank + 1));
  alignas(64) float room[BLOCK];
  for (int64_t i = begin; i < end; i++) {
    std::fill(sums.begin(), sums.end(), 0.);
    for (int64_t k = 0; k < task.cols; k += BLOCK) {
      const int64_t n = std::min(BLOCK, task.cols - k);
      const float *grad = load_and_copy(task, i, k, n, room);
      for (int64_t r = 0; r < rank; r++) sums[size_t(r)] += dot(grad, projection + r * task.cols + k, n);
      sums[size_t(rank)] += dot(grad, grad, n);
    }
    for (int64_t r = 0; r < rank; r++) task.sketch[i * rank + r] = float(sums[size_t(r)]);
    task.squares[i] = float(sums[size_t(rank)]);
  }
}

// Columns j ... j + n - 1, n <= BLOCK, of sketch = projection.T @ grad, and their squares.
inline void sketch_columns(const SketchTask &task, int64_t j, int64_t n) {
  const int64_t rank = task.rank;
  std::vector<float> recent(size_t((rank + 1) * n));
  std::vector<double> sums(size_t((rank + 1) * n));
  alignas(64) float room[BLOCK];
  for (int64_t i = 0; i < task.rows; i++) {
    const float *grad = load_and_copy(task, i, j, n, room);
    const float *projection = task.projection + i * rank;
    for (int64_t r = 0; r < rank; r++) add_product(recent.data() + r * n, projection[r], grad, n);
    add_square(recent.data() + rank * n, grad, n);
    if ((i + 1) % FLUSH_SUMS == 0 || i + 1 == task.rows)
      for (size_t k = 0; k < sums.size(); k++) sums[k] += recent[k], recent[k] = 0;
  }
  for (int64_t r = 0; r < rank; r++)
    for (int64_t k = 0; k < n; k++) task.sketch[r * task.cols + j + k] = float(sums[size_t(r * n + k)]);
  for (int64_t k = 0; k < n; k++) {
    float &square = task.squares[j + k];
    square = float(sums[size_t(rank * n + k)] + (task.add ? double(square) : 0.));
  }
}

struct MomentNumbers {  // MomentTask.coefficients
  float active, beta1, beta2, eps, inverse_scale;
};

struct MomentTask {
  const float *sketch;
  float *exp_avg, *exp_avg_sq;
  int64_t rows, cols, by_columns;  // whether channels are columns
  const MomentNumbers *numbers;
  float *before, *after;
};

// Updates n moments in a row; adds X X to before[k] and N N to after[k].
LOOP inline void step_moments(const MomentTask &task, int64_t at, int64_t n, float *__restrict before,
                         float *__restrict after) {
  const MomentNumbers c = *task.numbers;
  const float *__restrict sketch = task.sketch + at;
  float *__restrict exp_avg = task.exp_avg + at, *__restrict exp_avg_sq = task.exp_avg_sq + at;
#pragma omp simd
  for (int64_t k = 0; k < n; k++) {
    const float x = sketch[k] * c.inverse_scale;
    const float m = c.beta1 * exp_avg[k] + (1 - c.beta1) * x;
    const float v = c.beta2 * exp_avg_sq[k] + (1 - c.beta2) * (x * x);
    const float u = m / (std::sqrt(v) + c.eps);
    exp_avg[k] = m, exp_avg_sq[k] = v;
    before[k] += x * x;
    after[k] += u * u;
  }
}

// Channels j ... j + n - 1, n <= BLOCK, that are columns of the sketch.
inline void moments_of_columns(const MomentTask &task, int64_t rows, int64_t cols, int64_t j, int64_t n) {
  std::vector<float> recent(size_t(2 * n));
  std::vector<double> sums(size_t(2 * n));
  for (int64_t r = 0; r < rows; r++) {
    step_moments(task, r * cols + j, n, recent.data(), recent.data() + n);
    if ((r + 1) % FLUSH_SUMS == 0 || r + 1 == rows)
      for (size_t k = 0; k < sums.size(); k++) sums[k] += recent[k], recent[k] = 0;
  }
  for (int64_t k = 0; k < n; k++) {
    task.before[j + k] = float(sums[size_t(k)]);
    task.after[j + k] = float(sums[size_t(n + k)]);
  }
}

// Channels begin ... end - 1 that are rows of the sketch.
inline void moments_of_rows(const MomentTask &task, int64_t begin, int64_t end) {
  const int64_t width = std::min(BLOCK, task.cols);
  std::vector<float> sums(size_t(2 * width));
  for (int64_t i = begin; i < end; i++) {
    std::fill(sums.begin(), sums.end(), 0.f);
    for (int64_t r = 0; r < task.cols; r += width)
      step_moments(task, i * task.cols + r, std::min(width, task.cols - r), sums.data(), sums.data() + width);
    double before = 0, after = 0;
    for (int64_t k = 0; k < width; k++) before += sums[size_t(k)], after += sums[size_t(width + k)];
    task.before[i] = float(before);
    task.after[i] = float(after);
  }
}

}  // namespace hardy
