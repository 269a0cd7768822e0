// The sweeps of updates.py for CPUs: what `updates_native` calls, and walks over stacks of rows, which
// `native_rows` calls. Compiled on first use by `native_build`.
//
// Each function takes a table: one row of 64-bit words (addresses, sizes, flags) for a task, in the order of
// the task's struct. Numbers that training makes (learning rate, step) stand in tensors and are read here, so
// that no host code waits for them. All return 0, or 1 when memory ran out.
//
// NaN and infinity follow IEEE rules: only sums may be reordered, and only where a loop says so (omp simd
// reduction).
#include <dlfcn.h>
#include <pthread.h>

#include "native_apollo.hpp"
#include "native_rows.hpp"
#include "native_smmf.hpp"
#include "native_tiled_sketch.hpp"

namespace hardy {
namespace {

// Calls work(i, j, n) for runs of at most BLOCK columns of a row that cover elements begin ... end - 1.
template <class Work>
void for_runs(int64_t cols, int64_t begin, int64_t end, const Work &work) {
  int64_t i = cols ? begin / cols : 0, j = begin - i * cols;
  while (begin < end) {
    const int64_t n = std::min(std::min(BLOCK, cols - j), end - begin);
    work(i, j, n);
    begin += n;
    j += n;
    if (j == cols) i++, j = 0;
  }
}

// ---- APOLLO's second sweep --------------------------------------------------------------------------------

enum Along : int64_t { ALL = 0, ROWS = 1, COLS = 2 };

struct ScaleTask {
  Weights weights;
  Grads grads;
  int64_t rows, cols;
  const float *factor;
  int64_t along;
  const float *keep;
};

LOOP void scale_run(const ScaleTask &task, int64_t i, int64_t j, int64_t n) {
  alignas(64) float weight_room[BLOCK], grad_room[BLOCK];
  const float keep = *task.keep;
  const float factor = task.along == COLS ? 1 : task.factor[task.along == ROWS ? i : 0];
  if (factor == 0 && keep == 1) return;  // a skipped step touches nothing
  float *__restrict w = load(task.weights, i, j, n, weight_room);
  if (factor == 0) {
    for (int64_t k = 0; k < n; k++) w[k] *= keep;
  } else {
    const float *__restrict g = load(task.grads, i, j, n, grad_room);
    if (task.along == COLS) {
      const float *__restrict f = task.factor + j;
      for (int64_t k = 0; k < n; k++) {
        const float kept = keep * w[k], moved = kept - f[k] * g[k];
        w[k] = f[k] == 0 ? kept : moved;
      }
    } else {
      for (int64_t k = 0; k < n; k++) w[k] = keep * w[k] - factor * g[k];
    }
  }
  store(task.weights, i, j, n, w);
}

// ---- AdamW ------------------------------------------------------------------------------------------------

struct AdamNumbers {  // AdamTask.coefficients
  float active, beta1, beta2, step_size, root_scale, eps, keep, l2, inverse_scale;
};

struct AdamTask {
  Weights weights;
  Grads grads;
  int64_t rows, cols;
  float *exp_avg, *exp_avg_sq;
  int64_t moment_stride;
  const AdamNumbers *numbers;
};

LOOP void adam_run(const AdamTask &task, int64_t i, int64_t j, int64_t n) {
  alignas(64) float weight_room[BLOCK], grad_room[BLOCK];
  const AdamNumbers c = *task.numbers;
  float *__restrict w = load(task.weights, i, j, n, weight_room);
  const float *__restrict g = load(task.grads, i, j, n, grad_room);
  float *__restrict exp_avg = task.exp_avg + i * task.moment_stride + j;
  float *__restrict exp_avg_sq = task.exp_avg_sq + i * task.moment_stride + j;
#pragma omp simd
  for (int64_t k = 0; k < n; k++) {
    const float x = g[k] * c.inverse_scale + (c.l2 != 0 ? c.l2 * w[k] : 0.f);
    const float m = c.beta1 * exp_avg[k] + (1 - c.beta1) * x;
    const float v = c.beta2 * exp_avg_sq[k] + (1 - c.beta2) * (x * x);
    exp_avg[k] = m;
    exp_avg_sq[k] = v;
    w[k] = c.keep * w[k] - c.step_size * (m / (std::sqrt(v) * c.root_scale + c.eps));
  }
  store(task.weights, i, j, n, w);
}

// ---- SMMF -------------------------------------------------------------------------------------------------

void begin_sweep(const SweepTask &task, SweepProgress &progress, int64_t parts) {
  const bool momentum = task.row_m != nullptr;
  std::fill(task.sums, task.sums + (task.height + task.width) * (momentum ? 2 : 1) + 1, 0.f);
  progress.columns.reset(new double[size_t(2 * task.width * parts)]());
  progress.parts.reset(new SweepPart[size_t(parts)]);
  progress.left = parts;
}

template <bool MOMENTUM>
void sweep_part(const SweepTask &task, SweepProgress &progress, int64_t part, int64_t parts) {
  double *columns = progress.columns.get() + 2 * task.width * part;
  const int64_t total = task.rows * task.cols;
  // Pieces meet at a multiple of 64 columns: no two write one byte of signs.
  auto meeting = [&](int64_t at) {
    const int64_t element = begin_of(at, parts, total, 1);
    return element == total ? total : element - element % task.cols % 64;
  };
  auto walk = [&](auto &piece) {
    const int64_t end = meeting(part + 1);
    for (int64_t at = meeting(part); at < end;) {
      const int64_t row = at / task.cols, col = at % task.cols;
      const int64_t n = std::min(task.cols - col, end - at);
      piece.walk(row, col, col + n);
      at += n;
    }
    piece.finish();
  };
  if (task.skip_zeros) {
    SweepPiece<MOMENTUM, true> piece(task, progress.parts[size_t(part)], columns);
    walk(piece);
  } else {
    SweepPiece<MOMENTUM, false> piece(task, progress.parts[size_t(part)], columns);
    walk(piece);
  }
  if (--progress.left) return;
  combine<MOMENTUM>(task, progress, parts);
  progress.columns.reset();  // so that only tasks under way hold memory
  progress.parts.reset();
}

}  // namespace
}  // namespace hardy

