// Decode attention over live positions, and the writing of new keys and values.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace shoal {

// How keys and values are kept. A row of int8 ends with the float by which its numbers count.
struct KeptFloat32 {
  static constexpr int64_t bytes(int64_t dim) { return 4 * dim; }
  static constexpr bool HAS_FACTOR = false;
  static Floats several(const char* row, int64_t i) {
    return load(reinterpret_cast<const float*>(row) + i);
  }
  static float one(const char* row, int64_t i) { return reinterpret_cast<const float*>(row)[i]; }
  static float factor(const char*, int64_t) { return 1.0f; }
};

struct KeptBFloat16 {
  static constexpr int64_t bytes(int64_t dim) { return 2 * dim; }
  static constexpr bool HAS_FACTOR = false;
  static Floats several(const char* row, int64_t i) {
    return widened(reinterpret_cast<const uint16_t*>(row) + i);
  }
  static float one(const char* row, int64_t i) {
    return widened(reinterpret_cast<const uint16_t*>(row)[i]);
  }
  static float factor(const char*, int64_t) { return 1.0f; }
};

// Half precision as the compiler knows it: one instruction where the processor has it.
struct KeptFloat16 {
  static constexpr int64_t bytes(int64_t dim) { return 2 * dim; }
  static constexpr bool HAS_FACTOR = false;
  static Floats several(const char* row, int64_t i) {
#if defined(__AVX512F__)
    auto* halves = reinterpret_cast<const __m256i*>(row + 2 * i);
    return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(halves)));
#elif defined(__AVX2__) && defined(__F16C__)
    return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * i))));
#else
    typedef _Float16 Halves __attribute__((vector_size(2 * LANES), aligned(2)));
    return __builtin_convertvector(*reinterpret_cast<const Halves*>(row + 2 * i), Floats);
#endif
  }
  static float one(const char* row, int64_t i) {
    return float(reinterpret_cast<const _Float16*>(row)[i]);
  }
  static float factor(const char*, int64_t) { return 1.0f; }
};

struct KeptInt8 {
  static constexpr int64_t bytes(int64_t dim) { return dim + 4; }
  static constexpr bool HAS_FACTOR = true;
  static Floats several(const char* row, int64_t i) {
#if defined(__AVX512F__)
    __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
    return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(numbers)));
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i numbers = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + i));
    return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(numbers)));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
    Bytes numbers = *reinterpret_cast<const Bytes*>(row + i);
    return __builtin_convertvector(__builtin_convertvector(numbers, Ints), Floats);
#endif
  }
  static float one(const char* row, int64_t i) { return float(int8_t(row[i])); }
  static float factor(const char* row, int64_t dim) {
    float x;
    std::memcpy(&x, row + dim, 4);
    return x;
  }
};

// A query times a key, in as many sums as a vector has.
template <class Kept>
Floats products(const float* query, const char* key, int64_t dim) {
  Floats first = Floats{}, second = Floats{};
  int64_t i = 0;
  for (; i + 2 * LANES <= dim; i += 2 * LANES) {
    first += load(query + i) * Kept::several(key, i);
    second += load(query + i + LANES) * Kept::several(key, i + LANES);
  }
  for (; i + LANES <= dim; i += LANES) first += load(query + i) * Kept::several(key, i);
  if (i < dim) {
    float rest = 0.0f;
    for (; i < dim; ++i) rest += query[i] * Kept::one(key, i);
    second[0] += rest;
  }
  return first + second;
}

// More than this would push out what is at work.
constexpr int64_t MOST_FETCHED = 16384;

inline void fetch(const char* from, int64_t bytes) {
  for (int64_t at = 0; at < std::min(bytes, MOST_FETCHED); at += 64)
    __builtin_prefetch(from + at, 0, 3);
}

