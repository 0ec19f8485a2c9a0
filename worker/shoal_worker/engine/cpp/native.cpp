// The CPU engine's inner loops: products with packed weights, decode attention over live positions,
// and drawing tokens. Plain C functions over pointers and strides, so that they build in seconds
// and against no version of torch. No sum's order depends on a thread, on another row or on how
// many rows there are: a row's bits follow from the row alone.

#include "activation.h"
#include "attention.h"
#include "draw.h"
#include "product.h"

using namespace shoal;

namespace {

Strides strides(const int64_t* of) { return {of[0], of[1], of[2]}; }

// What is of the cache's type (-1) is copied, other numbers (as in `shoal_attend`) become int8.
Keep keeping(int64_t from) {
  return from == -1  ? copied
         : from == 0 ? quantized<KeptFloat32>
         : from == 1 ? quantized<KeptBFloat16>
                     : quantized<KeptFloat16>;
}

}  // namespace

extern "C" {

// Columns of a panel of weights.
int shoal_panel() { return COLUMNS; }

// Whether weights and inputs may be bfloat16.
int shoal_multiplies_bfloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// output[rows, columns] = input[rows, depth] times the packed weights, plus bias (or null). Weights
// are [panel, units, columns of a panel] of 32 bits. Rows that are not live (null: all are) become
// zeros.
void shoal_product(const float* input, const float* panels, const float* bias, const bool* live,
                   float* output, int64_t rows, int64_t columns, int64_t units, int64_t threads) {
  multiply<Float32, float>({input, panels, bias, output, columns, units}, live, rows, threads);
}

#if defined(__AVX512BF16__)
// The same in bfloat16, two in a unit.
void shoal_product_bfloat16(const float* input, const float* panels, const float* bias,
                            const bool* live, uint16_t* output, int64_t rows, int64_t columns,
                            int64_t units, int64_t threads) {
  multiply<BFloat16, uint16_t>({input, panels, bias, output, columns, units}, live, rows, threads);
}

// And with results in float32.
void shoal_product_widened(const float* input, const float* panels, const float* bias,
                           const bool* live, float* output, int64_t rows, int64_t columns,
                           int64_t units, int64_t threads) {
  multiply<BFloat16, float>({input, panels, bias, output, columns, units}, live, rows, threads);
}
#endif

// query [slots, head, key_dim], keys [slots, kv_head, kv_len, key_dim], values likewise, all
// contiguous; kept says how keys and values are: 0 float32, 1 bfloat16, 2 int8, 3 float16.
void shoal_attend(const float* query, const char* keys, const char* values, float* output,
                  const int64_t* positions, int64_t slots, int64_t heads, int64_t kv_heads,
                  int64_t kv_len, int64_t key_dim, int64_t value_dim, float scale, int64_t kept) {
  auto* function = kept == 0   ? attend<KeptFloat32>
                   : kept == 1 ? attend<KeptBFloat16>
                   : kept == 2 ? attend<KeptInt8>
                               : attend<KeptFloat16>;
  function(query, keys, values, output, positions, slots, heads, kv_heads, kv_len, key_dim,
           value_dim, scale);
}

// query [rows, head, length, key_dim], key and value likewise, each with its strides of row, head and
// position; output [rows, length, head, value_dim]. What is behind a row's length becomes zeros.
void shoal_attend_prompts(const float* query, const int64_t* of_query, const float* key,
                          const int64_t* of_key, const float* value, const int64_t* of_value,
                          float* output, const int64_t* lengths, int64_t rows, int64_t heads,
                          int64_t kv_heads, int64_t length, int64_t key_dim, int64_t value_dim,
                          float scale) {
  attend_prompts(query, strides(of_query), key, strides(of_key), value, strides(of_value), output,
                 lengths, rows, heads, kv_heads, length, key_dim, value_dim, scale);
}

void shoal_attend_prompts_bfloat16(const uint16_t* query, const int64_t* of_query,
                                   const uint16_t* key, const int64_t* of_key,
                                   const uint16_t* value, const int64_t* of_value,
                                   uint16_t* output, const int64_t* lengths, int64_t rows,
                                   int64_t heads, int64_t kv_heads, int64_t length,
                                   int64_t key_dim, int64_t value_dim, float scale) {
  attend_prompts(query, strides(of_query), key, strides(of_key), value, strides(of_value), output,
                 lengths, rows, heads, kv_heads, length, key_dim, value_dim, scale);
}

// states [rows, kv_head, length, numbers] with these strides in bytes, into
// cache [slots, kv_head, kv_len, numbers]; `from` says what becomes int8 there, see `keeping`.
void shoal_write_prompts(const char* states, const int64_t* bytes, char* cache,
                         const int64_t* slots, const int64_t* source, const int64_t* lengths,
                         int64_t rows, int64_t heads, int64_t kv_len, int64_t row_bytes,
                         int64_t from) {
  write_prompts(states, strides(bytes), keeping(from), {cache, heads, kv_len, row_bytes}, slots,
                source, lengths, rows);
}

// states [slots, kv_head, numbers] with these strides in bytes, likewise.
void shoal_append(const char* states, int64_t slot_stride, int64_t head_stride, char* cache,
                  const int64_t* positions, int64_t slots, int64_t heads, int64_t kv_len,
                  int64_t row_bytes, int64_t from) {
  append(states, slot_stride, head_stride, keeping(from), {cache, heads, kv_len, row_bytes},
         positions, slots);
}

void shoal_gelu(const float* x, float* y, int64_t count) { gelu(x, y, count); }

void shoal_gelu_bfloat16(const uint16_t* x, uint16_t* y, int64_t count) { gelu(x, y, count); }

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
