// The CPU engine's inner loops: products with packed weights, decode attention over live positions,
// and drawing tokens. Plain C functions over pointers and strides, so that they build in seconds
// and against no version of torch. No sum's order depends on a thread, on another row or on how
// many rows there are: a row's bits follow from the row alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 8;
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }
inline void store(float* at, Floats x) { *reinterpret_cast<Floats*>(at) = x; }
inline Floats all(float x) { return Floats{x, x, x, x, x, x, x, x}; }

inline float sum(Floats x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// Left alone, the compiler loads a vector anew for each product that it is in.
#if defined(__AVX__)
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))
#else
#define IN_REGISTER(vector)
#endif

// ---- Products. Weights lie in panels of 24 columns, inputs in panels of 4 rows: 12 sums of 8
// fill the 16 registers of AVX2, and each step of the depth feeds all of them.

constexpr int64_t ROWS = 4, VECTORS = 3, COLUMNS = VECTORS * LANES;
// A panel's part of the depth stays in the first cache (24 KiB), a block of rows in the second.
constexpr int64_t DEPTH = 256, BLOCK_ROWS = 128, PANELS_AT_ONCE = 4;
constexpr int64_t STEPS = 8, LINE = 64 / sizeof(float);

// c holds the address of each row's first column. Weights come from memory once a product: while
// one part is used the next one is fetched, from next to next_end, a few lines every few steps.
inline void tile(const float* a, const float* w, float* const* c, int64_t depth, int64_t rows,
                 int64_t columns, const float* bias, bool first, const float* next,
                 const float* next_end, int64_t fetches) {
  Floats sums[ROWS][VECTORS];
  for (int64_t row = 0; row < ROWS; ++row)
    for (int64_t v = 0; v < VECTORS; ++v) sums[row][v] = Floats{};
  for (int64_t from = 0; from < depth; from += STEPS) {
    for (int64_t i = 0; i < fetches && next < next_end; ++i, next += LINE)
      __builtin_prefetch(next, 0, 2);
    int64_t to = std::min(depth, from + STEPS);
    for (int64_t k = from; k < to; ++k) {
      const float* at = w + k * COLUMNS;
      // Three names, because GCC 12 keeps an array of them in memory.
      static_assert(VECTORS == 3, "one name for each");
      Floats left = load(at), middle = load(at + LANES), right = load(at + 2 * LANES);
      IN_REGISTER(left);
      IN_REGISTER(middle);
      IN_REGISTER(right);
#pragma GCC unroll 4
      for (int64_t row = 0; row < ROWS; ++row) {
        Floats x = all(a[k * ROWS + row]);
        sums[row][0] += x * left;
        sums[row][1] += x * middle;
        sums[row][2] += x * right;
      }
    }
  }
  if (rows == ROWS && columns == COLUMNS) {
    for (int64_t row = 0; row < ROWS; ++row)
      for (int64_t v = 0; v < VECTORS; ++v) {
        float* at = c[row] + v * LANES;
        Floats before = first ? (bias ? load(bias + v * LANES) : Floats{}) : load(at);
        store(at, sums[row][v] + before);
      }
    return;
  }
  float spilled[ROWS * COLUMNS];
  std::memcpy(spilled, sums, sizeof(spilled));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      float& at = c[row][column];
      float before = first ? (bias ? bias[column] : 0.0f) : at;
      at = spilled[row * COLUMNS + column] + before;
    }
}

inline int64_t ceiled(int64_t n, int64_t size) { return (n + size - 1) / size; }


// ---- Attention.

// Cephes' expf: within two units of the last place, and the same on every processor.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? all(-87.0f) : x;
  Ints n = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, Ints);
  Floats whole = __builtin_convertvector(n, Floats);
  x -= whole * 0.693359375f;
  x -= whole * -2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * x * x + x + 1.0f;
  Ints power = (n + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return y * scale;
}

// How keys and values are kept. A row of int8 ends with the float by which its numbers count.
struct Float32 {
  static constexpr int64_t bytes(int64_t dim) { return 4 * dim; }
  static Floats eight(const char* row, int64_t i) {
    return load(reinterpret_cast<const float*>(row) + i);
  }
  static float one(const char* row, int64_t i) { return reinterpret_cast<const float*>(row)[i]; }
  static float factor(const char*, int64_t) { return 1.0f; }
};

struct BFloat16 {
  static constexpr int64_t bytes(int64_t dim) { return 2 * dim; }
  static Floats eight(const char* row, int64_t i) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
    Halves halves = *reinterpret_cast<const Halves*>(row + 2 * i);
    Ints wide = __builtin_convertvector(halves, Ints) << 16;
    Floats x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
  }
  static float one(const char* row, int64_t i) {
    uint16_t half;
    std::memcpy(&half, row + 2 * i, 2);
    uint32_t wide = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  static float factor(const char*, int64_t) { return 1.0f; }
};