// The weighted sum of some values' part, as many vectors wide as registers hold.
template <class Kept, int64_t WIDTH>
void add_up(const float* weights, const char* values, int64_t length, int64_t row_bytes, int64_t at,
            float share, float* output) {
  Floats sums[WIDTH];
  for (int64_t v = 0; v < WIDTH; ++v) sums[v] = Floats{};
  for (int64_t position = 0; position < length; ++position) {
    const char* row = values + position * row_bytes;
    Floats weight = all(weights[position]);
    for (int64_t v = 0; v < WIDTH; ++v) sums[v] += weight * Kept::several(row, at + v * LANES);
  }
  for (int64_t v = 0; v < WIDTH; ++v) store(output + at + v * LANES, sums[v] * share);
}

// Scores to weights, not yet divided by their sum, which is returned. Those behind the length, up to
// a whole vector, are minus infinity.
inline float exponentials(float* scores, int64_t length) {
  Floats none = all(-std::numeric_limits<float>::infinity()), most = none, totals = Floats{};
  for (int64_t at = 0; at < length; at += LANES) {
    Floats score = load(scores + at);
    most = score > most ? score : most;
  }
  float largest = most[0];
  for (int64_t i = 1; i < LANES; ++i) largest = std::max(largest, most[i]);
  for (int64_t at = 0; at < length; at += LANES) {
    Floats score = load(scores + at);
    Floats weight = exponential(score - largest);
    weight = score == none ? Floats{} : weight;
    totals += weight;
    store(scores + at, weight);
  }
  return sum(totals);
}

// One query's scores of the positions of a vector, the last of them there.
template <class Kept>
Floats scores(const float* query, const char* keys, int64_t dim, int64_t there, float scale) {
  int64_t row_bytes = Kept::bytes(dim);
  Floats sums[LANES];
  if (there == LANES) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < LANES; ++i) sums[i] = products<Kept>(query, keys + i * row_bytes, dim);
  } else {
    for (int64_t i = 0; i < LANES; ++i) sums[i] = Floats{};
    for (int64_t i = 0; i < there; ++i) sums[i] = products<Kept>(query, keys + i * row_bytes, dim);
  }
  Floats found = sums_of(sums) * scale;
  for (int64_t i = 0; Kept::HAS_FACTOR && i < there; ++i)
    found[i] *= Kept::factor(keys + i * row_bytes, dim);
  for (int64_t i = there; i < LANES; ++i) found[i] = -std::numeric_limits<float>::infinity();
  return found;
}

// Attend with one query. `weights` has room for all positions, rounded up to whole vectors. Rows
// that are read next are fetched: the processor's own guesses end at each page.
template <class Kept>
void attend_head(const float* query, const char* keys, const char* values, float* output,
                 float* weights, int64_t length, int64_t key_dim, int64_t value_dim, float scale,
                 const char* next, int64_t next_bytes) {
  int64_t key_bytes = Kept::bytes(key_dim), value_bytes = Kept::bytes(value_dim);
  for (int64_t start = 0; start < length; start += LANES) {
    int64_t there = std::min(LANES, length - start);
    fetch(values + start * value_bytes, there * value_bytes);
    store(weights + start, scores<Kept>(query, keys + start * key_bytes, key_dim, there, scale));
  }
  fetch(next, next_bytes);
  float share = 1.0f / exponentials(weights, length);
  for (int64_t position = 0; Kept::HAS_FACTOR && position < length; ++position)
    weights[position] *= Kept::factor(values + position * value_bytes, value_dim);
  int64_t at = 0;
  for (; at + 8 * LANES <= value_dim; at += 8 * LANES)
    add_up<Kept, 8>(weights, values, length, value_bytes, at, share, output);
  for (; at + 4 * LANES <= value_dim; at += 4 * LANES)
    add_up<Kept, 4>(weights, values, length, value_bytes, at, share, output);
  for (; at + LANES <= value_dim; at += LANES)
    add_up<Kept, 1>(weights, values, length, value_bytes, at, share, output);
  for (; at < value_dim; ++at) {
    float x = 0.0f;
    for (int64_t position = 0; position < length; ++position)
      x += weights[position] * Kept::one(values + position * value_bytes, at);
    output[at] = x * share;
  }
}

