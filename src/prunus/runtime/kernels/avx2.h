// AVX2 with FMA and F16C (Haswell, Zen and later).
//
// It works on eight columns at a time. The eight mask bits select a byte shuffle from a table, and
// the shuffle puts the values into place.
#pragma once

#include <immintrin.h>

#include <array>

#include "job.h"

#define PRUNUS_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define PRUNUS_INLINE_AVX2 __attribute__((always_inline)) inline

namespace prunus::avx2 {

// entry[mask][i] is the byte of the packed values that goes to byte i; 0x80 gives zero.
template <int kBytes>
struct Shuffle {
    alignas(64) std::array<std::array<uint8_t, 8 * kBytes>, 256> entry;
};

template <int kBytes>
constexpr Shuffle<kBytes> make_shuffle() {
    Shuffle<kBytes> table{};
    for (int mask = 0; mask < 256; ++mask) {
        int taken = 0;
        for (int column = 0; column < 8; ++column) {
            const bool kept = mask >> column & 1;
            for (int byte = 0; byte < kBytes; ++byte)
                table.entry[mask][column * kBytes + byte] =
                    uint8_t(kept ? taken * kBytes + byte : 0x80);
            taken += kept;
        }
    }
    return table;
}

inline constexpr Shuffle<2> kShuffleWords = make_shuffle<2>();
inline constexpr Shuffle<1> kShuffleBytes = make_shuffle<1>();

PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 __m128i expand(unsigned mask, const uint16_t*& values) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    values += _mm_popcnt_u32(mask);
    return _mm_shuffle_epi8(
        packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffleWords.entry[mask].data())));
}

// The low eight bytes hold the eight columns.
PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 __m128i expand(unsigned mask, const int8_t*& values) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    values += _mm_popcnt_u32(mask);
    return _mm_shuffle_epi8(
        packed,
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffleBytes.entry[mask].data())));
}

template <Kind kind>
PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 __m256 to_float(__m128i words) {
    if (kind == kF16) return _mm256_cvtph_ps(words);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 float reduce(__m256 sum) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// 16-bit float weights times float32 activations, summed in float32.
template <Kind kind, int T>
PRUNUS_TARGET_AVX2 void rows_float(const Job& job, int64_t begin, int64_t end, int64_t token) {
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* row_mask = job.mask + row * job.mask_stride;
        const uint16_t* values = row_values<uint16_t>(job, row);
        const float* x = static_cast<const float*>(job.x) + token * kSegment;
        __m256 sum[T];
#pragma GCC unroll 8
        for (auto& s : sum) s = _mm256_setzero_ps();
        for (int64_t segment = 0; segment < job.segments; ++segment, x += job.tokens * kSegment) {
            const uint64_t word = mask_word(row_mask, segment, job.cols);
            for (int byte = 0; byte < 8; ++byte) {
                const __m256 weights =
                    to_float<kind>(expand(unsigned(word >> 8 * byte & 255), values));
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t)
                    sum[t] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + t * kSegment + 8 * byte),
                                             sum[t]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) job.sums[(token + t) * job.rows + row] = reduce(sum[t]);
    }
}

// int8 weights times int16 activations: exact int32 sums over a group, then the group's scale.
template <int T>
PRUNUS_TARGET_AVX2 void rows_int8(const Job& job, int64_t begin, int64_t end, int64_t token) {
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* row_mask = job.mask + row * job.mask_stride;
        const int8_t* values = row_values<int8_t>(job, row);
        const int16_t* x = static_cast<const int16_t*>(job.x) + token * kSegment;
        const float* x_scale = job.x_scales + token;
        __m256 sum[T];
#pragma GCC unroll 8
        for (auto& s : sum) s = _mm256_setzero_ps();
        for (int64_t first = 0; first < job.segments; first += kGroup, x_scale += job.tokens) {
            const int64_t last = first + kGroup < job.segments ? first + kGroup : job.segments;
            __m256i dot[T];
#pragma GCC unroll 8
            for (auto& d : dot) d = _mm256_setzero_si256();
            for (int64_t segment = first; segment < last; ++segment, x += job.tokens * kSegment) {
                const uint64_t word = mask_word(row_mask, segment, job.cols);
                for (int byte = 0; byte < 8; byte += 2) {
                    const __m128i left = expand(unsigned(word >> 8 * byte & 255), values);
                    const __m128i right = expand(unsigned(word >> 8 * (byte + 1) & 255), values);
                    const __m256i weights = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(left, right));
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t) {
                        const int16_t* from = x + t * kSegment + 8 * byte;
                        dot[t] = _mm256_add_epi32(
                            dot[t], _mm256_madd_epi16(weights,
                                                      _mm256_loadu_si256(
                                                          reinterpret_cast<const __m256i*>(from))));
                    }
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
                sum[t] =
                    _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t]), _mm256_set1_ps(x_scale[t]), sum[t]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) job.sums[(token + t) * job.rows + row] = reduce(sum[t]);
    }
}

PRUNUS_TARGET_AVX2 inline void expand_row(const uint8_t* row_mask, const uint16_t* values,
                                          int64_t cols, uint16_t* out) {
    for (int64_t first = 0; first < cols; first += 8) {
        const int64_t left = cols - first;
        const unsigned inside = left >= 8 ? 255u : (1u << left) - 1;
        const __m128i words = expand(row_mask[first / 8] & inside, values);
        if (left >= 8) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + first), words);
        } else {
            alignas(16) uint16_t last[8];
            _mm_store_si128(reinterpret_cast<__m128i*>(last), words);
            std::memcpy(out + first, last, size_t(left) * 2);
        }
    }
}

PRUNUS_TARGET_AVX2 inline void decode(const uint8_t* low_bytes, const uint8_t* codes,
                                      const uint8_t* high_bytes, int64_t count, uint16_t* out) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high_bytes)),
                  half = _mm_set1_epi8(15);
    for (int64_t done = 0; done < count; done += kCodedGroup)
        for (int quarter = 0; quarter < 4; ++quarter) {
            const __m128i low =
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(low_bytes + done + 16 * quarter));
            __m128i pairs = _mm_loadu_si128(
                reinterpret_cast<const __m128i*>(codes + done / 2 + 16 * (quarter % 2)));
            if (quarter >= 2) pairs = _mm_srli_epi16(pairs, 4);
            const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(pairs, half));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + done + 16 * quarter),
                             _mm_unpacklo_epi8(low, high));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + done + 16 * quarter + 8),
                             _mm_unpackhi_epi8(low, high));
        }
}

PRUNUS_TARGET_AVX2 inline void dequantise(const int8_t* values, int64_t count, float scale,
                                          uint16_t* words) {
    dequantise_loop(values, count, scale, words);
}

}  // namespace prunus::avx2
