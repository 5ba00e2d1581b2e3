// Weights in panels: sixteen rows side by side, as tile registers and blocked products read them.
//
// A panel is a row of tiles of 32 columns. A tile (16 rows, 32 columns of 16 bits) is 1 KiB of
// contiguous memory. The activations of sixteen tokens lie likewise: per 32 columns one tile (16
// pairs of columns, 16 tokens, 2).
#pragma once

#include "avx512.h"
#include "coded.h"

namespace prunus::panels {

using avx512::Pair;

constexpr int64_t kRows = 16;  // rows of a panel, and tokens of a block
constexpr int64_t kTileColumns = 32;
constexpr int64_t kTileBytes = 1024;

// Transposes sixteen rows of sixteen 32-bit words.
PRUNUS_TARGET PRUNUS_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    PRUNUS_UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    PRUNUS_UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    PRUNUS_UNROLL for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    PRUNUS_UNROLL for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// The bytes of activations in blocks, and the number of the blocks.
inline int64_t block_bytes(const Job& job) { return 2 * job.segments * kTileBytes; }
inline int64_t blocks_of(const Job& job) { return (job.tokens + kRows - 1) / kRows; }

// Up to sixteen tokens of bf16 activations as a block, with zeros past the last token and column.
// For joined weights even columns come before odd ones.
template <bool parted>
PRUNUS_TARGET inline void lay_out_block(const Job& job, const uint16_t* x, int64_t tokens,
                                        uint8_t* to) {
    for (int64_t segment = 0; segment < job.segments; ++segment, to += 2 * kTileBytes) {
        const int64_t left = job.cols - segment * kSegment;
        __m512i low[16], high[16];
        PRUNUS_UNROLL for (int64_t i = 0; i < kRows; ++i) {
            Pair words = avx512::load_words(x + i * job.cols + segment * kSegment,
                                            i < tokens ? left : 0);
            if (parted) words = avx512::part(words);
            low[i] = words.low;
            high[i] = words.high;
        }
        transpose(low);
        transpose(high);
        PRUNUS_UNROLL for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 64, low[i]);
        PRUNUS_UNROLL for (int i = 0; i < 16; ++i)
            _mm512_store_si512(to + kTileBytes + i * 64, high[i]);
    }
}

template <bool parted>
PRUNUS_TARGET inline void lay_out_blocks(Job& job, const void* x, Scratch& scratch) {
    uint8_t* to = aligned<uint8_t>(scratch.x, blocks_of(job) * block_bytes(job));
    job.x = to;
    for (int64_t token = 0; token < job.tokens; token += kRows, to += block_bytes(job))
        lay_out_block<parted>(job, static_cast<const uint16_t*>(x) + token * job.cols,
                              job.tokens - token, to);
}

// Writes a block of finished sums (16 rows, 16 tokens), times the scales of the rows and plus the
// bias, to `out` as bfloat16.
PRUNUS_TARGET PRUNUS_INLINE void finish_block(const Job& job, int64_t row, int64_t end,
                                              int64_t token, const float* sums) {
    const __mmask16 inside = end - row >= kRows ? __mmask16(~0) : __mmask16((1 << (end - row)) - 1);
    __m512i r[16];
    PRUNUS_UNROLL for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + i * 16);
    transpose(r);
    const __m512 scales =
        job.sum_scales ? _mm512_maskz_loadu_ps(inside, job.sum_scales + row) : _mm512_set1_ps(1.0f);
    __m512 bias = _mm512_setzero_ps();
    if (job.bias)
        bias = avx512::Float<kBf16>::widen(
            _mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(job.bias) + row));
    uint16_t* out = static_cast<uint16_t*>(job.out) + token * job.rows + row;
    const int64_t tokens = job.tokens - token < kRows ? job.tokens - token : kRows;
    PRUNUS_UNROLL for (int i = 0; i < 16; ++i) if (i < tokens) _mm256_mask_storeu_epi16(
        out + i * job.rows, inside,
        (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(_mm512_castsi512_ps(r[i]), scales, bias)));
}

