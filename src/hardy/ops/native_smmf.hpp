// SMMF's sweep (paper 2412.08894; the formulas stand at updates.SweepTask), for native.cpp.
//
// Element k of the whole tensor stands in row i = k / width, column j = k % width of the matrix. A piece
// walks its elements once, in runs of constant tensor row and matrix row. Column sums gather in fp32 for some
// 64 matrix rows and then in fp64; a matrix row that two pieces share is added up in order of the pieces.
#pragma once

#include "native_threads.hpp"
#include "native_values.hpp"

namespace hardy {

struct Numbers {  // SweepTask.coefficients
  float active, beta1, beta2, lr, keep, l2, eps, inverse_scale, max_update;
};

struct SweepTask {
  Weights weights;
  Grads grads;
  int64_t rows, cols;
  const float *row_m, *col_m, *row_v, *col_v;
  uint8_t *sign;
  int64_t sign_stride, packed;
  const Numbers *numbers;
  int64_t skip_zeros, height, width;
  float *sums;
};

constexpr int64_t FLUSH_ROWS = 64;

struct RowSum {
  int64_t row = -1;
  double m = 0, v = 0;
};

struct SweepPart {  // what a piece leaves for the others
  RowSum first, last;
  double square = 0;
};

struct SweepProgress {  // of one task
  std::once_flag begun;
  std::atomic<int64_t> left{0};
  std::unique_ptr<double[]> columns;  // per piece: column sums of |m|, then of v
  std::unique_ptr<SweepPart[]> parts;
};

// Unpacks bytes of 8 signs to 8 bytes of 0 or 1, lowest bit first.
inline void unpack_signs(uint8_t *out, const uint8_t *packed, int64_t bytes) {
  for (int64_t q = 0; q < bytes; q++) {
    uint64_t spread = (packed[q] * 0x0101010101010101u) & 0x8040201008040201u;
    spread = ((spread + 0x7f7f7f7f7f7f7f7fu) | spread) >> 7 & 0x0101010101010101u;
    std::memcpy(out + 8 * q, &spread, 8);
  }
}

inline void pack_signs(uint8_t *packed, const uint8_t *signs, int64_t bytes) {
  for (int64_t q = 0; q < bytes; q++) {
    uint64_t spread;
    std::memcpy(&spread, signs + 8 * q, 8);
    packed[q] = uint8_t((spread * 0x0102040810204080u) >> 56);
  }
}

// A run of a matrix row: operands as fp32 and as bytes, in their place or in this buffer.
class Run {
 public:
  float *weight;
  const float *grad;
  uint8_t *sign = nullptr;

  void open(const SweepTask &task, int64_t row, int64_t col, int64_t n) {
    row_ = row, col_ = col, n_ = n;
    weight = load(task.weights, row, col, n, weight_room_);
    grad = load(task.grads, row, col, n, grad_room_);
    if (!task.sign) return;
    uint8_t *signs = task.sign + row * task.sign_stride;
    sign = task.packed ? sign_room_ + col % 8 : signs + col;
    if (task.packed) unpack_signs(sign_room_, signs + col / 8, bytes());
  }

  void close(const SweepTask &task) {
    store(task.weights, row_, col_, n_, weight);
    if (task.sign && task.packed)
      pack_signs(task.sign + row_ * task.sign_stride + col_ / 8, sign_room_, bytes());
  }

 private:
  int64_t bytes() const { return (col_ % 8 + n_ + 7) / 8; }

  int64_t row_, col_, n_;
  alignas(64) float weight_room_[BLOCK];
  alignas(64) float grad_room_[BLOCK];
  alignas(64) uint8_t sign_room_[BLOCK + 16];
};

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

struct Columns {  // of the run: factors, and sums to add to
  const float *col_m, *col_v;
  float *sum_m, *sum_v;
};

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

// One piece on its way through its elements.
template <bool MOMENTUM, bool SKIP>
class SweepPiece {
 public:
  SweepPiece(const SweepTask &task, SweepPart &part, double *columns)
      : task_(task), part_(part), columns_(columns), recent_(size_t(2 * task.width)) {}

  // Elements (row, begin) ... (row, end - 1) of the local view.
  void walk(int64_t row, int64_t begin, int64_t end) {
    const int64_t width = task_.width, start = task_.weights.base + row * task_.weights.place_stride;
    int64_t i = (start + begin) / width, j = (start + begin) % width;
    while (begin < end) {
      // Two rows share no byte of signs when both begin on one. The same without bytes, so that sums come out
      // alike.
      const bool whole_bytes = begin % 8 == 0 && width % 8 == 0;
      if (j == 0 && end - begin >= 2 * width && whole_bytes) {
        steps<2>(row, begin, i, j, width);
        begin += 2 * width, i += 2;
        continue;
      }
      const int64_t n = std::min(width - j, end - begin);
      steps<1>(row, begin, i, j, n);
      begin += n, i += 1, j = 0;
    }
  }

