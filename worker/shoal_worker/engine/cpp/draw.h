// Drawing a token: the first k in order, then the limits of top-p and min-p, then Gumbel noise.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace shoal {

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
inline int64_t first_in_order(const float* logits, int64_t vocab, int64_t count, Candidate* found) {
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
    if (any(above))
      for (int64_t i = 0; i < 4 * LANES; ++i) offer(token_id + i);
  }
  while (token_id < vocab) offer(token_id++);
  return num_found;
}

struct Params {
  const double *temperature, *top_p, *log_min_p;
  const int64_t *top_k, *seed, *sample;
};

inline int64_t drawn(const float* logits, int64_t vocab, int64_t max_top_k, const Params& params,
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

}  // namespace shoal
