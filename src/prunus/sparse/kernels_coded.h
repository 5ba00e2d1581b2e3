// bfloat16 values in twelve bits: a low byte each, and half a byte that says which of sixteen high bytes it has.
//
// The exponents of a layer's weights differ little, so sixteen high bytes (a sign and seven of the eight bits of the
// exponent) are nearly all there are; what has another is listed with its place. Two rows or so are decoded into the
// first-level cache and multiplied from there, so that every kernel works on coded values as on plain ones.
#pragma once

#include <algorithm>

#include "kernels_activations.h"
#include "kernels_job.h"

namespace prunus {

constexpr int64_t kDecodedValues = 8192;  // about as many at a time: half of a first-level cache

// Puts the high bytes that have no code into values number first … last - 1, which are decoded at `to`.
inline void patch_rare(const PrunusWeight& weight, int64_t first, int64_t last, uint16_t* to) {
    const int64_t* const stop = weight.rare_at + weight.rare;
    for (const int64_t* at = std::lower_bound(weight.rare_at, stop, first); at < stop && *at < last; ++at)
        to[*at - first] = uint16_t(weight.rare_values[at - weight.rare_at] << 8 | (to[*at - first] & 255));
}

// Decodes the values of rows begin … end - 1 to job.decoded and returns the job with these as its values.
inline Job decoded_rows(const Job& job, int64_t begin, int64_t end) {
    const PrunusWeight& weight = *job.coded;
    const int64_t first = row_begin(job, begin) / kCodedGroup * kCodedGroup;
    const int64_t last = (row_begin(job, end) + kCodedGroup - 1) / kCodedGroup * kCodedGroup;
    job.decode(static_cast<const uint8_t*>(weight.values) + first, weight.codes + first / 2, weight.high_bytes, last - first,
               job.decoded);
    patch_rare(weight, first, last, job.decoded);
    Job plain = job;
    plain.values = job.decoded;
    plain.first = first;
    return plain;
}

inline void rows_coded(const Job& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += job.decoded_rows) {
        const int64_t stop = row + job.decoded_rows < end ? row + job.decoded_rows : end;
        job.decoded_fn(decoded_rows(job, row, stop), row, stop);
    }
}

// Leaves decoded rows to rows_fn, a few at a time.
inline void decode_first(Job& job) {
    job.decoded_fn = job.rows_fn;
    job.rows_fn = rows_coded;
}

// Gives every thread memory for as many rows as it decodes at a time.
inline void share_out_decoded(Job& job, int threads, Scratch& scratch) {
    // Kernels take rows in pairs.
    if (!job.decoded_rows) job.decoded_rows = std::max<int64_t>(kDecodedValues / job.cols, 2) & ~int64_t(1);
    if (!job.decoded_buffers) job.decoded_buffers = 1;
    const int64_t values = job.decoded_rows * job.cols / kCodedGroup * kCodedGroup + 2 * kCodedGroup + kOverrun;
    job.decoded_stride = job.decoded_buffers * values;
    job.decoded = aligned<uint16_t>(scratch.decoded, threads * job.decoded_stride);
}

}  // namespace prunus
