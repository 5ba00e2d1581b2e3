// Layered bit planes times many tokens, with tile registers.
//
// Integers of eight bits are exact in bfloat16, so panels hold the integers themselves. Activations
// are x · step, rounded to bfloat16, and the scale of a row multiplies its finished sum. Rounding
// to int8 with a scale per lane, as products of a few tokens do, would end a tile product after
// every 16 columns.
#pragma once

#include "amx_many.h"
#include "planes_avx512.h"

namespace prunus::planes {

// A few rows as panels of bfloat16, in the order of the classes without the gaps between blocks.
struct FillPlanes {
    const Planes& job;
    const Lines& lines;
    uint8_t* bytes;  // room for a panel of unpacked rows

    PRUNUS_AMX_TARGET PRUNUS_INLINE void operator()(const Job&, int64_t begin, int64_t end,
                                                    uint8_t* to) const {
        using panels::kTileBytes;
        const __m512i bias = _mm512_set1_epi32(128);
        for (int64_t row = begin; row < end; row += kTileRows)
            unpack_tile<Avx512>(job, lines, row / kTileRows, bytes + (row - begin) * job.row_bytes);
        for (int64_t row = begin; row < end; ++row, to += 64) {
            const uint8_t* from = bytes + (row - begin) * job.row_bytes;
            uint8_t* tile = to;
            for (int k = 0; k < job.class_count; ++k) {
                const uint8_t* at = from + job.classes[k].first_block * kBlock;
                for (int64_t i = 0; i < 2 * job.classes[k].groups; ++i, tile += kTileBytes) {
                    __m512 values[2];
                    PRUNUS_UNROLL for (int half = 0; half < 2; ++half, at += 16) values[half] =
                        _mm512_cvtepi32_ps(_mm512_sub_epi32(
                            _mm512_cvtepu8_epi32(
                                _mm_load_si128(reinterpret_cast<const __m128i*>(at))),
                            bias));
                    _mm512_store_si512(tile,
                                       (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]));
                }
            }
        }
    }
};

// The bytes of unpacked rows that a panel is made of.
inline int64_t unpacked_panel_bytes(const Planes& job) {
    return (panels::kRows * job.row_bytes + kSegment + 63) / 64 * 64;
}

PRUNUS_AMX_TARGET inline void multiply_many(const Planes& job, const Lines& lines, int64_t begin,
                                            int64_t end, uint8_t* memory) {
    Job matrix = *job.matrix;
    matrix.panels = memory + unpacked_panel_bytes(job);
    const int64_t stop = end * kTileRows < job.rows ? end * kTileRows : job.rows;
    amx::multiply_rows(matrix, begin * kTileRows, stop, FillPlanes{job, lines, memory});
}

// Describes the product as one of matrices, with room for its activations, and returns the bytes
// that a thread needs.
inline int64_t describe_matrix(Planes& job, Job& matrix, int threads, Scratch& scratch) {
    matrix = Job{};
    matrix.rows = job.rows;
    matrix.tokens = job.tokens;
    for (int k = 0; k < job.class_count; ++k) matrix.segments += job.classes[k].groups;
    matrix.cols = matrix.segments * kSegment;
    matrix.bias = job.bias;
    matrix.out = job.out;
    matrix.out_kind = job.out_kind;
    float* scales = sized<float>(scratch.x_scales, job.rows);
    for (int64_t row = 0; row < job.rows; ++row) scales[row] = bf16_to_float(job.scales[row]);
    matrix.sum_scales = scales;
    matrix.x = aligned<uint8_t>(scratch.x, panels::blocks_of(matrix) * panels::block_bytes(matrix));
    const int64_t count = amx::panels_at_once(matrix, threads);
    matrix.rows_at_once = count * panels::kRows;
    job.matrix = &matrix;
    job.tiles_at_once = matrix.rows_at_once / kTileRows;
    return unpacked_panel_bytes(job) + amx::many_bytes(matrix, count);
}

// Lays out block number `block` of the activations. `scratch` is the thread's own.
PRUNUS_AMX_TARGET inline void lay_out_matrix(const Planes& job, const uint16_t* x, int64_t block,
                                             Scratch& scratch) {
    const Job& matrix = *job.matrix;
    const int64_t token = block * panels::kRows,
                  count = std::min(panels::kRows, job.tokens - token);
    // Every class has room for 16 columns more than its groups, as `order` wants.
    float* places[kMaxClasses];
    places[0] = sized<float>(scratch.x_float, matrix.cols + kMaxClasses * 16);
    for (int k = 1; k < job.class_count; ++k)
        places[k] = places[k - 1] + job.classes[k - 1].groups * kSegment + 16;
    uint16_t* const words = sized<uint16_t>(scratch.x_tiles, panels::kRows * matrix.cols);
    uint16_t* to = words;
    for (int64_t i = 0; i < count; ++i) {
        Avx512::order(job, x, (token + i) * job.cols, kBf16, places);
        for (int k = 0; k < job.class_count; ++k) {
            const Class& c = job.classes[k];
            for (int64_t at = c.columns; at < c.groups * kSegment; ++at) places[k][at] = 0.0f;
            for (int64_t at = 0; at < c.groups * kSegment; at += 16, to += 16)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(places[k] + at)));
        }
    }
    auto* const blocks = static_cast<uint8_t*>(const_cast<void*>(matrix.x));
    panels::lay_out_block<false>(matrix, words, count,
                                 blocks + block * panels::block_bytes(matrix));
}

}  // namespace prunus::planes