// ---- Rows into a panel. ----

// Where the next values of a row are: words, or low bytes in memory and decoded high bytes.
struct Words {
    const uint16_t* values;

    PRUNUS_TARGET PRUNUS_INLINE Pair next(uint64_t word) {
        avx512::prefetch(reinterpret_cast<const uint8_t*>(values), avx512::kValuesAhead);
        avx512::prefetch(reinterpret_cast<const uint8_t*>(values), avx512::kValuesAhead + 64);
        return avx512::expand(word, values);
    }
};

struct CodedWords {
    const uint8_t *low, *high;

    PRUNUS_TARGET PRUNUS_INLINE Pair next(uint64_t word) {
        avx512::prefetch(low, avx512::kCodedAhead);
        const Pair pair = avx512::expand_coded(word, low, high);
        const int64_t count = _mm_popcnt_u64(word);
        low += count;
        high += count;
        return pair;
    }
};

// Writes one segment of a row to its two tiles of a panel.
PRUNUS_TARGET PRUNUS_INLINE void put_segment(const Pair& pair, uint8_t* to) {
    _mm512_store_si512(to, pair.low);
    _mm512_store_si512(to + kTileBytes, pair.high);
}

// Spreads a row over row `to` of a panel, with zeros between its values and up to a whole segment.
template <typename Source>
PRUNUS_TARGET PRUNUS_INLINE void fill_row(const uint8_t* row_mask, Source source, int64_t cols,
                                          uint8_t* to) {
    const int64_t whole = cols / kSegment;
    for (int64_t segment = 0; segment < whole; ++segment, to += 2 * kTileBytes) {
        uint64_t word;
        std::memcpy(&word, row_mask + segment * 8, 8);
        put_segment(source.next(word), to);
    }
    if (whole * kSegment < cols) put_segment(source.next(mask_word(row_mask, whole, cols)), to);
}

PRUNUS_TARGET inline void fill_words(const Job& job, int64_t begin, int64_t end, uint8_t* to) {
    for (int64_t row = begin; row < end; ++row, to += 64)
        fill_row(job.mask + row * job.mask_stride, Words{row_values<uint16_t>(job, row)}, job.cols,
                 to);
}

// Joined words, for activations with even columns before odd ones.
PRUNUS_TARGET inline void fill_coded(const Job& job, int64_t begin, int64_t end, uint8_t* to) {
    for (int64_t row = begin; row < end; row += job.decoded_rows) {
        const int64_t stop = row + job.decoded_rows < end ? row + job.decoded_rows : end;
        const Job ready = high_rows(job, row, stop);
        for (int64_t each = row; each < stop; ++each, to += 64) {
            const uint8_t* high = ready.decoded + (row_begin(job, each) - ready.high_first);
            fill_row(job.mask + each * job.mask_stride,
                     CodedWords{row_values<uint8_t>(job, each), high}, job.cols, to);
        }
    }
}

// int8 values: value · scale, rounded to bfloat16.
PRUNUS_TARGET inline void fill_int8(const Job& job, int64_t begin, int64_t end, uint8_t* to) {
    constexpr int64_t kColumns = 64 * kSegment;
    uint16_t words[kColumns + kOverrun];
    for (int64_t row = begin; row < end; ++row, to += 64) {
        const int8_t* values = row_values<int8_t>(job, row);
        for (int64_t first = 0; first < job.cols; first += kColumns) {
            const uint8_t* mask = job.mask + row * job.mask_stride + first / 8;
            const int64_t columns = job.cols - first < kColumns ? job.cols - first : kColumns;
            int64_t count = 0;
            for (int64_t segment = 0; segment * kSegment < columns; ++segment)
                count += _mm_popcnt_u64(mask_word(mask, segment, columns));
            avx512::dequantise(values, count, job.scales[row], words);
            values += count;
            fill_row(mask, Words{words}, columns, to + first / kTileColumns * kTileBytes);
        }
    }
}

}  // namespace prunus::panels
