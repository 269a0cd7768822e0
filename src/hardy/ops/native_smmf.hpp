// SMMF's sweep (paper 2412.08894; the formulas stand at updates.SweepTask), for native.cpp.
//
// Element k of the whole tensor stands in row i = k / width, column j = k % width of the matrix. A piece
// walks its elements once, in runs of constant tensor row and matrix row. Column sums gather in fp32 for some
// 64 matrix rows and then in fp64; a matrix row that two pieces share is added up in order of the pieces.
#pragma once

#include "native_smmf_run.hpp"
#if defined(HARDY_AVX512)
#include "native_smmf_wide.hpp"
#else
#include "native_smmf_step.hpp"
#endif
#include "native_threads.hpp"

namespace hardy {

constexpr int64_t FLUSH_ROWS = 64;

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
