// What one call has to do, and the conversions that all instruction sets share.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace prunus {

constexpr int64_t kSegment = 64;  // columns that one 64-bit mask word covers
constexpr int64_t kGroup = 4;     // segments that share one activation scale (int8 weights)
constexpr int64_t kOverrun =
    64;                         // values that a kernel may read, and ignore, past the end of a row
constexpr int kTokenBlock = 8;  // tokens that a kernel works on at once
constexpr int64_t kFewTokens = 16;      // more tokens than this are multiplied as matrices
constexpr int64_t kTokensAtOnce = 512;  // tokens per matrix product

enum Kind : int { kBf16 = 0, kF16 = 1, kF32 = 2, kI8 = 3 };
#if defined(__aarch64__) && defined(__GNUC__)
#define PRUNUS_ARM 1
#endif
// Numbers are those of one kind of processor: x86-64 or 64-bit Arm.
enum Isa : int {
    kPortable = 0,
    kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4,
    kNeon = 1, kNeonDot = 2
};

// Spreads one row of 16-bit values over `out` (cols) with zeros between them. It may read up to
// kOverrun values too many.
using ExpandRow = void (*)(const uint8_t* row_mask, const uint16_t* values, int64_t cols,
                           uint16_t* out);

// Coded values come in groups of this size. One byte of codes belongs to two values that are 32
// positions apart.
constexpr int64_t kCodedGroup = 64;

// Writes `count` coded values (whole groups) as bfloat16: the low bytes as they are, the high bytes
// from the codes.
using Decode = void (*)(const uint8_t* low_bytes, const uint8_t* codes, const uint8_t* high_bytes,
                        int64_t count, uint16_t* out);

// Writes the high bytes of `count` coded values (whole groups).
using DecodeHigh = void (*)(const uint8_t* codes, const uint8_t* high_bytes, int64_t count,
                            uint8_t* out);

// Writes value · scale as bfloat16 for `count` values.
using DequantiseValues = void (*)(const int8_t* values, int64_t count, float scale,
                                  uint16_t* words);

// One product out = x · Wᵀ + bias, or the expansion of W (rows, cols).
struct Job {
    int64_t rows, cols, tokens;
    int64_t segments;  // ceil(cols / 64)

    // --- the weight ---
    const uint8_t* mask;  // (rows, mask_stride) bytes
    int64_t mask_stride;  // ceil(cols / 8), or 0 where one row of ones serves all rows
    // Stored values of all rows, one after another, from position `first` on.
    const void* values;
    const int64_t* offsets;  // (rows + 1): where each row's values begin; null: at row · cols
    int64_t first;
    // A copy of the values from row `tail_row` on, with room behind it. So near the end of the
    // buffer a full-width load would leave it.
    const void* tail;
    int64_t tail_row;
    const float* scales;      // (rows) for int8 values, else null
    const float* sum_scales;  // (rows): what multiplies the sums of a panel; null: nothing

    // --- the activations ---
    // Layout (segment, token, 64), zero past `cols`: bf16, float32 or int16. bf16 exists also with
    // even columns before odd ones, int16 also as 64 low bytes followed by 64 high bytes.
    const void* x;
    const float* x_scales;    // int16 only: (group, token)
    const int32_t* x_excess;  // split int16 only: 128 · sums of the high bytes, (group, token, 16)

    // --- the result ---
    float* sums;       // (tokens, rows): what rows_fn computes
    const void* bias;  // (rows) in the dtype of `out`, or null
    void* out;         // (tokens, rows)
    Kind out_kind;
    void (*rows_fn)(const Job&, int64_t begin, int64_t end);

    // --- coded values only ---
    // rows_fn decodes a few rows at a time into memory of its own thread and hands them to
    // decoded_fn: whole values (then `values` points to them), or high bytes alone.
    const PrunusWeight* coded;
    Decode decode;
    DecodeHigh decode_high;
    void (*decoded_fn)(const Job&, int64_t begin, int64_t end);
    int64_t decoded_rows, decoded_buffers;
    uint8_t* decoded;
    int64_t high_first;      // position of the value that the first decoded high byte belongs to
    int64_t decoded_stride;  // bytes from one thread's memory to the next one's

