// AMX with int8 values. Activations are 16-bit integers x = 256 h + l with h signed and l unsigned,
// as in avx512.h: two tile products per segment, and exact sums over the four segments that share a
// scale.
#pragma once

#include "amx.h"

namespace prunus::amx {

// Low and high bytes as tiles (16 quadruples of columns, 16 tokens, 4), one after the other for
// every segment.
PRUNUS_AMX_TARGET inline void lay_out_byte_tiles(Job& job, Scratch& scratch) {
    const int64_t groups = (job.segments + kGroup - 1) / kGroup;
    const auto* from = static_cast<const uint8_t*>(job.x);
    uint8_t* to = aligned<uint8_t>(scratch.x_tiles, job.segments * 2 * kTileBytes + groups * 64);
    job.x = to;
    for (int64_t segment = 0; segment < job.segments;
         ++segment, from += job.tokens * 2 * kSegment) {
        for (int half = 0; half < 2; ++half, to += kTileBytes) {
            __m512i r[16];
            PRUNUS_UNROLL for (int i = 0; i < 16; ++i) r[i] =
                i < job.tokens ? _mm512_loadu_si512(from + i * 2 * kSegment + half * kSegment)
                               : _mm512_setzero_si512();
            transpose(r);
            PRUNUS_UNROLL for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, r[i]);
        }
    }
    // The scales of a group: sixteen tokens side by side.
    float* scales = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < groups * kRows; ++i) {
        const int64_t token = i % kRows;
        scales[i] = token < job.tokens ? job.x_scales[i / kRows * job.tokens + token] : 0.0f;
    }
    job.x_scales = scales;
}

constexpr int64_t kBytePanel = kGroup * kTileBytes;

// Four expanded segments of sixteen rows that form a group, and where the group's sums go.
struct WaitingBytes {
    const uint8_t* weights;
    int64_t group, segments, row, end;
    bool last;
};

struct ByteMultiplier {
    const Job& job;
    float* sums;  // (16 rows, 16 tokens) of the groups so far

    PRUNUS_AMX_TARGET PRUNUS_INLINE void start() const {
        configure();
        _tile_zero(0);
        _tile_zero(1);
        std::memset(sums, 0, size_t(kRows * kRows) * sizeof(float));
    }
    PRUNUS_AMX_TARGET PRUNUS_INLINE void step(const WaitingBytes& waiting, int64_t segment) const {
        if (segment >= waiting.segments) return;
        const uint8_t* x = static_cast<const uint8_t*>(job.x) +
                           (waiting.group * kGroup + segment) * 2 * kTileBytes;
        barrier();
        _tile_loadd(2, waiting.weights + segment * kTileBytes, 64);
        _tile_loadd(4, x, 64);
        _tile_dpbsud(0, 2, 4);
        _tile_loadd(5, x + kTileBytes, 64);
        _tile_dpbssd(1, 2, 5);
        barrier();
    }
    PRUNUS_AMX_TARGET PRUNUS_INLINE void finish(const WaitingBytes& waiting) const {
        if (!waiting.segments) return;
        alignas(64) int32_t low[kRows * kRows], high[kRows * kRows];
        _tile_stored(0, low, 64);
        _tile_stored(1, high, 64);
        _tile_zero(0);
        _tile_zero(1);
        barrier();
        const __m512 scales = _mm512_loadu_ps(job.x_scales + waiting.group * kRows);
        for (int64_t i = 0; i < kRows * kRows; i += 16) {
            const __m512i whole = _mm512_add_epi32(
                _mm512_slli_epi32(_mm512_load_si512(high + i), 8), _mm512_load_si512(low + i));
            _mm512_store_ps(sums + i, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scales,
                                                      _mm512_load_ps(sums + i)));
        }
        if (!waiting.last) return;
        put_sums(job, waiting.row, waiting.end, sums);
        std::memset(sums, 0, size_t(kRows * kRows) * sizeof(float));
    }
};

PRUNUS_AMX_TARGET inline void rows_int8(const Job& job, int64_t begin, int64_t end) {
    alignas(64) float sums[kRows * kRows];
    const ByteMultiplier multiplier{job, sums};
    const int64_t groups = (job.segments + kGroup - 1) / kGroup;
    WaitingBytes waiting{};
    multiplier.start();
    int parity = 0;
    for (int64_t row = begin; row < end; row += kRows) {
        const int64_t stop = row + kRows < end ? row + kRows : end;
        const int8_t* values[kRows];
        const uint8_t* masks[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
            const int64_t which =
                row + r < stop ? row + r : stop - 1;  // rows past the last are computed in vain
            values[r] = row_values<int8_t>(job, which);
            masks[r] = job.mask + which * job.mask_stride;
        }
        for (int64_t group = 0; group < groups; ++group, parity ^= 1) {
            const int64_t segment = group * kGroup;
            const int64_t count = job.segments - segment < kGroup ? job.segments - segment : kGroup;
            const bool inner = segment + kGroup < job.segments;
            uint8_t* panel = job.panels + parity * kBytePanel;
            for (int64_t r = 0; r < kRows; ++r) {
                PRUNUS_UNROLL for (int64_t i = 0; i < kGroup; ++i) {
                    if (i >= count) break;
                    uint64_t word;
                    if (inner)
                        std::memcpy(&word, masks[r] + (segment + i) * 8, 8);
                    else
                        word = mask_word(masks[r], segment + i, job.cols);
                    avx512::prefetch(reinterpret_cast<const uint8_t*>(values[r]),
                                     avx512::kValuesAhead);
                    _mm512_store_si512(panel + i * kTileBytes + r * 64,
                                       avx512::expand(word, values[r]));
                }
                if (r % 4 == 3) multiplier.step(waiting, r / 4);
            }
            multiplier.finish(waiting);
            waiting = {panel, group, count, row, stop, group + 1 == groups};
        }
    }
    for (int64_t segment = 0; segment < kGroup; ++segment) multiplier.step(waiting, segment);
    multiplier.finish(waiting);
    _tile_release();
}

}  // namespace prunus::amx