  void finish() {
    flush();
    part_.last = current_;
    if (part_.first.row < 0) part_.first = current_;
  }

 private:
  template <int ROWS>
  void steps(int64_t row, int64_t begin, int64_t i, int64_t j, int64_t n) {
    note_columns(j, j + n, ROWS);
    RowSum total[2];
    for (int64_t k = 0; k < n; k += BLOCK) {
      const int64_t here = std::min(BLOCK, n - k);
      for (int r = 0; r < ROWS; r++) runs_[r].open(task_, row, begin + k + r * task_.width, here);
      float *recent = recent_.data() + j + k;
      const float *row_m = MOMENTUM ? task_.row_m + i : nullptr, *row_v = task_.row_v + i;
      const float *col_m = MOMENTUM ? task_.col_m + j + k : nullptr, *col_v = task_.col_v + j + k;
      const Columns columns{col_m, col_v, recent, recent + task_.width};
      part_.square +=
          step_runs<ROWS, MOMENTUM, SKIP>(runs_, row_m, row_v, columns, *task_.numbers, here, total);
      for (int r = 0; r < ROWS; r++) runs_[r].close(task_);
    }
    for (int r = 0; r < ROWS; r++) add_to_row(i + r, total[r]);
  }

  // The first and the last matrix row may go on in other pieces; those between are done when left.
  void add_to_row(int64_t row, const RowSum &more) {
    if (row != current_.row) {
      if (part_.first.row < 0) part_.first = current_;
      else write_row(task_, current_);
      current_ = {row, 0, 0};
    }
    current_.m += more.m, current_.v += more.v;
  }

  // Keeps the columns touched since the last flush; flushes where that is worth its cost.
  void note_columns(int64_t begin, int64_t end, int64_t rows) {
    if (rows_ >= FLUSH_ROWS && elements_ >= FLUSH_ROWS / 4 * (last_column_ - first_column_)) flush();
    first_column_ = rows_ ? std::min(first_column_, begin) : begin;
    last_column_ = rows_ ? std::max(last_column_, end) : end;
    rows_ += rows;
    elements_ += rows * (end - begin);
  }

  void flush() {
    for (int64_t side = 0; side < 2; side++) {
      double *to = columns_ + side * task_.width;
      float *from = recent_.data() + side * task_.width;
      for (int64_t j = first_column_; j < last_column_; j++) to[j] += from[j], from[j] = 0;
    }
    rows_ = elements_ = 0;
  }

  const SweepTask &task_;
  SweepPart &part_;
  double *columns_;
  std::vector<float> recent_;  // sums of columns since the last flush: of |m|, then of v
  int64_t rows_ = 0, elements_ = 0, first_column_ = 0, last_column_ = 0;  // since the last flush
  RowSum current_;
  Run runs_[2];

 public:
  static void write_row(const SweepTask &task, const RowSum &sum) {
    if (MOMENTUM) task.sums[sum.row] = float(sum.m);
    task.sums[(MOMENTUM ? task.height + task.width : 0) + sum.row] = float(sum.v);
  }
};

// The last piece adds up what all have left, in their order.
template <bool MOMENTUM>
void combine(const SweepTask &task, const SweepProgress &progress, int64_t parts) {
  const int64_t width = task.width;
  std::vector<double> columns(progress.columns.get(), progress.columns.get() + 2 * width);
  for (int64_t part = 1; part < parts; part++)
    for (int64_t j = 0; j < 2 * width; j++)
      columns[size_t(j)] += progress.columns[size_t(2 * width * part + j)];
  float *out_v = task.sums + task.height + (MOMENTUM ? task.height + width : 0);
  for (int64_t j = 0; j < width; j++) {
    if (MOMENTUM) task.sums[task.height + j] = float(columns[size_t(j)]);
    out_v[j] = float(columns[size_t(width + j)]);
  }
  RowSum row;
  double square = 0;
  auto add = [&](const RowSum &more) {
    if (more.row != row.row) {
      if (row.row >= 0) SweepPiece<MOMENTUM, false>::write_row(task, row);
      row = {more.row, 0, 0};
    }
    row.m += more.m, row.v += more.v;
  };
  for (int64_t part = 0; part < parts; part++) {
    const SweepPart &left = progress.parts[size_t(part)];
    if (left.first.row < 0) continue;
    add(left.first);
    if (left.last.row != left.first.row) add(left.last);
    square += left.square;
  }
  add({-1, 0, 0});
  out_v[width] = float(square);
}

}  // namespace hardy
