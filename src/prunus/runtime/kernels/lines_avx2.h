// Lines with AVX2.
#pragma once

#include "avx2.h"
#include "lines.h"

namespace prunus::planes::lines256 {

PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 __m256i load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 void store(void* to, __m256i bytes) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), bytes);
}

template <int count>
PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 __m256i shift_right(__m256i bytes) {
    if constexpr (count > 0) return _mm256_srli_epi16(bytes, count);
    if constexpr (count < 0) return _mm256_slli_epi16(bytes, -count);
    return bytes;
}

// The values of a row in half a group. `sum` holds the pieces before `number`.
template <int width, int row, int number>
PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 __m256i add_pieces(const uint8_t* lines, __m256i sum) {
    constexpr Pieces pieces = pieces_of(width, row);
    if constexpr (number == pieces.count) {
        return sum;
    } else {
        constexpr Piece piece = pieces.piece[number];
        const __m256i bytes = shift_right<piece.shift - piece.to>(
                          load(lines + piece.line * kLineBytes)),
                      mask = _mm256_set1_epi8(char(mask_of(piece.bits) << piece.to));
        if constexpr (piece.bits == 8) return bytes;
        return add_pieces<width, row, number + 1>(
            lines, _mm256_or_si256(sum, _mm256_and_si256(bytes, mask)));
    }
}

template <int width, int row>
PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 __m256i value_of(const uint8_t* lines) {
    return add_pieces<width, row, 0>(lines, _mm256_setzero_si256());
}

template <int width>
PRUNUS_TARGET_AVX2 void unpack(int64_t groups, const uint8_t* lines, uint8_t* to, int64_t stride) {
    const __m256i base = _mm256_set1_epi8(char(byte_base(width)));
    for (int64_t i = 0; i < 2 * groups; ++i, to += 32) {
        const uint8_t* half = lines + i / 2 * width * kLineBytes + i % 2 * 32;
#define PRUNUS_UNPACK(row) \
    store(to + row * stride, _mm256_add_epi8(base, value_of<width, row>(half)));
        PRUNUS_EIGHT_ROWS(PRUNUS_UNPACK)
#undef PRUNUS_UNPACK
    }
}

// Adds products of values and activations to a sum. Up to five bits, sums over a block fit in 16
// bits; with eight, even a sum of two products does not, so that the highest bit is taken alone.
template <int width>
PRUNUS_TARGET_AVX2 PRUNUS_INLINE_AVX2 __m256i add_products(__m256i sum, __m256i values,
                                                           __m256i x) {
    if constexpr (width <= 5) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(values, x));
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(127);
    if constexpr (width == 8) {
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(values, 7), _mm256_set1_epi8(1));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(high, x),
                                                      _mm256_set1_epi16(128)));
        values = _mm256_and_si256(values, low);
    }
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(values, x), ones));
}

template <int width>
PRUNUS_TARGET_AVX2 void multiply(const Planes& job, const Class& c, const uint8_t* lines,
                                 const TileSums& tile) {
    const int8_t* x = job.x + c.first_block * kBlock;
    const float* scales = job.x_scales + c.first_block * kLanes;
    const int32_t* excess = job.excess + c.first_block * kLanes;
    int32_t* lanes = tile.lanes + c.first_block * kTileRows * kLanes;
    if (!tile.adds)
        for (int row = 0; row < kTileRows; ++row)
            _mm256_storeu_ps(tile.sums + row * kLanes, _mm256_setzero_ps());
    for (int64_t left = c.groups; left > 0; left -= kBlockGroups) {
        const int64_t groups = left < kBlockGroups ? left : kBlockGroups;
        for (int64_t lane = 0; lane < kLanes; lane += 8) {
            const int64_t half = lane * kLaneBytes;
#define PRUNUS_ZERO(row) __m256i dot##row = _mm256_setzero_si256();
            PRUNUS_EIGHT_ROWS(PRUNUS_ZERO)
#undef PRUNUS_ZERO
            for (int64_t group = 0; group < groups; ++group) {
                const uint8_t* const from = lines + group * width * kLineBytes + half;
                if (!lane)
                    PRUNUS_UNROLL for (int line = 0; line < width; ++line) __builtin_prefetch(
                        from + kAhead + line * kLineBytes);
                const __m256i activation = load(x + group * kSegment + half);
#define PRUNUS_DOT(row) \
    dot##row = add_products<width>(dot##row, value_of<width, row>(from), activation);
                PRUNUS_EIGHT_ROWS(PRUNUS_DOT)
#undef PRUNUS_DOT
            }
            const __m256 scale = _mm256_loadu_ps(scales + lane);
            const __m256i unchanged = load(excess + lane);
#define PRUNUS_ADD(row)                                                                          \
    {                                                                                            \
        if (width <= 5) dot##row = _mm256_madd_epi16(dot##row, _mm256_set1_epi16(1));            \
        dot##row = _mm256_add_epi32(dot##row, load(lanes + row * kLanes + lane));                \
        store(lanes + row * kLanes + lane, unchanged);                                           \
        float* const sum = tile.sums + row * kLanes;                                             \
        _mm256_storeu_ps(                                                                        \
            sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot##row), scale, _mm256_loadu_ps(sum)));    \
    }
            PRUNUS_EIGHT_ROWS(PRUNUS_ADD)
#undef PRUNUS_ADD
        }
        lines += groups * width * kLineBytes;
        x += kBlock;
        scales += kLanes;
        excess += kLanes;
        lanes += kTileRows * kLanes;
    }
}

}  // namespace prunus::planes::lines256