using namespace hardy;

#define EXPORT extern "C" __attribute__((visibility("default")))

template <class Task>
static int64_t elements_of(const Task &task) {
  return task.rows * task.cols;
}

template <class Task>
static int64_t pieces_of(const Task &task) {
  return pieces_for(task.rows * task.cols);
}

// Bytes of a row of each table, in the order sketch, tiled_sketch, moments, scale, sweep, adam.
EXPORT void native_row_bytes(int64_t *out) {
  const int64_t sizes[] = {sizeof(SketchTask), sizeof(SketchTask), sizeof(MomentTask),
                           sizeof(ScaleTask),  sizeof(SweepTask),  sizeof(AdamTask)};
  std::copy(std::begin(sizes), std::end(sizes), out);
}

// From now on work runs on the threads of the OpenMP library that torch has loaded; 0 when there is none. A
// forked child has none of these threads, so it makes its own.
EXPORT int native_use_openmp(int wanted) {
  static const int watching = pthread_atfork(nullptr, nullptr, [] { borrowed_threads = nullptr; });
  if (watching) return 0;
  void *found = wanted ? dlsym(RTLD_DEFAULT, "GOMP_parallel") : nullptr;
  borrowed_threads = reinterpret_cast<OpenMPParallel>(found);
  return borrowed_threads != nullptr;
}

EXPORT int native_sketch(const int64_t *table, int64_t count, int64_t threads) {
  auto parts = [&](const SketchTask &task) {
    const int64_t width = panel_width(task.cols, threads);
    return task.by_columns ? (task.cols + width - 1) / width : pieces_of(task);
  };
  auto work = [&](const SketchTask &task, int64_t, int64_t part, int64_t parts) {
    const int64_t width = panel_width(task.cols, threads);
    if (task.by_columns) sketch_columns(task, part * width, std::min(width, task.cols - part * width));
    else sketch_rows(task, begin_of(part, parts, task.rows, 1), begin_of(part + 1, parts, task.rows, 1));
  };
  return over_tasks<SketchTask>(table, count, threads, parts, elements_of<SketchTask>, work);
}

// Whether native_tiled_sketch works here: processor, system and compiler have tiles (AMX).
EXPORT int native_has_tiles() { return tiles_granted(); }

EXPORT int native_tiled_sketch(const int64_t *table, int64_t count, int64_t threads) {
  const SketchTask *tasks = reinterpret_cast<const SketchTask *>(table);
  for (int64_t index = 0; index < count; index++)
    if (!sketch_by_tiles(tasks[index], threads)) return 1;
  return 0;
}

