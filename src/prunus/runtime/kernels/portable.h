// Plain C++ for every machine. It is slow and short, and tests compare the other instruction sets
// with it.
#pragma once

#include "job.h"

namespace prunus::portable {

inline int popcount(uint64_t word) {
    word -= word >> 1 & 0x5555555555555555;
    word = (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
    return int(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
}

template <Kind kind>
inline float value_at(const void* values, int64_t index) {
    return load_as_float(values, index, kind);
}

template <Kind kind>
inline void rows_float(const Job& job, int64_t begin, int64_t end) {
    const float* x = static_cast<const float*>(job.x);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t token = 0; token < job.tokens; ++token) {
            const uint16_t* value = row_values<uint16_t>(job, row);
            float sum = 0;
            for (int64_t segment = 0; segment < job.segments; ++segment) {
                const float* x_segment = x + (segment * job.tokens + token) * kSegment;
                uint64_t word = mask_word(job.mask + row * job.mask_stride, segment, job.cols);
                for (int column = 0; word; ++column, word >>= 1)
                    if (word & 1) sum += value_at<kind>(value++, 0) * x_segment[column];
            }
            job.sums[token * job.rows + row] = sum;
        }
    }
}

inline void rows_int8(const Job& job, int64_t begin, int64_t end) {
    const int16_t* x = static_cast<const int16_t*>(job.x);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t token = 0; token < job.tokens; ++token) {
            const int8_t* value = row_values<int8_t>(job, row);
            float sum = 0;
            for (int64_t first = 0; first < job.segments; first += kGroup) {
                int32_t dot = 0;  // at most 256 · 128 · 32767: fits
                for (int64_t segment = first; segment < first + kGroup && segment < job.segments;
                     ++segment) {
                    const int16_t* x_segment = x + (segment * job.tokens + token) * kSegment;
                    uint64_t word = mask_word(job.mask + row * job.mask_stride, segment, job.cols);
                    for (int column = 0; word; ++column, word >>= 1)
                        if (word & 1) dot += int32_t(*value++) * x_segment[column];
                }
                sum += float(dot) * job.x_scales[first / kGroup * job.tokens + token];
            }
            job.sums[token * job.rows + row] = sum;
        }
    }
}

// Spreads one row of 16-bit values over `out` (cols) with zeros between them.
inline void expand_row(const uint8_t* row_mask, const uint16_t* values, int64_t cols,
                       uint16_t* out) {
    for (int64_t segment = 0; segment * kSegment < cols; ++segment) {
        const uint64_t word = mask_word(row_mask, segment, cols);
        const int64_t left = cols - segment * kSegment;
        for (int64_t column = 0; column < (left < kSegment ? left : kSegment); ++column)
            out[segment * kSegment + column] = word >> column & 1 ? *values++ : uint16_t(0);
    }
}

inline void decode_high(const uint8_t* codes, const uint8_t* high_bytes, int64_t count,
                        uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i % kCodedGroup;
        out[i] =
            high_bytes[codes[i / kCodedGroup * kCodedGroup / 2 + at % 32] >> (at < 32 ? 0 : 4) &
                       15];
    }
}

inline void decode(const uint8_t* low_bytes, const uint8_t* codes, const uint8_t* high_bytes,
                   int64_t count, uint16_t* out) {
    for (int64_t done = 0; done < count; done += kCodedGroup) {
        uint8_t high[kCodedGroup];
        decode_high(codes + done / 2, high_bytes, kCodedGroup, high);
        for (int64_t at = 0; at < kCodedGroup; ++at)
            out[done + at] = uint16_t(high[at] << 8 | low_bytes[done + at]);
    }
}

inline void dequantise(const int8_t* values, int64_t count, float scale, uint16_t* words) {
    dequantise_loop(values, count, scale, words);
}

}  // namespace prunus::portable
