// GPT-2's activation.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace shoal {

// GELU by its formula with tanh: x / (1 + exp(-2 u)), with a power that cannot overflow.
inline Floats gelu(Floats x) {
  Floats twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);
  Floats e = exponential(twice < 0.0f ? twice : -twice);
  return x * (twice < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

template <class Number>
void gelu(const Number* x, Number* y, int64_t count) {
#pragma omp parallel for
  for (int64_t at = 0; at < count; at += LANES) {
    if (at + LANES <= count) {
      put(y + at, gelu(get(x + at)));
      continue;
    }
    Number rest[LANES] = {};
    std::memcpy(rest, x + at, (count - at) * sizeof(Number));
    put(rest, gelu(get(rest)));
    std::memcpy(y + at, rest, (count - at) * sizeof(Number));
  }
}

}  // namespace shoal
