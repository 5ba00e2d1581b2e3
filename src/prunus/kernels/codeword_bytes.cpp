// The bytes of codewords: from levels and codes to the bits of a span, and back.
//
// torch needs an integer of eight bytes for each bit that it moves. Here a span stays in registers
// and the first-level cache, and the weight is read once.

#include <algorithm>

#include "kernels.h"
#include "threads.h"

namespace prunus::codeword_bytes {
namespace {

constexpr int kSpan = 256;  // columns
constexpr int kRuns = 8;
constexpr int kMostIntegers = 8;      // of a part in a run
constexpr int64_t kSpansAtATime = 64;  // of one thread

// An entry of a layout, see kernels.h. The parts are rows of the grid, signs and codes.
struct Entry {
    int32_t part, integers, bits, start, run, distance;
};

// The integers of a span by part.
struct Integers {
    uint32_t of[3][kRuns * kMostIntegers] = {};
};

// Whether all bits lie within the bytes of a span, and all parts are known and have a number of
// integers that suits them.
bool is_valid(const Entry* layout, int64_t entries, int64_t bytes, int64_t columns) {
    int bits[3] = {}, integers[3] = {};
    for (const Entry* x = layout; x < layout + entries; ++x) {
        if (x->part < 0 || x->part > 2 || x->integers < 1 || x->integers > kMostIntegers ||
            x->bits < 1 || x->bits > 16 || x->start < 0 || x->run < 0 || x->distance < 0)
            return false;
        const int64_t last = x->start + int64_t(kRuns - 1) * x->run +
                             int64_t(x->integers - 1) * x->distance + x->bits;
        if (last > 8 * bytes) return false;
        bits[x->part] += x->bits;
        integers[x->part] = x->integers;
    }
    return bits[0] > 0 && bits[0] <= 16 && integers[0] * kRuns * columns == kSpan &&
           (bits[1] == 7 || bits[1] == 8) && integers[1] * kRuns * 8 == kSpan && bits[2] > 0 &&
           bits[2] <= 8;
}

// Calls move(integer, low, bits, place) for every run of bits: the bits of the integer from the bit
// `low` on are at bit `place` of the span.
template <typename Move>
void for_bits(const Entry* layout, int64_t entries, Integers& integers, const Move& move) {
    int low[3] = {};
    for (const Entry* x = layout; x < layout + entries; low[x->part] += x->bits, ++x)
        for (int run = 0; run < kRuns; ++run)
            for (int i = 0; i < x->integers; ++i)
                move(integers.of[x->part][run * x->integers + i], low[x->part], x->bits,
                     x->start + run * x->run + i * x->distance);
}

int groups_of(const Entry* layout, int64_t entries) {
    int groups = 0;
    for (const Entry* x = layout; x < layout + entries; ++x)
        if (x->part == 2) groups = kRuns * x->integers;
    return groups;
}

// Calls work(span) for every span.
template <typename Work>
void for_spans(int threads, int64_t spans, const Work& work) {
    for_parts(threads, (spans + kSpansAtATime - 1) / kSpansAtATime, [&](int64_t part) {
        const int64_t end = std::min(spans, (part + 1) * kSpansAtATime);
        for (int64_t span = part * kSpansAtATime; span < end; ++span) work(span);
    });
}

}  // namespace
}  // namespace prunus::codeword_bytes

extern "C" int prunus_pack_codewords(int isa, int threads, int64_t spans, int64_t bytes,
                                     int64_t columns, int64_t digits, int64_t entries,
                                     int64_t keys, const int32_t* layout, const int64_t* row_of_key,
                                     const uint8_t* levels, const uint8_t* codes,
                                     uint8_t* packed) {
    using namespace prunus::codeword_bytes;
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    const auto* parts = reinterpret_cast<const Entry*>(layout);
    if (spans < 0 || digits < 1 || keys < 1 || !layout || !row_of_key || !levels || !codes ||
        !packed || !is_valid(parts, entries, bytes, columns))
        return PRUNUS_BAD_ARGUMENT;
    const int groups = groups_of(parts, entries);
    for_spans(threads, spans, [&](int64_t span) {
        const uint8_t *level = levels + span * kSpan, *code = codes + span * groups;
        uint8_t* to = packed + span * bytes;
        Integers integers;
        for (int first = 0; first < kSpan; first += int(columns)) {
            int64_t key = 0, place = 1;
            for (int c = first; c < first + columns; ++c, place *= digits) {
                // Levels below the half are negative values, from the largest magnitude on.
                const bool negative = level[c] < digits;
                integers.of[1][c / 8] |= uint32_t(negative) << c % 8;
                key += place * (negative ? digits - 1 - level[c] : level[c] - digits);
            }
            // A key that is none has no codeword.
            integers.of[0][first / columns] =
                uint32_t(key >= 0 && key < keys ? row_of_key[key] : 0);
        }
        for (int group = 0; group < groups; ++group) integers.of[2][group] = code[group];
        std::fill(to, to + bytes, uint8_t(0));
        for_bits(parts, entries, integers, [&](uint32_t integer, int low, int bits, int place) {
            uint32_t moved = (integer >> low & ((1u << bits) - 1)) << place % 8;
            for (int byte = place / 8; moved; ++byte, moved >>= 8) to[byte] |= uint8_t(moved);
        });
    });
    return PRUNUS_OK;
}

extern "C" int prunus_unpack_codewords(int isa, int threads, int64_t spans, int64_t bytes,
                                       int64_t columns, int64_t digits, int64_t entries,
                                       int64_t count, const int32_t* layout, const int64_t* grid,
                                       const uint8_t* packed, uint8_t* levels, uint8_t* codes) {
    using namespace prunus::codeword_bytes;
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    const auto* parts = reinterpret_cast<const Entry*>(layout);
    if (spans < 0 || digits < 1 || count < 1 || !layout || !grid || !packed || !levels || !codes ||
        !is_valid(parts, entries, bytes, columns))
        return PRUNUS_BAD_ARGUMENT;
    int sign_bits = 0;
    for (const Entry* x = parts; x < parts + entries; ++x) sign_bits += x->part == 1 ? x->bits : 0;
    const int groups = groups_of(parts, entries);
    for_spans(threads, spans, [&](int64_t span) {
        const uint8_t* from = packed + span * bytes;
        uint8_t *level = levels + span * kSpan, *code = codes + span * groups;
        Integers integers;
        for_bits(parts, entries, integers, [&](uint32_t& integer, int low, int bits, int place) {
            uint32_t found = 0;
            for (int bit = 0; bit < place % 8 + bits; bit += 8)
                found |= uint32_t(from[(place + bit) / 8]) << bit;
            integer |= (found >> place % 8 & ((1u << bits) - 1)) << low;
        });
        if (sign_bits == 7)  // The eighth sign makes the number of negative weights even.
            for (uint32_t& signs : integers.of[1])
                for (int bit = 0; bit < 7; ++bit) signs ^= (signs >> bit & 1) << 7;
        for (int first = 0; first < kSpan; first += int(columns)) {
            const int64_t row = integers.of[0][first / columns];
            const int64_t* digit = grid + std::min(row, count - 1) * columns;
            for (int c = first; c < first + columns; ++c, ++digit)
                level[c] = uint8_t(integers.of[1][c / 8] >> c % 8 & 1 ? digits - 1 - *digit
                                                                      : digits + *digit);
        }
        for (int group = 0; group < groups; ++group) code[group] = uint8_t(integers.of[2][group]);
    });
    return PRUNUS_OK;
}
