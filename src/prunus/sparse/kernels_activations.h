// Brings activations into the layout and the dtype that the inner loops read.
#pragma once

#include <cmath>
#include <vector>

#include "kernels_job.h"

namespace prunus {

enum class XForm { kBf16, kFloat, kInt16, kSplitInt16 };

// Per-thread memory that is reused from call to call.
struct Scratch {
    std::vector<uint8_t> x, x_split, x_scales, x_excess, sums, tail;
};

template <typename T>
T* sized(std::vector<uint8_t>& buffer, int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T);
    if (buffer.size() < bytes) buffer.resize(bytes);
    return reinterpret_cast<T*>(buffer.data());
}

// Calls fn(to, token, first column, columns) for every 64-wide piece of the layout (segment, token, 64).
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
        std::memcpy(piece, static_cast<const uint16_t*>(x) + token * job.cols + first, size_t(columns) * 2);
    });
}

inline void lay_out_float(Job& job, const void* x, Kind kind, Scratch& scratch) {
    float* to = sized<float>(scratch.x, job.segments * job.tokens * kSegment);
    job.x = to;
    for_pieces(job, to, [&](float* piece, int64_t token, int64_t first, int64_t columns) {
        const int64_t from = token * job.cols + first;
        for (int64_t i = 0; i < columns; ++i) piece[i] = load_as_float(x, from + i, kind);
    });
}

// Symmetric 16-bit integers, one scale per token and group of 256 columns. The rounding error is at most
// 2^-16 of the group's largest activation, far below that of the int8 weights; a group that holds an
// infinity or a NaN gets a NaN scale, so that the result is NaN and not a plausible number.
inline void lay_out_int16(Job& job, const void* x, Kind kind, Scratch& scratch) {
    const int64_t groups = (job.segments + kGroup - 1) / kGroup;
    float* scales = sized<float>(scratch.x_scales, groups * job.tokens);
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * kGroup * kSegment;
        const int64_t last = first + kGroup * kSegment < job.cols ? first + kGroup * kSegment : job.cols;
        for (int64_t token = 0; token < job.tokens; ++token) {
            uint32_t largest = 0;  // magnitudes of floats order like their bits
            for (int64_t i = first; i < last; ++i) {
                const uint32_t bits = float_to_bits(load_as_float(x, token * job.cols + i, kind)) & 0x7fffffff;
                largest = bits > largest ? bits : largest;
            }
            const bool finite = largest < 0x7f800000;
            scales[group * job.tokens + token] = finite ? bits_to_float(largest) / 32767.0f : NAN;
        }
    }
    int16_t* to = sized<int16_t>(scratch.x, job.segments * job.tokens * kSegment);
    job.x = to;
    job.x_scales = scales;
    for_pieces(job, to, [&](int16_t* piece, int64_t token, int64_t first, int64_t columns) {
        const float scale = scales[first / (kGroup * kSegment) * job.tokens + token];
        const float inverse = 1.0f / scale;
        if (!(scale > 0 && std::isfinite(inverse))) {  // all zero, too small for a scale, or not finite
            std::memset(piece, 0, size_t(columns) * 2);
            return;
        }
        const int64_t from = token * job.cols + first;
        for (int64_t i = 0; i < columns; ++i) {
            // Adding and taking away 1.5 · 2^23 rounds to nearest even without a library call.
            const float value = load_as_float(x, from + i, kind) * inverse;
            const float rounded = (value + 12582912.0f) - 12582912.0f;
            piece[i] = int16_t(rounded < -32767.0f ? -32767.0f : rounded > 32767.0f ? 32767.0f : rounded);
        }
    });
}

// The same with low and high bytes apart, as products of bytes want them.
inline void lay_out_split_int16(Job& job, const void* x, Kind kind, Scratch& scratch) {
    lay_out_int16(job, x, kind, scratch);
    const int64_t pieces = job.segments * job.tokens;
    const int64_t groups = (job.segments + kGroup - 1) / kGroup;
    const int16_t* from = static_cast<const int16_t*>(job.x);
    uint8_t* to = sized<uint8_t>(scratch.x_split, pieces * 2 * kSegment);
    int32_t* excess = sized<int32_t>(scratch.x_excess, groups * job.tokens * 16);
    job.x = to;
    job.x_excess = excess;
    std::memset(excess, 0, size_t(groups * job.tokens) * 16 * sizeof(int32_t));
    for (int64_t piece = 0; piece < pieces; ++piece, from += kSegment, to += 2 * kSegment) {
        // A lane of 32 bits sums the products of four neighbouring bytes.
        int32_t* lanes = excess + (piece / job.tokens / kGroup * job.tokens + piece % job.tokens) * 16;
        for (int64_t i = 0; i < kSegment; ++i) {
            to[i] = uint8_t(from[i] & 255);
            to[kSegment + i] = uint8_t(from[i] >> 8);
            lanes[i / 4] += 128 * (from[i] >> 8);
        }
    }
}

}  // namespace prunus
