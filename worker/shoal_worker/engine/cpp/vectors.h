// Vectors as wide as the processor's, with the compiler's own arithmetic on them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace shoal {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }
inline void store(float* at, Floats x) { *reinterpret_cast<Floats*>(at) = x; }

// The bits of x in every place.
inline Floats all(float x) {
#if defined(__AVX512F__)
  return Floats(_mm512_set1_ps(x));
#else
  return Floats{x, x, x, x, x, x, x, x};
#endif
}

inline float sum(Floats x) {
  typedef float Eight __attribute__((vector_size(32), aligned(4)));
  Eight half;
#if defined(__AVX512F__)
  Eight halves[2];
  std::memcpy(halves, &x, sizeof(halves));
  half = halves[0] + halves[1];
#else
  half = x;
#endif
  return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

// The sums of as many vectors as a vector has places, each added in the same order.
inline Floats sums_of(const Floats* x) {
#if defined(__AVX512F__)
  __m512 pairs[8], fours[4], eights[2];
  for (int64_t i = 0; i < 8; ++i) {
    __m512 a = __m512(x[2 * i]), b = __m512(x[2 * i + 1]);
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int64_t i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int64_t i = 0; i < 2; ++i) {
    __m512 a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  return Floats(_mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                              _mm512_shuffle_f32x4(eights[0], eights[1], 0xDD)));
#elif defined(__AVX2__) && defined(__F16C__)
  __m256 pairs[4], fours[2];
  for (int64_t i = 0; i < 4; ++i) {
    __m256 a = __m256(x[2 * i]), b = __m256(x[2 * i + 1]);
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int64_t i = 0; i < 2; ++i) {
    __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                             _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return Floats(_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                              _mm256_permute2f128_ps(fours[0], fours[1], 0x31)));
#else
  Floats sums;
  for (int64_t i = 0; i < LANES; ++i) sums[i] = sum(x[i]);
  return sums;
#endif
}

// Whether any place holds something other than zero.
inline bool any(Ints x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(x), __m512i(x)) != 0;
#else
  int64_t pairs[LANES / 2];
  std::memcpy(pairs, &x, sizeof(pairs));
  return (pairs[0] | pairs[1] | pairs[2] | pairs[3]) != 0;
#endif
}

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

inline int64_t ceiled(int64_t n, int64_t size) { return (n + size - 1) / size; }

// bfloat16: the upper half of a float32.
inline Floats widened(const uint16_t* at) {
  // Left alone, GCC 12 makes two halves of it and puts them together again.
#if defined(__AVX512F__)
  __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return Floats(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
#elif defined(__AVX2__) && defined(__F16C__)
  __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return Floats(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
  Ints wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Ints) << 16;
  Floats x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
#endif
}

inline float widened(uint16_t half) {
  uint32_t wide = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Rounded to the nearest, ties to even; what is no number stays none.
inline uint16_t narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void narrow(uint16_t* at, Floats x) {
#if defined(__AVX512BF16__)
  __m256bh halves = _mm512_cvtneps_pbh(__m512(x));
  std::memcpy(at, &halves, sizeof(halves));
#else
  for (int64_t i = 0; i < LANES; ++i) at[i] = narrowed(x[i]);
#endif
}

// To whole numbers of 8 bits, ties to even.
inline void narrow(char* at, Floats x) {
#if defined(__AVX512F__)
  __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(__m512(x)));
  std::memcpy(at, &bytes, sizeof(bytes));
#elif defined(__AVX2__) && defined(__F16C__)
  __m256i whole = _mm256_cvtps_epi32(__m256(x));
  __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packs_epi16(halves, halves));
#else
  for (int64_t i = 0; i < LANES; ++i) at[i] = char(std::lrintf(x[i]));
#endif
}

// Numbers as they are kept.
inline Floats get(const float* at) { return load(at); }
inline Floats get(const uint16_t* at) { return widened(at); }
inline void put(float* at, Floats x) { store(at, x); }
inline void put(uint16_t* at, Floats x) { narrow(at, x); }
inline void put(float* at, float x) { *at = x; }
inline void put(uint16_t* at, float x) { *at = narrowed(x); }

}  // namespace shoal
