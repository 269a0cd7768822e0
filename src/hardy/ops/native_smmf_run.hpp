// What SMMF's sweep (native_smmf.hpp) is asked for, and a run of its elements. How a run is stepped stands in
// native_smmf_wide.hpp for processors with AVX-512, and in native_smmf_step.hpp for all others.
#pragma once

#include "native_values.hpp"

namespace hardy {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HARDY_AVX512
constexpr bool SIGNS_STAY_BITS = true;
#else
constexpr bool SIGNS_STAY_BITS = false;
#endif

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

struct RowSum {
  int64_t row = -1;
  double m = 0, v = 0;
};

struct Columns {  // of the run: factors, and sums to add to
  const float *col_m, *col_v;
  float *sum_m, *sum_v;
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

// A run of a matrix row: operands as fp32, signs as bytes or packed; in their place or in this buffer.
class Run {
 public:
  float *weight;
  const float *grad;
  uint8_t *sign = nullptr;  // a byte each
  uint8_t *bits = nullptr;  // or packed, where a packed run begins on a byte and SIGNS_STAY_BITS

  void open(const SweepTask &task, int64_t row, int64_t col, int64_t n) {
    row_ = row, col_ = col, n_ = n;
    weight = load(task.weights, row, col, n, weight_room_);
    grad = load(task.grads, row, col, n, grad_room_);
    if (!task.sign) return;
    uint8_t *signs = task.sign + row * task.sign_stride;
    bits = SIGNS_STAY_BITS && task.packed && col % 8 == 0 ? signs + col / 8 : nullptr;
    if (bits) return;
    sign = task.packed ? sign_room_ + col % 8 : signs + col;
    if (task.packed) unpack_signs(sign_room_, signs + col / 8, bytes());
  }

  void close(const SweepTask &task) {
    store(task.weights, row_, col_, n_, weight);
    if (task.sign && task.packed && !bits)
      pack_signs(task.sign + row_ * task.sign_stride + col_ / 8, sign_room_, bytes());
  }

 private:
  int64_t bytes() const { return (col_ % 8 + n_ + 7) / 8; }

  int64_t row_, col_, n_;
  alignas(64) float weight_room_[BLOCK];
  alignas(64) float grad_room_[BLOCK];
  alignas(64) uint8_t sign_room_[BLOCK + 16];
};

}  // namespace hardy
