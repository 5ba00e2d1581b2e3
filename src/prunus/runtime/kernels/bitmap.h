// Bitmap weights as arguments: checked, made safe to read past the end, and expanded to dense
// weights.
#pragma once

#include "kernels.h"
#include "activations.h"
#include "job.h"
#include "portable.h"

namespace prunus {

inline int size_of(Kind kind) { return kind == kI8 ? 1 : kind == kF32 ? 4 : 2; }

inline int64_t count_bits(const uint8_t* row_mask, int64_t cols) {
    int64_t count = 0;
    for (int64_t segment = 0; segment * kSegment < cols; ++segment)
        count += portable::popcount(mask_word(row_mask, segment, cols));
    return count;
}

inline bool is_float16_kind(int kind) { return kind == kBf16 || kind == kF16; }

inline int describe(Job& job, const PrunusWeight* weight, Scratch& scratch) {
    if (!weight) return PRUNUS_BAD_ARGUMENT;
    const PrunusWeight& w = *weight;
    if (w.rows < 1 || w.cols < 1 || w.count < 0 || (w.count > 0 && !w.values))
        return PRUNUS_BAD_ARGUMENT;
    if (w.kind != kI8 && !is_float16_kind(w.kind)) return PRUNUS_BAD_ARGUMENT;
    if ((w.kind == kI8) != (w.scales != nullptr)) return PRUNUS_BAD_ARGUMENT;
    if ((w.mask != nullptr) != (w.offsets != nullptr)) return PRUNUS_BAD_ARGUMENT;
    if (w.mask ? w.offsets[0] != 0 : w.rows > INT64_MAX / 2 / w.cols) return PRUNUS_BAD_ARGUMENT;
    const int64_t stored = w.mask ? w.offsets[w.rows] : w.rows * w.cols,
                  group = w.codes ? kCodedGroup : 1;
    if (w.count != (stored + group - 1) / group * group) return PRUNUS_BAD_ARGUMENT;
    if (w.codes && (w.kind != kBf16 || !w.high_bytes || w.rare < 0 ||
                    (w.rare && (!w.rare_at || !w.rare_values))))
        return PRUNUS_BAD_ARGUMENT;
    job = Job{};
    job.rows = w.rows;
    job.cols = w.cols;
    job.segments = (w.cols + kSegment - 1) / kSegment;
    job.mask = w.mask;
    job.mask_stride = (w.cols + 7) / 8;
    job.values = w.values;
    job.offsets = w.offsets;
    job.scales = w.scales;
    job.tail_row = w.rows;
    if (w.codes) job.coded = weight;
    if (!w.mask) {
        // Some kernels know only weights with a mask, so one row of ones serves all rows.
        uint8_t* ones = sized<uint8_t>(scratch.ones, job.mask_stride);
        std::memset(ones, 255, size_t(job.mask_stride));
        job.mask = ones;
        job.mask_stride = 0;
    }
    return PRUNUS_OK;
}

// Copies the values of the last rows to a place where full-width loads may run past their end.
inline void copy_tail(Job& job, Kind kind, int64_t count, Scratch& scratch) {
    int64_t row = job.rows;
    while (row > 0 && row_begin(job, row) + kOverrun > count) --row;
    const int64_t first = row_begin(job, row);
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
            if (out_kind == kBf16)
                job.dequantise(values, count, scale, words);
            else
                for (int64_t i = 0; i < count; ++i) words[i] = float_to_f16(values[i] * scale);
            values += count;
            job.expand_row(mask, words, columns,
                           static_cast<uint16_t*>(job.out) + row * job.cols + first);
        }
    }
}

}  // namespace prunus
