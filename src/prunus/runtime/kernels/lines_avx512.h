// Lines with AVX-512 (VNNI).
//
// A product shifts no highest piece: what is extracted is a multiple of the value, and the sum over
// a block is shifted back instead.
#pragma once

#include "avx512.h"
#include "lines.h"

#define PRUNUS_TARGET_LINES \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,popcnt,bmi,bmi2")))

namespace prunus::planes::lines512 {

template <int count>
PRUNUS_TARGET_LINES PRUNUS_INLINE __m512i shift_right(__m512i bytes) {
    if constexpr (count > 0) return _mm512_srli_epi16(bytes, count);
    if constexpr (count < 0) return _mm512_slli_epi16(bytes, -count);
    return bytes;
}

// The values of a row of a group, times 2^place_of. `sum` holds the pieces after `number`.
template <int width, int row, int number>
PRUNUS_TARGET_LINES PRUNUS_INLINE __m512i add_pieces(const uint8_t* lines, __m512i sum) {
    constexpr Pieces pieces = pieces_of(width, row);
    if constexpr (number < 0) {
        return sum;
    } else {
        constexpr Piece piece = pieces.piece[number];
        constexpr int to = piece.to + place_of<width, row>();
        const __m512i bytes = shift_right<piece.shift - to>(
                          _mm512_loadu_si512(lines + piece.line * kLineBytes)),
                      mask = _mm512_set1_epi8(char(mask_of(piece.bits) << to));
        if constexpr (piece.bits == 8) return bytes;
        if constexpr (number == pieces.count - 1)
            sum = _mm512_and_si512(bytes, mask);
        else  // sum | (bytes & mask)
            sum = _mm512_ternarylogic_epi64(sum, bytes, mask, 0xf8);
        return add_pieces<width, row, number - 1>(lines, sum);
    }
}

template <int width, int row>
PRUNUS_TARGET_LINES PRUNUS_INLINE __m512i value_of(const uint8_t* lines) {
    constexpr int highest = pieces_of(width, row).count - 1;
    return add_pieces<width, row, highest>(lines, _mm512_setzero_si512());
}

template <int width>
PRUNUS_TARGET_LINES void unpack(int64_t groups, const uint8_t* lines, uint8_t* to, int64_t stride) {
    const __m512i base = _mm512_set1_epi8(char(byte_base(width)));
    for (; groups > 0; --groups, lines += width * kLineBytes, to += kSegment) {
#define PRUNUS_UNPACK(row)                                                     \
    _mm512_storeu_si512(                                                       \
        to + row * stride,                                                     \
        _mm512_add_epi8(base, shift_right<place_of<width, row>()>(value_of<width, row>(lines))));
        PRUNUS_EIGHT_ROWS(PRUNUS_UNPACK)
#undef PRUNUS_UNPACK
    }
}

template <int width>
PRUNUS_TARGET_LINES void multiply(const Planes& job, const Class& c, const uint8_t* lines,
                                  const TileSums& tile) {
    const int8_t* x = job.x + c.first_block * kBlock;
    const float* scales = job.x_scales + c.first_block * kLanes;
    const int32_t* excess = job.excess + c.first_block * kLanes;
    int32_t* lanes = tile.lanes + c.first_block * kTileRows * kLanes;
#define PRUNUS_LOAD(row) \
    __m512 sum##row = tile.adds ? _mm512_load_ps(tile.sums + row * kLanes) : _mm512_setzero_ps();
    PRUNUS_EIGHT_ROWS(PRUNUS_LOAD)
#undef PRUNUS_LOAD
    for (int64_t left = c.groups; left > 0; left -= kBlockGroups) {
        const int64_t groups = left < kBlockGroups ? left : kBlockGroups;
#define PRUNUS_ZERO(row) __m512i dot##row = _mm512_setzero_si512();
        PRUNUS_EIGHT_ROWS(PRUNUS_ZERO)
#undef PRUNUS_ZERO
        for (int64_t group = 0; group < groups; ++group, lines += width * kLineBytes) {
            PRUNUS_UNROLL for (int line = 0; line < width; ++line)
                _mm_prefetch(
                    reinterpret_cast<const char*>(lines) + kAhead + line * kLineBytes, _MM_HINT_T0);
            const __m512i activation = _mm512_load_si512(x + group * kSegment);
#define PRUNUS_DOT(row) \
    dot##row = _mm512_dpbusd_epi32(dot##row, value_of<width, row>(lines), activation);
            PRUNUS_EIGHT_ROWS(PRUNUS_DOT)
#undef PRUNUS_DOT
        }
        const __m512 scale = _mm512_load_ps(scales);
        const __m512i unchanged = _mm512_load_si512(excess);
#define PRUNUS_ADD(row)                                                                        \
    dot##row = _mm512_add_epi32(_mm512_srai_epi32(dot##row, (place_of<width, row>())),         \
                                _mm512_load_si512(lanes + row * kLanes));                      \
    _mm512_store_si512(lanes + row * kLanes, unchanged);                                       \
    sum##row = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot##row), scale, sum##row);
        PRUNUS_EIGHT_ROWS(PRUNUS_ADD)
#undef PRUNUS_ADD
        x += kBlock;
        scales += kLanes;
        excess += kLanes;
        lanes += kTileRows * kLanes;
    }
#define PRUNUS_STORE(row) _mm512_store_ps(tile.sums + row * kLanes, sum##row);
    PRUNUS_EIGHT_ROWS(PRUNUS_STORE)
#undef PRUNUS_STORE
}

PRUNUS_TARGET_LINES inline float reduce(const float* sums) {
    return _mm512_reduce_add_ps(_mm512_load_ps(sums));
}

}  // namespace prunus::planes::lines512
