// Puts activations into the layout and the dtype that the inner loops read: (segment, token, 64),
// with zeros past the last column.
#pragma once

#include <cmath>
#include <vector>

#include "job.h"

namespace prunus {

// kSplitInt16 is kInt16 with 64 low bytes followed by 64 high bytes instead of 64 words. The other
// layouts serve particular kernels; the functions that make them describe them.
enum class XForm {
    kBf16,
    kFloat,
    kInt16,
    kSplitInt16,
    kPartedBf16,
    kBlocks,
    kPartedBlocks,
    kByteTiles
};

// Memory of one thread that is reused from call to call.
struct Scratch {
    std::vector<uint8_t> x, x_float, x_tiles, x_scales, x_excess, sums, tail, ones, decoded, panels;
};

template <typename T>
T* sized(std::vector<uint8_t>& buffer, int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T);
    if (buffer.size() < bytes) buffer.resize(bytes);
    return reinterpret_cast<T*>(buffer.data());
}

// The same, aligned to 64 bytes.
template <typename T>
T* aligned(std::vector<uint8_t>& buffer, int64_t count) {
    uint8_t* at = sized<uint8_t>(buffer, count * int64_t(sizeof(T)) + 63);
    return reinterpret_cast<T*>(at + (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64);
}

// Calls fn(to, token, first column, columns) for every 64-wide piece of the layout.
template <typename T, typename Fn>
void for_pieces(const Job& job, T* to, Fn fn) {
    for (int64_t segment = 0; segment < job.segments; ++segment) {
        const int64_t first = segment * kSegment;
        const int64_t columns = job.cols - first < kSegment ? job.cols - first : kSegment;
        for (int64_t token = 0; token < job.tokens; ++token, to += kSegment) {
            fn(to, token, first, columns);
            for (int64_t i = columns; i < kSegment; ++i) to[i] = T(0);
        }
    }
}

inline void lay_out_bf16(Job& job, const void* x, Scratch& scratch) {
    uint16_t* to = sized<uint16_t>(scratch.x, job.segments * job.tokens * kSegment);
    job.x = to;
    for_pieces(job, to, [&](uint16_t* piece, int64_t token, int64_t first, int64_t columns) {
        std::memcpy(piece, static_cast<const uint16_t*>(x) + token * job.cols + first,
                    size_t(columns) * 2);
    });
}

inline const float* lay_out_float(Job& job, const void* x, Kind kind, Scratch& scratch) {
    float* to = sized<float>(scratch.x_float, job.segments * job.tokens * kSegment);
    job.x = to;
    for_pieces(job, to, [&](float* piece, int64_t token, int64_t first, int64_t columns) {
        const int64_t from = token * job.cols + first;
        if (kind == kBf16)  // a separate loop can be vectorised
            for (int64_t i = 0; i < columns; ++i)
                piece[i] = bf16_to_float(static_cast<const uint16_t*>(x)[from + i]);
        else
            for (int64_t i = 0; i < columns; ++i) piece[i] = load_as_float(x, from + i, kind);
    });
    return to;
}

// Rounds to symmetric 16-bit integers with one scale per token and group of 256 columns.
//
// The rounding error is at most 2^-16 of the group's largest activation, far below that of the int8
// weights. A group that holds an infinity or a NaN gets a NaN scale, so that the result is NaN and
// not a plausible number.
inline void lay_out_int16(Job& job, const void* x, Kind kind, XForm form, Scratch& scratch) {
    const float* floats = lay_out_float(job, x, kind, scratch);
    const int64_t groups = (job.segments + kGroup - 1) / kGroup;
    float* scales = sized<float>(scratch.x_scales, groups * job.tokens);
    int32_t* excess = sized<int32_t>(scratch.x_excess, groups * job.tokens * 16);
    uint8_t* to = sized<uint8_t>(scratch.x, job.segments * job.tokens * kSegment * 2);
    job.x = to;
    job.x_scales = scales;
    job.x_excess = excess;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * kGroup;
        const int64_t last = first + kGroup < job.segments ? first + kGroup : job.segments;
        for (int64_t token = 0; token < job.tokens; ++token) {
            int32_t largest = 0;  // magnitudes of floats are ordered like their bits
            for (int64_t segment = first; segment < last; ++segment) {
                const float* piece = floats + (segment * job.tokens + token) * kSegment;
                for (int64_t i = 0; i < kSegment; ++i) {
                    const int32_t bits = int32_t(float_to_bits(piece[i]) & 0x7fffffff);
                    largest = bits > largest ? bits : largest;
                }
            }
            const bool finite = largest < 0x7f800000;
            const float scale = finite ? bits_to_float(uint32_t(largest)) / 32767.0f : NAN;
            float inverse = 1.0f / scale;
            // The group is all zero, too small for a scale, or not finite: the integers are 0, and
            // only the scale counts.
            const bool usable = finite && scale > 0 && std::isfinite(inverse);
            if (!usable) inverse = 0.0f;
            scales[group * job.tokens + token] = scale;
            int32_t* lanes = excess + (group * job.tokens + token) * 16;
            std::memset(lanes, 0, 16 * sizeof(int32_t));
            for (int64_t segment = first; segment < last; ++segment) {
                const int64_t at = (segment * job.tokens + token) * kSegment;
                int16_t words[kSegment] = {};
                for (int64_t i = 0; usable && i < kSegment; ++i) {
                    // Adding and subtracting 1.5 · 2^23 rounds to nearest even without a library
                    // call. The largest activation gives 32767, perhaps plus an ulp of the product,
                    // which still rounds to 32767.
                    words[i] =
                        int16_t(int32_t((floats[at + i] * inverse + 12582912.0f) - 12582912.0f));
                }
                if (form == XForm::kInt16) {
                    std::memcpy(to + at * 2, words, sizeof words);
                    continue;
                }
                for (int64_t i = 0; i < kSegment; ++i) {
                    to[at * 2 + i] = uint8_t(words[i] & 255);
                    to[at * 2 + kSegment + i] = uint8_t(words[i] >> 8);
                }
                // A 32-bit lane sums the products of four neighbouring bytes.
                for (int64_t i = 0; i < kSegment; ++i) lanes[i / 4] += 128 * (words[i] >> 8);
            }
        }
    }
}

}  // namespace prunus