template <class Kept>
void attend(const float* query, const char* keys, const char* values, float* output,
            const int64_t* positions, int64_t slots, int64_t heads, int64_t kv_heads,
            int64_t kv_len, int64_t key_dim, int64_t value_dim, float scale) {
  int64_t group = heads / kv_heads, units = slots * kv_heads;
  // Many in a row, since what is fetched for the next one is wasted where another thread takes it.
  int64_t in_a_row = std::max<int64_t>(4, units / 64);
#pragma omp parallel
  {
    std::vector<float> weights(kv_len + LANES);
#pragma omp for schedule(dynamic, in_a_row) nowait
    for (int64_t unit = 0; unit < units; ++unit) {
      int64_t length = positions[unit / kv_heads] + 1;
      const char* next = keys + (unit + 1) * kv_len * Kept::bytes(key_dim);
      for (int64_t i = 0; i < group; ++i) {
        int64_t head = unit * group + i;
        // The last of those who share keys looks ahead to the next ones.
        bool looks = i + 1 == group && unit + 1 < units;
        int64_t next_length = looks ? positions[(unit + 1) / kv_heads] + 1 : 0;
        attend_head<Kept>(query + head * key_dim, keys + unit * kv_len * Kept::bytes(key_dim),
                          values + unit * kv_len * Kept::bytes(value_dim),
                          output + head * value_dim, weights.data(), length, key_dim, value_dim,
                          scale, next, next_length * Kept::bytes(key_dim));
      }
    }
  }
}

// Prompts: every position attends to itself and to those before it.
//
// Some queries, one after the other, share the keys and values that are read for them. What each
// gets does not depend on the others, nor on how many there are.
constexpr int64_t QUERIES = 4, WIDTH = LANES == 16 ? 4 : 2;

// Where a prompt's numbers lie: `[position][dim]` of one head, in numbers from one to the next.
template <class Number>
struct Rows {
  const Number* first;
  int64_t stride;
  const Number* at(int64_t position) const { return first + position * stride; }
};

template <class Number>
inline float one(const Number* at);
template <>
inline float one(const float* at) { return *at; }
template <>
inline float one(const uint16_t* at) { return widened(*at); }

// Scores of some queries `[QUERIES][dim]` at the positions of one vector.
template <class Number>
void scores(const float* queries, Rows<Number> keys, int64_t dim, int64_t start, int64_t there,
            float scale, float* found, int64_t found_stride) {
  Floats sums[QUERIES][LANES];
  for (int64_t i = 0; i < LANES; ++i) {
    // Behind the end the last one again; nobody asks for that score.
    const Number* key = keys.at(start + std::min(i, there - 1));
    Floats now[QUERIES];
    for (int64_t q = 0; q < QUERIES; ++q) now[q] = Floats{};
    int64_t at = 0;
    for (; at + LANES <= dim; at += LANES) {
      Floats numbers = get(key + at);
      for (int64_t q = 0; q < QUERIES; ++q) now[q] += load(queries + q * dim + at) * numbers;
    }
    for (; at < dim; ++at)
      for (int64_t q = 0; q < QUERIES; ++q) now[q][0] += queries[q * dim + at] * one(key + at);
    for (int64_t q = 0; q < QUERIES; ++q) sums[q][i] = now[q];
  }
  for (int64_t q = 0; q < QUERIES; ++q) store(found + q * found_stride, sums_of(sums[q]) * scale);
}

