// APOLLO's sketch (updates.SketchTask) by tile instructions (AMX), for native.cpp; the numbers they
// multiply, and why these are exact enough, are in native_tiles.hpp.
//
// Every number of a sketch and every square is summed in one order, whatever part of the channels a thread
// works on: so results are the same bit for bit on any number of threads.
#pragma once

#include "native_tiles.hpp"

#if !defined(HARDY_TILES)

namespace hardy {

inline bool tiles_granted() { return false; }
inline bool sketch_by_tiles(const SketchTask &, int64_t) { return false; }

}  // namespace hardy

#else

#include <sys/syscall.h>
#include <unistd.h>

namespace hardy {

// Linux grants tiles to a process with its threads and forks, when asked: state 18 of the processor, its
// tiles' data.
inline bool tiles_granted() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

// What this thread's tiles are, as long as this lives: 0 ... 3 hold sums, 4 and 5 left factors, 6 and 7
// right factors.
class Tiles {
 public:
  Tiles() { _tile_loadconfig(&SHAPES); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles &) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, unused[15];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static constexpr Shapes SHAPES = {
      1, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
};

struct Factor {
  const Line *lines;
  int64_t pieces;
};

// Sums of up to 2 x 2 tiles: those of the second left factor lie `down` further, of the second right one
// `along`.
struct Sums {
  float *at;
  int64_t down, along;
};

inline void add(const float *recent, bool first, float *sums) {
  for (int64_t i = 0; i < SIDE * SIDE; i += SIDE) {
    const __m512 sum = _mm512_load_ps(recent + i);
    _mm512_store_ps(sums + i, first ? sum : sum + _mm512_load_ps(sums + i));
  }
}

// Adds products over `steps` steps to sums, or begins anew where `first`. Products are summed by themselves
// before: tiles that held the sum of all so far would lose more by rounding. Second factors lie behind the
// first. Compilers do not know that tiles are loaded from memory, so factors must have been written in
// another function.
template <bool TWO_LEFT, bool TWO_RIGHT>
LOOP void multiply(const Factor &left, const Factor &right, int64_t steps, bool first, const Sums &sums) {
  // The smallest products first, and of two neighbours one factor is the same.
  constexpr int64_t ORDER[6][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++) {
    const Line *a = left.lines + step * ROOM, *b = right.lines + step * ROOM;
    int64_t loaded_a = -1, loaded_b = -1;
    for (const auto &[piece_a, piece_b] : ORDER) {
      if (piece_a >= left.pieces || piece_b >= right.pieces) continue;
      if (piece_a != loaded_a) {
        _tile_loadd(4, a + piece_a * TILE, 64);
        if (TWO_LEFT) _tile_loadd(5, a + steps * ROOM + piece_a * TILE, 64);
        loaded_a = piece_a;
      }
      if (piece_b != loaded_b) {
        _tile_loadd(6, b + piece_b * TILE, 64);
        if (TWO_RIGHT) _tile_loadd(7, b + steps * ROOM + piece_b * TILE, 64);
        loaded_b = piece_b;
      }
      _tile_dpbf16ps(0, 4, 6);
      if (TWO_RIGHT) _tile_dpbf16ps(1, 4, 7);
      if (TWO_LEFT) _tile_dpbf16ps(2, 5, 6);
      if (TWO_LEFT && TWO_RIGHT) _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float recent[4][SIDE * SIDE];
  _tile_stored(0, recent[0], 64);
  if (TWO_RIGHT) _tile_stored(1, recent[1], 64);
  if (TWO_LEFT) _tile_stored(2, recent[2], 64);
  if (TWO_LEFT && TWO_RIGHT) _tile_stored(3, recent[3], 64);
  add(recent[0], first, sums.at);
  if (TWO_RIGHT) add(recent[1], first, sums.at + sums.along);
  if (TWO_LEFT) add(recent[2], first, sums.at + sums.down);
  if (TWO_LEFT && TWO_RIGHT) add(recent[3], first, sums.at + sums.down + sums.along);
}

// All ranks of two tiles of channels. Sums lie as [tile of channels][tile of ranks][16][16].
inline void multiply_ranks(const Cut &cut, const Factor &grads, Factor basis, int64_t steps, bool first,
                           float *sums) {
  constexpr int64_t NEXT = SIDE * SIDE;
  const int64_t channel = cut.ranks * NEXT;
  for (int64_t r = 0; r < cut.ranks; r += 2, sums += 2 * NEXT, basis.lines += 2 * steps * ROOM) {
    const bool two = r + 1 < cut.ranks;
    const Sums tall{sums, channel, NEXT}, wide{sums, NEXT, channel};
    if (cut.tall) (two ? multiply<true, true> : multiply<true, false>)(grads, basis, steps, first, tall);
    else (two ? multiply<true, true> : multiply<false, true>)(basis, grads, steps, first, wide);
  }
}

// Writes the sums of channels begin ... begin + count - 1, or adds them.
inline void put(const SketchTask &task, const Cut &cut, const float *sums, int64_t begin, int64_t count,
                bool add) {
  const int64_t rows = cut.tall ? count : task.rank, cols = cut.tall ? task.rank : count;
  for (int64_t i = 0; i < rows; i++) {
    float *to = task.sketch + (cut.tall ? (begin + i) * task.rank : i * cut.channels + begin);
    for (int64_t j = 0; j < cols; j += SIDE) {
      const int64_t channel = (cut.tall ? i : j) / SIDE, rank = (cut.tall ? j : i) / SIDE;
      const float *from = sums + ((channel * cut.ranks + rank) * SIDE + i % SIDE) * SIDE;
      const __mmask16 within = __mmask16(first_lanes(cols - j));
      __m512 sum = _mm512_load_ps(from);
      if (add) sum += _mm512_maskz_loadu_ps(within, to + j);
      _mm512_mask_storeu_ps(to + j, within, sum);
    }
  }
}

// Channels begin ... begin + count - 1, over contracted elements from ... to - 1, whose projection is
// `basis`.
inline void sketch_part(const SketchTask &task, const Cut &cut, const Factor &basis, int64_t begin,
                        int64_t count, int64_t from, int64_t to) {
  const int64_t padded = up(count, 2 * SIDE) * 2 * SIDE, most = cut.group * SIDE;
  const std::unique_ptr<Line[]> grads(new Line[size_t(cut.group * cut.steps * ROOM)]);
  const std::unique_ptr<Line[]> sums(new Line[size_t(padded * cut.ranks)]);
  float *const first_sum = reinterpret_cast<float *>(sums.get());
  std::vector<double> squares(static_cast<size_t>(padded));
  const Tiles tiles;
  for (int64_t k = from; k < to; k += cut.steps * DEPTH) {
    const int64_t steps = std::min(cut.steps, up(to - k, DEPTH));
    const Factor block{basis.lines + (k - from) / DEPTH * cut.ranks * ROOM, basis.pieces};
    for (int64_t c = 0; c < padded; c += most) {
      const int64_t channels = std::min(most, padded - c);
      split_grads(task, begin + c, channels, k, steps, grads.get(), squares.data() + c);
      for (int64_t pair = 0; pair < channels; pair += 2 * SIDE) {
        const Factor two{grads.get() + pair / SIDE * steps * ROOM, task.grads.half ? 1 : PIECES};
        multiply_ranks(cut, two, block, steps, k == from, first_sum + (c + pair) * cut.ranks * SIDE);
      }
    }
  }
  put(task, cut, first_sum, begin, count, from > 0);
  for (int64_t c = 0; c < count; c++) {
    float &square = task.squares[begin + c];
    square = float(squares[size_t(c)] + (from > 0 ? double(square) : 0.));
  }
}

// The sketch and the squares; false when memory ran out. Holds up to 24 MB, and some 0.7 MB for each
// thread.
inline bool sketch_by_tiles(const SketchTask &task, int64_t threads) {
  const Cut cut(task);
  threads = std::min(threads, 1 + task.rows * task.cols / WORTH_A_THREAD);
  const int64_t unit = SIDE * cut.group;
  const int64_t most = std::max<int64_t>(1, KEPT / (unit * SIDE * cut.ranks)) * unit;
  const int64_t part = std::min(most, up(up(cut.channels, 4 * threads), unit) * unit);
  const int64_t tiles = std::min(cut.band, up(cut.length, DEPTH));
  const std::unique_ptr<Line[]> lines(new (std::nothrow) Line[size_t(tiles * cut.ranks * ROOM)]);
  if (!lines) return false;
  for (int64_t from = 0; from < cut.length; from += tiles * DEPTH) {
    const int64_t to = std::min(cut.length, from + tiles * DEPTH), block = cut.steps * DEPTH;
    std::atomic<bool> one_piece{true};
    bool done = run_pieces(up(to - from, block), threads, [&](int64_t index) {
      const int64_t k = from + index * block, steps = std::min(cut.steps, up(to - k, DEPTH));
      Line *own = lines.get() + index * cut.steps * cut.ranks * ROOM;
      if (!split_projection(task, cut, k, steps, own)) one_piece = false;
    });
    const Factor basis{lines.get(), one_piece ? 1 : PIECES};
    done = done && run_pieces(up(cut.channels, part), threads, [&](int64_t index) {
      const int64_t begin = index * part;
      sketch_part(task, cut, basis, begin, std::min(part, cut.channels - begin), from, to);
    });
    if (!done) return false;
  }
  return true;
}

}  // namespace hardy

#endif