EXPORT int native_moments(const int64_t *table, int64_t count, int64_t threads) {
  // A sketch of rank 1 is a vector, whichever axis its channels are on.
  auto by_columns = [](const MomentTask &task) { return task.by_columns || task.cols == 1; };
  auto channels_of = [](const MomentTask &task) { return task.by_columns ? task.cols : task.rows; };
  auto parts = [&](const MomentTask &task) {
    const int64_t channels = channels_of(task), width = panel_width(channels, threads);
    return by_columns(task) ? (channels + width - 1) / width : pieces_of(task);
  };
  auto work = [&](const MomentTask &task, int64_t, int64_t part, int64_t parts) {
    const int64_t channels = channels_of(task), width = panel_width(channels, threads);
    const int64_t begin = by_columns(task) ? part * width : begin_of(part, parts, channels, 1);
    const int64_t end = by_columns(task) ? std::min(begin + width, channels)
                                         : begin_of(part + 1, parts, channels, 1);
    if (task.numbers->active == 0) {
      std::fill(task.before + begin, task.before + end, 0.f);
      std::fill(task.after + begin, task.after + end, 0.f);
    } else if (by_columns(task)) {
      moments_of_columns(task, task.by_columns ? task.rows : 1, channels, begin, end - begin);
    } else {
      moments_of_rows(task, begin, end);
    }
  };
  return over_tasks<MomentTask>(table, count, threads, parts, elements_of<MomentTask>, work);
}

EXPORT int native_scale(const int64_t *table, int64_t count, int64_t threads) {
  return over_tasks<ScaleTask>(table, count, threads, pieces_of<ScaleTask>, elements_of<ScaleTask>,
                               [](const ScaleTask &task, int64_t, int64_t part, int64_t parts) {
                                 const int64_t total = task.rows * task.cols;
                                 for_runs(task.cols, begin_of(part, parts, total, 64),
                                          begin_of(part + 1, parts, total, 64),
                                          [&](int64_t i, int64_t j, int64_t n) { scale_run(task, i, j, n); });
                               });
}

EXPORT int native_adam(const int64_t *table, int64_t count, int64_t threads) {
  return over_tasks<AdamTask>(table, count, threads, pieces_of<AdamTask>, elements_of<AdamTask>,
                              [](const AdamTask &task, int64_t, int64_t part, int64_t parts) {
                                if (task.numbers->active == 0) return;
                                const int64_t total = task.rows * task.cols;
                                for_runs(task.cols, begin_of(part, parts, total, 64),
                                         begin_of(part + 1, parts, total, 64),
                                         [&](int64_t i, int64_t j, int64_t n) { adam_run(task, i, j, n); });
                              });
}

EXPORT int native_sweep(const int64_t *table, int64_t count, int64_t threads) {
  std::unique_ptr<SweepProgress[]> progress(new (std::nothrow) SweepProgress[size_t(count)]);
  if (!progress) return 1;
  auto work = [&](const SweepTask &task, int64_t index, int64_t part, int64_t parts) {
    SweepProgress &own = progress[size_t(index)];
    std::call_once(own.begun, [&] { begin_sweep(task, own, parts); });
    if (task.numbers->active == 0) return;
    if (task.row_m) sweep_part<true>(task, own, part, parts);
    else sweep_part<false>(task, own, part, parts);
  };
  return over_tasks<SweepTask>(table, count, threads, pieces_of<SweepTask>, elements_of<SweepTask>, work);
}

// Numbers of flat indices start ... start + count - 1: normal, or signs +-1.
EXPORT int native_fill(float *out, int64_t count, uint64_t start, int64_t third, int64_t fourth, uint64_t key,
                       int64_t normal, int64_t threads) {
  // Blocks begin at even flat indices, so that no pair of normal numbers is cut but at the very ends.
  const int64_t odd = int64_t(start % 2), piece = 16 * BLOCK, pieces = (count + odd + piece - 1) / piece;
  threads = std::min(threads, 1 + count / WORTH_A_THREAD);
  return !run_pieces(pieces, threads, [&](int64_t index) {
    alignas(64) uint32_t room[WORDS_ROOM + 4];
    alignas(64) float values[BLOCK + 8];
    for (int64_t at = index * piece - odd; at < std::min(count, (index + 1) * piece - odd);) {
      const int64_t n = std::min(BLOCK, count - at);
      const uint64_t first = start + uint64_t(at);
      const uint32_t *words = words_of(room, first, n + n % 2, uint32_t(third), uint32_t(fourth), key);
      if (normal)
#pragma omp simd
        for (int64_t k = 0; k < n; k += 2) normal_pair(words[k], words[k + 1], values + k);
      else
        for (int64_t k = 0; k < n; k++) values[k] = words[k] >> 31 ? -1.f : 1.f;
      const int64_t skip = at < 0;
      std::copy(values + skip, values + n, out + at + skip);
      at += n;
    }
  });
}

EXPORT int native_row_sums(const float *rows, int64_t count, int64_t stride, int64_t columns, const float *g,
                           double *out, int64_t threads) {
  return row_sums(rows, count, stride, columns, g, out, threads);
}

EXPORT int native_mix_rows(const float *const *rows, const float *weights, int64_t count, int64_t columns,
                           float *out, int64_t threads) {
  return mix_rows(rows, weights, count, columns, out, threads);
}