    // --- rows side by side in panels only ---
    uint8_t* panels;        // a thread's memory for panels, aligned to 64 bytes
    int64_t panels_stride;  // bytes from one thread's memory to the next one's
    int64_t rows_at_once;   // a chunk holds a multiple of this many rows

    // --- expansion of W only ---
    ExpandRow expand_row;
    DequantiseValues dequantise;

    // --- division among threads ---
    std::atomic<int64_t>* next;  // the next row that no thread has taken
    std::atomic<int>* threads;   // number of threads that have begun
    int64_t chunk;               // rows that a thread takes at a time
};

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bf16_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

// Rounds to nearest even; a NaN stays a NaN.
inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? uint16_t((bits >> 16) | 0x40) : uint16_t(rounded);
}

inline float f16_to_float(uint16_t value) {
    const uint32_t sign = uint32_t(value & 0x8000) << 16;
    const uint32_t magnitude = value & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) {
        // Subnormal: magnitude · 2^-24 is exact in float32.
        const float small = float(magnitude) * 0x1p-24f;
        return sign ? -small : small;
    }
    return bits_to_float(sign | ((magnitude << 13) + 0x38000000));
}

// Rounds to nearest even; too large numbers become infinity.
inline uint16_t float_to_f16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Subnormal in float16: the addition rounds to multiples of 2^-24.
        const float shifted = bits_to_float(magnitude) + 0.5f;
        return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000;
    return uint16_t(sign | rounded >> 13);
}

inline float load_as_float(const void* data, int64_t index, Kind kind) {
    if (kind == kF32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return kind == kBf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

inline void store_as(void* data, int64_t index, Kind kind, float value) {
    if (kind == kF32)
        static_cast<float*>(data)[index] = value;
    else
        static_cast<uint16_t*>(data)[index] =
            kind == kBf16 ? float_to_bf16(value) : float_to_f16(value);
}

// Each instruction set has its own copy of this loop, so that the compiler vectorises it for that
// set.
__attribute__((always_inline)) inline void dequantise_loop(const int8_t* values, int64_t count,
                                                           float scale, uint16_t* words) {
    for (int64_t i = 0; i < count; ++i) words[i] = float_to_bf16(values[i] * scale);
}

// The mask of one segment. Bits beyond the last column read as 0, whatever the file holds.
inline uint64_t mask_word(const uint8_t* row_mask, int64_t segment, int64_t cols) {
    uint64_t word = 0;
    const int64_t left = cols - segment * kSegment;
    if (left >= kSegment) {
        std::memcpy(&word, row_mask + segment * 8, 8);
        return word;
    }
    std::memcpy(&word, row_mask + segment * 8, size_t((left + 7) / 8));
    return word & ((uint64_t(1) << left) - 1);
}

// The position of a row's first value.
inline int64_t row_begin(const Job& job, int64_t row) {
    return job.offsets ? job.offsets[row] : row * job.cols;
}

template <typename Value>
inline const Value* row_values(const Job& job, int64_t row) {
    const Value* values = static_cast<const Value*>(job.values);
    if (row < job.tail_row) return values + (row_begin(job, row) - job.first);
    return static_cast<const Value*>(job.tail) +
           (row_begin(job, row) - row_begin(job, job.tail_row));
}

// Turns the finished sums of some rows into results: multiplies by the row's scale, adds its bias
// and converts to the dtype of `out`.
inline void finish_rows(const Job& job, int64_t begin, int64_t end) {
    for (int64_t token = 0; token < job.tokens; ++token) {
        float* sums = job.sums + token * job.rows;
        if (job.scales)
            for (int64_t row = begin; row < end; ++row) sums[row] *= job.scales[row];
        if (job.bias)
            for (int64_t row = begin; row < end; ++row)
                sums[row] += load_as_float(job.bias, row, job.out_kind);
        for (int64_t row = begin; row < end; ++row)
            store_as(job.out, token * job.rows + row, job.out_kind, sums[row]);
    }
}

// Calls fn(first_token, count) for blocks of at most `most` tokens, of nearly equal size.
template <typename Fn>
inline void for_token_blocks(int64_t tokens, int64_t most, Fn fn) {
    const int64_t blocks = (tokens + most - 1) / most;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t begin = tokens * i / blocks;
        fn(begin, tokens * (i + 1) / blocks - begin);
    }
}

}  // namespace prunus