// The weighted sums of some values' part, as many vectors wide as registers hold.
template <class Number, int64_t VECTORS_WIDE>
void add_up(const float* weights, int64_t weights_stride, Rows<Number> values, int64_t length,
            int64_t at, const float* shares, float* output, int64_t output_stride) {
  Floats sums[QUERIES][VECTORS_WIDE];
  for (int64_t q = 0; q < QUERIES; ++q)
    for (int64_t v = 0; v < VECTORS_WIDE; ++v) sums[q][v] = Floats{};
  for (int64_t position = 0; position < length; ++position) {
    const Number* value = values.at(position) + at;
    for (int64_t v = 0; v < VECTORS_WIDE; ++v) {
      Floats numbers = get(value + v * LANES);
      for (int64_t q = 0; q < QUERIES; ++q)
        sums[q][v] += all(weights[q * weights_stride + position]) * numbers;
    }
  }
  for (int64_t q = 0; q < QUERIES; ++q)
    for (int64_t v = 0; v < VECTORS_WIDE; ++v)
      store(output + q * output_stride + at + v * LANES, sums[q][v] * shares[q]);
}

// What some positions of a prompt get. `scratch` holds queries, weights and results.
template <class Number>
void attend_some(Rows<Number> queries, Rows<Number> keys, Rows<Number> values, Number* output,
                 int64_t output_stride, float* scratch, int64_t first, int64_t count,
                 int64_t longest, int64_t key_dim, int64_t value_dim, float scale) {
  float *wide = scratch, *weights = wide + QUERIES * key_dim;
  float* results = weights + QUERIES * longest;
  for (int64_t q = 0; q < QUERIES; ++q) {
    const Number* query = queries.at(first + std::min(q, count - 1));
    for (int64_t i = 0; i < key_dim; ++i) wide[q * key_dim + i] = one(query + i);
  }
  int64_t length = first + count;
  for (int64_t start = 0; start < length; start += LANES)
    scores(wide, keys, key_dim, start, std::min(LANES, length - start), scale, weights + start,
           longest);
  float shares[QUERIES];
  for (int64_t q = 0; q < QUERIES; ++q) {
    float* mine = weights + q * longest;
    int64_t seen = first + std::min(q, count - 1) + 1, end = ceiled(length, LANES) * LANES;
    std::fill(mine + seen, mine + end, -std::numeric_limits<float>::infinity());
    shares[q] = 1.0f / exponentials(mine, seen);
    std::fill(mine + seen, mine + end, 0.0f);
  }
  int64_t at = 0;
  for (; at + WIDTH * LANES <= value_dim; at += WIDTH * LANES)
    add_up<Number, WIDTH>(weights, longest, values, length, at, shares, results, value_dim);
  for (; at + LANES <= value_dim; at += LANES)
    add_up<Number, 1>(weights, longest, values, length, at, shares, results, value_dim);
  for (; at < value_dim; ++at)
    for (int64_t q = 0; q < QUERIES; ++q) {
      float x = 0.0f;
      for (int64_t position = 0; position < length; ++position)
        x += weights[q * longest + position] * one(values.at(position) + at);
      results[q * value_dim + at] = x * shares[q];
    }
  for (int64_t q = 0; q < count; ++q) {
    Number* to = output + q * output_stride;
    int64_t i = 0;
    for (; i + LANES <= value_dim; i += LANES) put(to + i, load(results + q * value_dim + i));
    for (; i < value_dim; ++i) put(to + i, results[q * value_dim + i]);
  }
}

// Strides of `[rows, head, position, dim]`, in numbers.
struct Strides {
  int64_t row, head, position;
};

