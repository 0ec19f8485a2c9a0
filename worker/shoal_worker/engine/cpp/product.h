// Products with packed weights: a linear layer over the rows that somebody reads.
//
// A number of the depth is one unit of 32 bits: a float32, or two bfloat16 that the processor
// multiplies and adds in one instruction. Weights lie in panels of some columns; a tile of rows
// times a panel keeps its sums in registers, and each unit of the depth feeds all of them. A sum's
// order follows from the depth alone.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace shoal {

// 24 sums of 16 fill the 32 registers of AVX-512 beside what feeds them, 12 of 8 the 16 of AVX2.
constexpr int64_t ROWS = LANES == 16 ? 8 : 4, VECTORS = 3, COLUMNS = VECTORS * LANES;
// A panel's part of the depth stays in the first cache (24 KiB), a block of rows in the second.
constexpr int64_t DEPTH = 6144 / COLUMNS, BLOCK_ROWS = 128, PANELS_AT_ONCE = 4;
constexpr int64_t STEPS = 8, LINE = 64 / sizeof(float);

// Left alone, the compiler loads a vector anew for each product that it is in.
#if defined(__AVX512F__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#elif defined(__AVX__)
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))
#else
#define IN_REGISTER(vector)
#endif

struct Float32 {
  typedef float Number;
  static constexpr int64_t IN_UNIT = 1;
  static Floats add(Floats sums, Floats x, Floats w) { return sums + x * w; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  typedef uint16_t Number;
  static constexpr int64_t IN_UNIT = 2;
  static Floats add(Floats sums, Floats x, Floats w) {
    return Floats(_mm512_dpbf16_ps(__m512(sums), (__m512bh)x, (__m512bh)w));
  }
};
#endif

// Weights come from memory once a product: while one part is used the next one is fetched.
struct Fetch {
  const float *next, *end;
  int64_t lines;  // every few steps
};

struct Sums {
  Floats of[ROWS][VECTORS];
};

// Multiply some rows by a part of a panel, and add that to the sums unless it is the first.
template <class Kind>
inline void tile(const float* const* rows, const float* w, int64_t units, Fetch fetch,
                 bool is_first, Sums& sums) {
  Floats now[ROWS][VECTORS];
  for (int64_t row = 0; row < ROWS; ++row)
    for (int64_t v = 0; v < VECTORS; ++v) now[row][v] = Floats{};
  for (int64_t from = 0; from < units; from += STEPS) {
    for (int64_t i = 0; i < fetch.lines && fetch.next < fetch.end; ++i, fetch.next += LINE)
      __builtin_prefetch(fetch.next, 0, 2);
    int64_t to = std::min(units, from + STEPS);
    for (int64_t k = from; k < to; ++k) {
      const float* at = w + k * COLUMNS;
      // Three names, because GCC 12 keeps an array of them in memory.
      static_assert(VECTORS == 3, "one name for each");
      Floats left = load(at), middle = load(at + LANES), right = load(at + 2 * LANES);
      IN_REGISTER(left);
      IN_REGISTER(middle);
      IN_REGISTER(right);
#pragma GCC unroll 8
      for (int64_t row = 0; row < ROWS; ++row) {
        Floats x = all(rows[row][k]);
        now[row][0] = Kind::add(now[row][0], x, left);
        now[row][1] = Kind::add(now[row][1], x, middle);
        now[row][2] = Kind::add(now[row][2], x, right);
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t row = 0; row < ROWS; ++row)
    for (int64_t v = 0; v < VECTORS; ++v)
      sums.of[row][v] = is_first ? now[row][v] : sums.of[row][v] + now[row][v];
}

// A linear layer: rows of `units` units, weights in panels, and where the results go.
template <class Out>
struct Layer {
  const float *input, *panels, *bias;
  Out* output;
  int64_t columns, units;
};

// A row's columns of one panel, with the bias.
template <class Out>
inline void finish(const Layer<Out>& layer, const Floats* sums, int64_t row, int64_t column) {
  Out* to = layer.output + row * layer.columns + column;
  const float* bias = layer.bias ? layer.bias + column : nullptr;
  int64_t width = std::min(COLUMNS, layer.columns - column);
  for (int64_t c = 0; c < width; c += LANES) {
    Floats x = sums[c / LANES];
    if (c + LANES <= width) {
      put(to + c, bias ? x + load(bias + c) : x);
      continue;
    }
    for (int64_t i = 0; i < width - c; ++i) put(to + c + i, bias ? x[i] + bias[c + i] : x[i]);
  }
}

// Some columns of some rows. `partial` holds the sums so far, a tile after the other.
template <class Kind, class Out>
void multiply(const Layer<Out>& layer, const int64_t* rows, int64_t num_rows, int64_t first_panel,
              int64_t end_panel, Sums* partial) {
  int64_t tiles = ceiled(num_rows, ROWS);
  const float* panels_end =
      layer.panels + ceiled(layer.columns, COLUMNS) * layer.units * COLUMNS;
  for (int64_t k = 0; k < layer.units; k += DEPTH) {
    int64_t part = std::min(DEPTH, layer.units - k);
    bool is_first = k == 0, is_last = k + part == layer.units;
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const float* w = layer.panels + (panel * layer.units + k) * COLUMNS;
      const float* next = w + layer.units * COLUMNS;
      if (panel + 1 == end_panel && !is_last)
        next = layer.panels + (first_panel * layer.units + k + DEPTH) * COLUMNS;
      else if (panel + 1 == end_panel)
        next = layer.panels + end_panel * layer.units * COLUMNS;
      // Each tile fetches its share of the next part.
      int64_t lines = ceiled(part * COLUMNS, tiles * LINE);
      int64_t column = panel * COLUMNS;
      for (int64_t t = 0; t < tiles; ++t) {
        const float* from[ROWS];
        int64_t there = std::min(ROWS, num_rows - t * ROWS);
        for (int64_t i = 0; i < ROWS; ++i)
          from[i] = layer.input + rows[t * ROWS + std::min(i, there - 1)] * layer.units + k;
        const float* end = std::min(next + lines * LINE, panels_end);
        Sums& sums = partial[(panel - first_panel) * tiles + t];
        tile<Kind>(from, w, part, {next, end, ceiled(lines * STEPS, part)}, is_first, sums);
        next = end;
        for (int64_t i = 0; i < there && is_last; ++i)
          finish(layer, sums.of[i], rows[t * ROWS + i], column);
      }
    }
  }
}

// Rows that are not live (null: all are) cost nothing and become zeros.
template <class Kind, class Out>
void multiply(const Layer<Out>& layer, const bool* live, int64_t num_rows, int64_t threads) {
  std::vector<int64_t> rows, left_out;
  for (int64_t row = 0; row < num_rows; ++row) (!live || live[row] ? rows : left_out).push_back(row);
  int64_t zeros = left_out.size(), panels = ceiled(layer.columns, COLUMNS);
  int64_t blocks = ceiled(rows.size(), BLOCK_ROWS);
  // Some pieces for each thread, as large as they may be.
  int64_t pieces = ceiled(4 * threads, std::max<int64_t>(1, blocks));
  int64_t at_once = std::min(PANELS_AT_ONCE, std::max<int64_t>(1, panels / pieces));
  int64_t groups = ceiled(panels, at_once);
#pragma omp parallel
  {
    std::vector<Sums> partial(at_once * BLOCK_ROWS / ROWS);
#pragma omp for nowait
    for (int64_t i = 0; i < zeros; ++i)
      std::fill_n(layer.output + left_out[i] * layer.columns, layer.columns, Out{});
#pragma omp for schedule(dynamic) nowait
    for (int64_t piece = 0; piece < blocks * groups; ++piece) {
      int64_t block = piece / groups * BLOCK_ROWS, group = piece % groups;
      int64_t count = std::min<int64_t>(BLOCK_ROWS, rows.size() - block);
      multiply<Kind>(layer, rows.data() + block, count, group * at_once,
                     std::min(panels, (group + 1) * at_once), partial.data());
    }
  }
}

}  // namespace shoal
