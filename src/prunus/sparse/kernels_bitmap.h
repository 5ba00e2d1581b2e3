// Bitmaps as arguments: checked, made safe to read past, and written out as dense weights.
#pragma once

#include "kernels.h"
#include "kernels_activations.h"
#include "kernels_job.h"
#include "kernels_portable.h"

namespace prunus {

inline int size_of(Kind kind) { return kind == kI8 ? 1 : kind == kF32 ? 4 : 2; }

inline int64_t count_bits(const uint8_t* row_mask, int64_t cols) {
    int64_t count = 0;
    for (int64_t segment = 0; segment * kSegment < cols; ++segment)
        count += portable::popcount(mask_word(row_mask, segment, cols));
    return count;
}

inline bool is_float16_kind(int kind) { return kind == kBf16 || kind == kF16; }

inline int describe(Job& job, int64_t rows, int64_t cols, const uint8_t* mask, int value_kind, const void* values,
                    int64_t count, const int64_t* offsets, const float* scales) {
    if (rows < 1 || cols < 1 || count < 0 || !mask || !offsets || (count > 0 && !values)) return PRUNUS_BAD_ARGUMENT;
    if (value_kind != kI8 && !is_float16_kind(value_kind)) return PRUNUS_BAD_ARGUMENT;
    if ((value_kind == kI8) != (scales != nullptr)) return PRUNUS_BAD_ARGUMENT;
    if (offsets[0] != 0 || offsets[rows] != count) return PRUNUS_BAD_ARGUMENT;
    job = Job{};
    job.rows = rows;
    job.cols = cols;
    job.segments = (cols + kSegment - 1) / kSegment;
    job.mask = mask;
    job.mask_stride = (cols + 7) / 8;
    job.values = values;
    job.offsets = offsets;
    job.scales = scales;
    return PRUNUS_OK;
}

// Copies the values of the last rows to where full-width loads may run past their end.
inline void copy_tail(Job& job, Kind kind, int64_t count, Scratch& scratch) {
    int64_t row = job.rows;
    while (row > 0 && job.offsets[row] + kOverrun > count) --row;
    const int64_t first = job.offsets[row];
    uint8_t* tail = sized<uint8_t>(scratch.tail, (count - first + kOverrun) * size_of(kind));
    if (count > first)
        std::memcpy(tail, static_cast<const uint8_t*>(job.values) + first * size_of(kind),
                    size_t(count - first) * size_of(kind));
    job.tail = tail;
    job.tail_row = row;
}

inline void expand_words(const Job& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        job.expand_row(job.mask + row * job.mask_stride, row_values<uint16_t>(job, row), job.cols,
                       static_cast<uint16_t*>(job.out) + row * job.cols);
}

template <Kind out_kind>
inline void expand_int8(const Job& job, int64_t begin, int64_t end) {
    constexpr int64_t kColumns = 64 * kSegment;
    uint16_t words[kColumns + kOverrun];
    for (int64_t row = begin; row < end; ++row) {
        const int8_t* values = row_values<int8_t>(job, row);
        const float scale = job.scales[row];
        for (int64_t first = 0; first < job.cols; first += kColumns) {
            const uint8_t* mask = job.mask + row * job.mask_stride + first / 8;
            const int64_t columns = job.cols - first < kColumns ? job.cols - first : kColumns;
            const int64_t count = count_bits(mask, columns);
            if (out_kind == kBf16) job.dequantise(values, count, scale, words);
            else for (int64_t i = 0; i < count; ++i) words[i] = float_to_f16(values[i] * scale);
            values += count;
            job.expand_row(mask, words, columns, static_cast<uint16_t*>(job.out) + row * job.cols + first);
        }
    }
}

}  // namespace prunus