// Half precision as the compiler knows it: one instruction where the processor has it.
struct Float16 {
  static constexpr int64_t bytes(int64_t dim) { return 2 * dim; }
  static Floats eight(const char* row, int64_t i) {
#if defined(__AVX2__) && defined(__F16C__)
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

struct Int8 {
  static constexpr int64_t bytes(int64_t dim) { return dim + 4; }
  static Floats eight(const char* row, int64_t i) {
#if defined(__AVX2__) && defined(__F16C__)
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

template <class Kept>
float score(const float* query, const char* key, int64_t dim) {
  Floats first = Floats{}, second = Floats{};
  int64_t i = 0;
  for (; i + 2 * LANES <= dim; i += 2 * LANES) {
    first += load(query + i) * Kept::eight(key, i);
    second += load(query + i + LANES) * Kept::eight(key, i + LANES);
  }
  for (; i + LANES <= dim; i += LANES) first += load(query + i) * Kept::eight(key, i);
  float total = sum(first + second);
  for (; i < dim; ++i) total += query[i] * Kept::one(key, i);
  return total * Kept::factor(key, dim);
}

// The weighted sum of some values' part, as many vectors wide as registers hold.
template <class Kept, int64_t WIDTH>
void add_up(const float* weights, const char* values, int64_t length, int64_t row_bytes, int64_t at,
            float* output) {
  Floats sums[WIDTH];
  for (int64_t v = 0; v < WIDTH; ++v) sums[v] = Floats{};
  for (int64_t position = 0; position < length; ++position) {
    const char* row = values + position * row_bytes;
    Floats weight = all(weights[position]);
    for (int64_t v = 0; v < WIDTH; ++v) sums[v] += weight * Kept::eight(row, at + v * LANES);
  }
  for (int64_t v = 0; v < WIDTH; ++v) store(output + at + v * LANES, sums[v]);
}

template <class Kept>
void attend_head(const float* query, const char* keys, const char* values, float* output,
                 float* weights, int64_t length, int64_t key_dim, int64_t value_dim, float scale) {
  int64_t key_bytes = Kept::bytes(key_dim), value_bytes = Kept::bytes(value_dim);
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t position = 0; position < length; ++position) {
    weights[position] = scale * score<Kept>(query, keys + position * key_bytes, key_dim);
    largest = std::max(largest, weights[position]);
  }
  Floats totals = Floats{};
  // Rounded up: the weights of what is behind the end are zero.
  for (int64_t position = length; position % LANES; ++position)
    weights[position] = -std::numeric_limits<float>::infinity();
  for (int64_t position = 0; position < length; position += LANES) {
    Floats weight = exponential(load(weights + position) - largest);
    int64_t rest = length - position;
    for (int64_t i = rest; i < LANES; ++i) weight[i] = 0.0f;
    store(weights + position, weight);
    totals += weight;
  }
  float total = sum(totals);
  for (int64_t position = 0; position < length; ++position)
    weights[position] *= Kept::factor(values + position * value_bytes, value_dim) / total;
  int64_t at = 0;
  for (; at + 8 * LANES <= value_dim; at += 8 * LANES)
    add_up<Kept, 8>(weights, values, length, value_bytes, at, output);
  for (; at + LANES <= value_dim; at += LANES)
    add_up<Kept, 1>(weights, values, length, value_bytes, at, output);
  for (; at < value_dim; ++at) {
    float x = 0.0f;
    for (int64_t position = 0; position < length; ++position)
      x += weights[position] * Kept::one(values + position * value_bytes, at);
    output[at] = x;
  }
}

template <class Kept>
void attend(const float* query, const char* keys, const char* values, float* output,
            const int64_t* positions, int64_t slots, int64_t heads, int64_t kv_heads,
            int64_t kv_len, int64_t key_dim, int64_t value_dim, float scale) {
  int64_t group = heads / kv_heads;
#pragma omp parallel
  {
    std::vector<float> weights(kv_len + LANES);
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t unit = 0; unit < slots * kv_heads; ++unit) {
      int64_t slot = unit / kv_heads;
      for (int64_t i = 0; i < group; ++i) {
        int64_t head = unit * group + i;
        attend_head<Kept>(query + head * key_dim, keys + unit * kv_len * Kept::bytes(key_dim),
                          values + unit * kv_len * Kept::bytes(value_dim),
                          output + head * value_dim, weights.data(), positions[slot] + 1, key_dim,
                          value_dim, scale);
      }
    }
  }
}

// ---- Activation.

// GELU by its formula with tanh: x / (1 + exp(-2 u)), with a power that cannot overflow.
inline Floats gelu(Floats x) {
  Floats twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);
  Floats e = exponential(twice < 0.0f ? twice : -twice);
  return x * (twice < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

// ---- Drawing.

inline uint64_t mixed(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

// Standard Gumbel noise of a token, as `random.gumbel` gives it.
struct Noise {
  static constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15u;
  uint64_t key;
  Noise(uint64_t seed, uint64_t sample, uint64_t position) {
    key = mixed(seed + GAMMA);
    key = mixed(key + (sample + 1) * GAMMA);
    key = mixed(key + (position + 1) * GAMMA);
  }
  double of(uint64_t token_id) const {
    uint64_t bits = mixed((token_id + 1) * GAMMA + key);
    double uniform = (double(bits >> 12) + 0.5) * 0x1p-52;
    return -std::log(-std::log(uniform));
  }
};

struct Candidate {
  float logit;
  int64_t token_id;
};

// The first `count` tokens in order: higher logit, then lower token id.
int64_t first_in_order(const float* logits, int64_t vocab, int64_t count, Candidate* found) {
  int64_t num_found = 0;
  auto offer = [&](int64_t token_id) {
    float logit = logits[token_id];
    if (std::isnan(logit) || (num_found == count && !(logit > found[count - 1].logit))) return;
    int64_t place = num_found < count ? num_found++ : count - 1;
    for (; place > 0 && logit > found[place - 1].logit; --place) found[place] = found[place - 1];
    found[place] = {logit, token_id};
  };
  int64_t token_id = 0;
  while (token_id < vocab && num_found < count) offer(token_id++);
  for (; token_id + 4 * LANES <= vocab; token_id += 4 * LANES) {
    Floats bound = all(found[count - 1].logit);
    Ints above = load(logits + token_id) > bound;
    for (int64_t v = 1; v < 4; ++v) above |= load(logits + token_id + v * LANES) > bound;
    int64_t any[LANES / 2];
    std::memcpy(any, &above, sizeof(any));
    if (any[0] | any[1] | any[2] | any[3])
      for (int64_t i = 0; i < 4 * LANES; ++i) offer(token_id + i);
  }
  while (token_id < vocab) offer(token_id++);
  return num_found;
}

struct Params {
  const double *temperature, *top_p, *log_min_p;
  const int64_t *top_k, *seed, *sample;
};

int64_t drawn(const float* logits, int64_t vocab, int64_t max_top_k, const Params& params,
              int64_t row, int64_t position, Candidate* found, int64_t* weights) {
  // An idle slot has a top-k of 0; what it draws nobody reads.
  int64_t top_k = std::max<int64_t>(1, std::min({params.top_k[row], max_top_k, vocab}));
  int64_t count = first_in_order(logits, vocab, top_k, found);
  if (count <= 1) return count ? found[0].token_id : 0;
  std::vector<double> scaled(count);
  for (int64_t i = 0; i < count; ++i)
    scaled[i] = double(found[i].logit - found[0].logit) / params.temperature[row];
  int64_t total = 0, before = 0;
  double share = params.top_p[row];
  for (int64_t i = 0; i < count; ++i)
    total += weights[i] = share < 1.0 ? std::llrint(std::exp(scaled[i]) * 0x1p40) : 0;
  Noise noise(params.seed[row], params.sample[row], position);
  int64_t chosen = found[0].token_id;
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    bool allowed = scaled[i] >= params.log_min_p[row] &&
                   (share >= 1.0 || double(before) < double(total) * share);
    before += weights[i];
    double reached = allowed ? scaled[i] + noise.of(found[i].token_id) : best;
    if (reached > best) best = reached, chosen = found[i].token_id;
  }
  return chosen;
}

}  // namespace

extern "C" {

// weight is [columns, depth] with these strides; packed is [panels, depth, 24].
void shoal_pack(const float* weight, int64_t column_stride, int64_t depth_stride, float* packed,
                int64_t columns, int64_t depth) {
#pragma omp parallel for
  for (int64_t panel = 0; panel < ceiled(columns, COLUMNS); ++panel)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < COLUMNS; ++i) {
        int64_t column = panel * COLUMNS + i;
        packed[(panel * depth + k) * COLUMNS + i] =
            column < columns ? weight[column * column_stride + k * depth_stride] : 0.0f;
      }
}

// c[rows, columns] = a[rows, depth] times the packed weights, plus bias (or null). Rows that are not
// live (null: all are) cost nothing and become zeros.
// scratch holds the inputs in panels: rows rounded up to a multiple of 4, times depth.
void shoal_product(const float* a, const float* packed, const float* bias, const bool* live,
                   float* scratch, float* c, int64_t rows, int64_t columns, int64_t depth) {
  std::vector<int64_t> at, left_out;
  for (int64_t row = 0; row < rows; ++row) (!live || live[row] ? at : left_out).push_back(row);
  int64_t zeros = left_out.size();
  rows = at.size();
  int64_t row_panels = ceiled(rows, ROWS), panels = ceiled(columns, COLUMNS);
  int64_t groups = ceiled(panels, PANELS_AT_ONCE);
  const float* packed_end = packed + panels * depth * COLUMNS;
#pragma omp parallel
  {
#pragma omp for nowait
    for (int64_t i = 0; i < zeros; ++i) std::fill_n(c + left_out[i] * columns, columns, 0.0f);
#pragma omp for
    for (int64_t p = 0; p < row_panels; ++p)
      for (int64_t row = 0; row < ROWS; ++row) {
        int64_t from = p * ROWS + row;
        for (int64_t k = 0; k < depth; ++k)
          scratch[(p * depth + k) * ROWS + row] = from < rows ? a[at[from] * depth + k] : 0.0f;
      }
    for (int64_t block = 0; block < rows; block += BLOCK_ROWS) {
      int64_t block_end = std::min(rows, block + BLOCK_ROWS);
      int64_t tiles = ceiled(block_end - block, ROWS);
#pragma omp for schedule(dynamic) nowait
      for (int64_t group = 0; group < groups; ++group) {
        int64_t group_end = std::min(panels, (group + 1) * PANELS_AT_ONCE);
        for (int64_t k = 0; k < depth; k += DEPTH) {
          int64_t part = std::min(DEPTH, depth - k);
          for (int64_t panel = group * PANELS_AT_ONCE; panel < group_end; ++panel) {
            const float* w = packed + (panel * depth + k) * COLUMNS;
            const float* next = w + depth * COLUMNS;
            if (panel + 1 == group_end && k + DEPTH < depth)
              next = packed + (group * PANELS_AT_ONCE * depth + k + DEPTH) * COLUMNS;
            else if (panel + 1 == group_end)
              next = packed + group_end * depth * COLUMNS;
            // Each tile fetches its share of the next part.
            int64_t lines = ceiled(part * COLUMNS, tiles * LINE);
            int64_t fetches = ceiled(lines * STEPS, part);
            int64_t column = panel * COLUMNS;
            for (int64_t row = block; row < block_end; row += ROWS) {
              float* to[ROWS];
              int64_t there = std::min(ROWS, rows - row);
              for (int64_t i = 0; i < there; ++i) to[i] = c + at[row + i] * columns + column;
              const float* next_end = std::min(next + lines * LINE, packed_end);
              tile(scratch + row * depth + k * ROWS, w, to, part, there,
                   std::min(COLUMNS, columns - column), bias ? bias + column : nullptr, k == 0,
                   next, next_end, fetches);
              next = next_end;
            }
          }
        }
      }
    }
  }
}

// query [slots, head, key_dim], keys [slots, kv_head, kv_len, key_dim], values likewise, all
// contiguous; kept says how keys and values are: 0 float32, 1 bfloat16, 2 int8, 3
// float16.
void shoal_attend(const float* query, const char* keys, const char* values, float* output,
                  const int64_t* positions, int64_t slots, int64_t heads, int64_t kv_heads,
                  int64_t kv_len, int64_t key_dim, int64_t value_dim, float scale, int64_t kept) {
  auto* function = kept == 0 ? attend<Float32> : kept == 1   ? attend<BFloat16>
                   : kept == 2 ? attend<Int8>
                               : attend<Float16>;
  function(query, keys, values, output, positions, slots, heads, kv_heads, kv_len, key_dim,
           value_dim, scale);
}

void shoal_gelu(const float* x, float* y, int64_t count) {
#pragma omp parallel for
  for (int64_t at = 0; at < count; at += LANES) {
    if (at + LANES <= count) {
      store(y + at, gelu(load(x + at)));
      continue;
    }
    float rest[LANES] = {};
    std::memcpy(rest, x + at, (count - at) * sizeof(float));
    store(rest, gelu(load(rest)));
    std::memcpy(y + at, rest, (count - at) * sizeof(float));
  }
}

// Tokens [rows] of logits whose rows are row_stride apart; parameters as in RowParams.
void shoal_draw(const float* logits, int64_t row_stride, int64_t rows, int64_t vocab,
                int64_t max_top_k, const double* temperature, const double* top_p,
                const double* log_min_p, const int64_t* top_k, const int64_t* seed,
                const int64_t* sample, const int64_t* positions, int64_t* tokens) {
  Params params{temperature, top_p, log_min_p, top_k, seed, sample};
#pragma omp parallel
  {
    std::vector<Candidate> found(max_top_k);
    std::vector<int64_t> weights(max_top_k);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t row = 0; row < rows; ++row)
      tokens[row] = drawn(logits + row * row_stride, vocab, max_top_k, params, row, positions[row],
                          found.data(), weights.data());
  }
}

}  // extern "C"
