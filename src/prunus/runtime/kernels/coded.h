// bfloat16 values in twelve bits: a low byte, and half a byte that names one of sixteen high bytes.
//
// The exponents of a layer's weights differ little, so sixteen high bytes (a sign and seven of the
// eight exponent bits) cover nearly all values; the others are listed with their positions. A few
// rows at a time are decoded into the first-level cache. Kernels that combine high and low bytes in
// registers get the high bytes alone; other kernels get whole values, so that every kernel works on
// coded values as on plain ones.
#pragma once

#include <algorithm>

#include "activations.h"
#include "job.h"

namespace prunus {

constexpr int64_t kDecodedValues = 8192;  // values at a time: half of a first-level cache

// Calls fn(position from `first` on, high byte) for the values first … last - 1 that have no code.
template <typename Fn>
inline void for_rare(const PrunusWeight& weight, int64_t first, int64_t last, Fn fn) {
    const int64_t* const stop = weight.rare_at + weight.rare;
    for (const int64_t* at = std::lower_bound(weight.rare_at, stop, first); at < stop && *at < last;
         ++at)
        fn(*at - first, weight.rare_values[at - weight.rare_at]);
}

// Positions of the first value and past the last value of the groups that rows begin … end - 1
// touch.
struct Groups {
    int64_t first, last;
    Groups(const Job& job, int64_t begin, int64_t end)
        : first(row_begin(job, begin) / kCodedGroup * kCodedGroup),
          last((row_begin(job, end) + kCodedGroup - 1) / kCodedGroup * kCodedGroup) {}
};

// Decodes the values of rows begin … end - 1 to job.decoded and returns the job with them as its
// values.
inline Job decoded_rows(const Job& job, int64_t begin, int64_t end) {
    const PrunusWeight& weight = *job.coded;
    const Groups groups(job, begin, end);
    auto* to = reinterpret_cast<uint16_t*>(job.decoded);
    job.decode(static_cast<const uint8_t*>(weight.values) + groups.first,
               weight.codes + groups.first / 2, weight.high_bytes, groups.last - groups.first, to);
    for_rare(weight, groups.first, groups.last,
             [&](int64_t at, uint8_t high) { to[at] = uint16_t(high << 8 | (to[at] & 255)); });
    Job plain = job;
    plain.values = to;
    plain.first = groups.first;
    plain.tail_row = job.rows;  // there is room behind the decoded values
    return plain;
}

// Decodes the high bytes of these rows to job.decoded.
inline Job high_rows(const Job& job, int64_t begin, int64_t end) {
    const PrunusWeight& weight = *job.coded;
    const Groups groups(job, begin, end);
    job.decode_high(weight.codes + groups.first / 2, weight.high_bytes, groups.last - groups.first,
                    job.decoded);
    for_rare(weight, groups.first, groups.last,
             [&](int64_t at, uint8_t high) { job.decoded[at] = high; });
    Job ready = job;
    ready.high_first = groups.first;
    return ready;
}

template <Job (*decode)(const Job&, int64_t, int64_t)>
inline void rows_coded(const Job& job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += job.decoded_rows) {
        const int64_t stop = row + job.decoded_rows < end ? row + job.decoded_rows : end;
        job.decoded_fn(decode(job, row, stop), row, stop);
    }
}

// Hands decoded rows to rows_fn, a few at a time.
template <Job (*decode)(const Job&, int64_t, int64_t)>
inline void decode_first(Job& job) {
    job.decoded_fn = job.rows_fn;
    job.rows_fn = rows_coded<decode>;
}

// Gives every thread memory for the rows that it decodes at a time.
inline void split_decoded_memory(Job& job, int threads, Scratch& scratch) {
    // Kernels take rows in pairs.
    if (!job.decoded_rows)
        job.decoded_rows = std::max<int64_t>(kDecodedValues / job.cols, 2) & ~int64_t(1);
    if (!job.decoded_buffers) job.decoded_buffers = 1;
    const int64_t values =
        job.decoded_rows * job.cols / kCodedGroup * kCodedGroup + 2 * kCodedGroup + kOverrun;
    job.decoded_stride = job.decoded_buffers * values * 2;
    job.decoded = aligned<uint8_t>(scratch.decoded, threads * job.decoded_stride);
}

}  // namespace prunus
