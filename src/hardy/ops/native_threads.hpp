// Numbered pieces of work on a few threads, for native.cpp.
//
// A piece may depend on nothing but its number: which thread takes which piece is left to chance, so that a
// core that is busy with something else holds up one piece and not its whole share. Threads are made for a
// call and joined before it returns, so a process may fork between calls.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace hardy {

constexpr int64_t PIECE = 1 << 18;           // elements of a piece: some 100 microseconds of work
constexpr int64_t MOST_PIECES = 32;          // of one tensor; each may hold sums of its own
constexpr int64_t WORTH_A_THREAD = 1 << 16;  // elements; below, waking a thread costs what it saves

using OpenMPParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
// GOMP_parallel of the OpenMP library that torch has loaded, when native_use_openmp was told to borrow its
// threads.
inline OpenMPParallel borrowed_threads = nullptr;

// Calls work(piece) for piece = 0 ... pieces - 1; false when memory ran out.
template <class Work>
bool run_pieces(int64_t pieces, int64_t threads, const Work &work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto take = [&] {
    for (int64_t piece; !failed && (piece = next.fetch_add(1)) < pieces;) {
      try {
        work(piece);
      } catch (const std::bad_alloc &) {
        failed = true;
      }
    }
  };
  threads = std::min(threads, pieces);
  if (threads > 1 && borrowed_threads) {
    using Take = decltype(take);
    borrowed_threads([](void *data) { (*static_cast<Take *>(data))(); }, &take, unsigned(threads), 0);
    return !failed;
  }
  std::vector<std::thread> helpers;
  try {
    while (int64_t(helpers.size()) + 1 < threads) helpers.emplace_back(take);
  } catch (const std::system_error &) {  // the system gives no more threads: those that run do all the work
  } catch (const std::bad_alloc &) {
  }
  take();
  for (auto &helper : helpers) helper.join();
  return !failed;
}

// Calls work(task, index, part, parts) for every part of every task, in order of the tasks; 0, or 1 when
// memory ran out. A task is cut into parts_of(task) parts and has elements_of(task) elements.
template <class Task, class PartsOf, class ElementsOf, class Work>
int over_tasks(const int64_t *table, int64_t count, int64_t threads, const PartsOf &parts_of,
               const ElementsOf &elements_of, const Work &work) {
  static_assert(sizeof(Task) % 8 == 0, "a task is a row of 64-bit words");
  const Task *tasks = reinterpret_cast<const Task *>(table);
  std::vector<int64_t> ends(size_t(count), 0);
  int64_t pieces = 0, elements = 0;
  for (int64_t index = 0; index < count; index++) {
    pieces += parts_of(tasks[index]);
    elements += elements_of(tasks[index]);
    ends[size_t(index)] = pieces;
  }
  threads = std::min(threads, 1 + elements / WORTH_A_THREAD);
  return !run_pieces(pieces, threads, [&](int64_t piece) {
    const int64_t index = std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin();
    const int64_t first = index ? ends[size_t(index - 1)] : 0;
    work(tasks[index], index, piece - first, ends[size_t(index)] - first);
  });
}

// How many pieces a tensor is cut into. By its size alone, never by the number of threads: so results are the
// same bit for bit on any number of threads.
inline int64_t pieces_for(int64_t elements) {
  return std::min(MOST_PIECES, std::max<int64_t>(1, elements / PIECE));
}

// Where part `part` of `parts` of `total` begins: a multiple of `unit`, or the end.
inline int64_t begin_of(int64_t part, int64_t parts, int64_t total, int64_t unit) {
  return part == parts ? total : total * part / parts / unit * unit;
}

}  // namespace hardy