template <class Number>
void attend_prompts(const Number* query, Strides of_query, const Number* key, Strides of_key,
                    const Number* value, Strides of_value, Number* output, const int64_t* lengths,
                    int64_t rows, int64_t heads, int64_t kv_heads, int64_t length, int64_t key_dim,
                    int64_t value_dim, float scale) {
  int64_t longest = ceiled(length, LANES) * LANES, blocks = ceiled(length, QUERIES);
#pragma omp parallel
  {
    std::vector<float> scratch(QUERIES * (key_dim + longest + value_dim));
#pragma omp for schedule(dynamic) nowait
    for (int64_t unit = 0; unit < rows * heads; ++unit) {
      int64_t row = unit / heads, head = unit % heads, kv_head = head / (heads / kv_heads);
      // [rows, position, head, dim]
      Number* to = output + (row * length * heads + head) * value_dim;
      Rows<Number> queries{query + row * of_query.row + head * of_query.head, of_query.position};
      Rows<Number> keys{key + row * of_key.row + kv_head * of_key.head, of_key.position};
      Rows<Number> values{value + row * of_value.row + kv_head * of_value.head, of_value.position};
      for (int64_t block = 0; block < blocks; ++block) {
        int64_t first = block * QUERIES, count = std::min(QUERIES, lengths[row] - first);
        if (count > 0)
          attend_some(queries, keys, values, to + first * heads * value_dim, heads * value_dim,
                      scratch.data(), first, count, longest, key_dim, value_dim, scale);
        for (int64_t i = std::max<int64_t>(0, count); i < std::min(QUERIES, length - first); ++i)
          std::fill_n(to + (first + i) * heads * value_dim, value_dim, Number{});
      }
    }
  }
}

// How a row of new keys or values becomes one of the cache, of so many bytes.
typedef void (*Keep)(const char* row, char* kept, int64_t bytes);

inline void copied(const char* row, char* kept, int64_t bytes) { std::memcpy(kept, row, bytes); }

// As `quantized` in quantized.py does it, to the bit where all numbers are finite.
template <class From>
void quantized(const char* row, char* kept, int64_t bytes) {
  int64_t dim = bytes - 4, i = 0;
  Floats most = Floats{}, nothing = Floats{};
  for (; i + LANES <= dim; i += LANES) {
    Floats x = From::several(row, i), size = x < Floats{} ? -x : x;
    most = size > most ? size : most;
    nothing += x - x;
  }
  // What is no number, or no end of it, makes the whole row none.
  float largest = 0.0f, none = sum(nothing);
  for (int64_t lane = 0; lane < LANES; ++lane) largest = std::max(largest, most[lane]);
  for (; i < dim; ++i) {
    float x = From::one(row, i);
    largest = std::max(largest, std::fabs(x));
    none += x - x;
  }
  float factor = largest / 127.0f + none;
  float unit = std::max(factor, std::numeric_limits<float>::min());
  for (i = 0; i + LANES <= dim; i += LANES) narrow(kept + i, From::several(row, i) / unit);
  for (; i < dim; ++i) kept[i] = char(std::lrintf(From::one(row, i) / unit));
  std::memcpy(kept + dim, &factor, 4);
}

// New keys or values: those of a computed row's prompt to a slot, or each slot's one to its own
// position.
struct Cache {
  char* first;
  int64_t heads, kv_len, row_bytes;
  char* at(int64_t slot, int64_t head, int64_t position) const {
    return first + ((slot * heads + head) * kv_len + position) * row_bytes;
  }
};

inline void write_prompts(const char* states, Strides bytes, Keep keep, Cache cache,
                          const int64_t* slots, const int64_t* source, const int64_t* lengths,
                          int64_t rows) {
#pragma omp parallel for schedule(dynamic)
  for (int64_t unit = 0; unit < rows * cache.heads; ++unit) {
    int64_t row = unit / cache.heads, head = unit % cache.heads;
    // Rows that are not in use repeat the first.
    if (row > 0 && slots[row] == slots[0]) continue;
    const char* from = states + source[row] * bytes.row + head * bytes.head;
    for (int64_t position = 0; position < lengths[source[row]]; ++position)
      keep(from + position * bytes.position, cache.at(slots[row], head, position),
           cache.row_bytes);
  }
}

inline void append(const char* states, int64_t slot_stride, int64_t head_stride, Keep keep,
                   Cache cache, const int64_t* positions, int64_t slots) {
#pragma omp parallel for
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int64_t head = 0; head < cache.heads; ++head)
      keep(states + slot * slot_stride + head * head_stride,
           cache.at(slot, head, positions[slot]), cache.row_bytes);
}

}  // namespace shoal
