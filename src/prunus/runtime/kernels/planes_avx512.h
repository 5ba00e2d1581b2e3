// Layered bit planes with AVX-512 (VBMI2, VNNI) and GFNI: Ice Lake, Zen 4 and later.
//
// Layer 0 decodes 64 columns in three steps. A byte permutation puts the bits of eight columns from
// all planes into one 64-bit matrix, and `vgf2p8affineqb` transposes eight such matrices at once.
// Sign planes are repeated up to the highest bit, so that the result is value + bias. Then
// `vpexpandb` puts the bytes of escaped values into place.
//
// On Zen 4 a move of 64 bits to a mask register takes as much of the two multiplying ports as a
// product does. The transposition needs none however many planes there are: two planes take 5.1
// cycles instead of 5.7, four planes 5.2 instead of 9.2 (with a product, from the cache).
#pragma once

#include "avx512.h"
#include "lines_avx512.h"

#define PRUNUS_TARGET_PLANES                                                                      \
    __attribute__((                                                                               \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16," \
               "popcnt,bmi,bmi2,gfni")))

namespace prunus::planes {

// Moves a word of data to a mask register. Compilers that know the value in a general register move
// it from there, which takes twice as long.
PRUNUS_TARGET_PLANES PRUNUS_INLINE __mmask64 mask_at(const uint8_t* word) {
    if (avx512::kChecked) return _cvtu64_mask64(load_word(word));
    struct __attribute__((packed, may_alias)) Word {
        uint64_t value;
    };
    __mmask64 mask;
    asm("kmovq %1, %0" : "=k"(mask) : "m"(*reinterpret_cast<const Word*>(word)));
    return mask;
}

// Puts as many bytes as `mask` has bits into the places of these bits.
PRUNUS_TARGET_PLANES PRUNUS_INLINE __m512i merge(__m512i bytes, __mmask64 mask,
                                                 const uint8_t* from) {
    return _mm512_mask_expand_epi8(bytes, mask, _mm512_loadu_si512(from));
}

// How many symbols of a group escape. This is done with the words in memory, because the way from a
// mask register to a general one is slow.
template <int bits>
PRUNUS_TARGET_PLANES PRUNUS_INLINE int64_t escapes(const uint8_t* words) {
    uint64_t escaped = load_word(words);
    PRUNUS_UNROLL for (int plane = 1; plane < bits; ++plane) escaped &=
        load_word(words + plane * 8);
    return _mm_popcnt_u64(escaped);
}

// Loads the words of a group; masked-off words are not read. The load of half a register is the
// faster one.
template <int count>
PRUNUS_TARGET_PLANES PRUNUS_INLINE __m512i load_words(const uint8_t* from) {
    if (count <= 4)
        return _mm512_zextsi256_si512(_mm256_maskz_loadu_epi64(__mmask8((1 << count) - 1), from));
    return _mm512_maskz_loadu_epi64(__mmask8((1 << count) - 1), from);
}

// The permutation that makes the matrices: bit i of the transposed bytes comes from word `word[i]`.
PRUNUS_TARGET_PLANES inline __m512i permutation(const int (&word)[8]) {
    alignas(64) uint8_t from[64];
    for (int eight = 0; eight < 8; ++eight)
        for (int i = 0; i < 8; ++i) from[8 * eight + 7 - i] = uint8_t(word[i] * 8 + eight);
    return _mm512_load_si512(from);
}

// Byte i is 1 << i. Multiplied by a matrix, it picks column i.
PRUNUS_TARGET_PLANES PRUNUS_INLINE __m512i unit_bytes() {
    return _mm512_set1_epi64(int64_t(0x8040201008040201));
}

// ---- Layer 0. ----

template <int bits, int raw>
struct Top {
    // One plane, with at most one raw plane, is faster as a mask.
    static constexpr bool kMasks = bits == 1 && raw <= 1;
    // With raw bits, bytes of escaped values are added to the raw bits.
    static constexpr bool kAdds = raw > 0 && !kMasks;
    static constexpr int kPlanes = bits + raw;
    static constexpr int kLowest = 128 - (1 << (kPlanes - 1));  // the byte of the escape
    static constexpr int kBase = kAdds ? 128 - kLowest : 128;
    // The bits that are stored inverted: those of the top except the sign, and the highest.
    static constexpr int kInverted = 128 | ((1 << (bits - 1)) - 1) << raw;

    __m512i order, limit;

    PRUNUS_TARGET_PLANES PRUNUS_INLINE void start() {
        int word[8];
        for (int i = 0; i < 8; ++i)
            word[i] = i < raw ? bits + i : i < kPlanes - 1 ? i - raw : bits - 1;
        order = permutation(word);
        limit = _mm512_set1_epi8(char(kLowest + (1 << raw)));
    }
    PRUNUS_TARGET_PLANES PRUNUS_INLINE __m512i next(const uint8_t*& words,
                                                    const uint8_t*& escaped) const {
        __m512i bytes;
        if constexpr (kMasks) {
            bytes = merge(_mm512_set1_epi8(char(128)), mask_at(words), escaped);
            if (raw)
                bytes = _mm512_mask_add_epi8(bytes, mask_at(words + 8), bytes, _mm512_set1_epi8(1));
        } else {
            bytes = _mm512_gf2p8affine_epi64_epi8(
                unit_bytes(), _mm512_permutexvar_epi8(order, load_words<kPlanes>(words)),
                kInverted);
            const __mmask64 mask = _mm512_cmplt_epu8_mask(bytes, limit);
            bytes = kAdds ? _mm512_add_epi8(bytes, avx512::expand8(mask, escaped))
                          : merge(bytes, mask, escaped);
        }
        escaped += escapes<bits>(words);
        words += kPlanes * 8;
        return bytes;
    }
};

// Values of eight bits each.
template <>
struct Top<0, 0> {
    static constexpr int kBase = 128;
    PRUNUS_TARGET_PLANES PRUNUS_INLINE void start() {}
    PRUNUS_TARGET_PLANES PRUNUS_INLINE __m512i next(const uint8_t*& words, const uint8_t*&) const {
        const __m512i bytes =
            _mm512_xor_si512(_mm512_loadu_si512(words), _mm512_set1_epi8(char(128)));
        words += kSegment;
        return bytes;
    }
};

// Calls of one function for all pairs of bits and raw bits.
#define PRUNUS_TOP_ROW(name, bits) name<bits, 0>, name<bits, 1>, name<bits, 2>, name<bits, 3>
#define PRUNUS_TOPS(name)                                                                  \
    name<0, 0>, name<0, 0>, name<0, 0>, name<0, 0>, PRUNUS_TOP_ROW(name, 1),               \
        PRUNUS_TOP_ROW(name, 2), PRUNUS_TOP_ROW(name, 3), PRUNUS_TOP_ROW(name, 4)

inline int which_top(const Class& c) { return c.layers ? c.bits[0] * 4 + c.raw : 0; }

template <int bits, int raw>
PRUNUS_TARGET_PLANES void decode_top(const Class& c, const uint8_t* words, int64_t rows,
                                     const uint8_t* escaped, uint8_t* to, int64_t stride) {
    Top<bits, raw> top;
    top.start();
    for (int64_t row = 0; row < rows; ++row, to += stride)
        for (int64_t group = 0; group < c.groups; ++group)
            _mm512_store_si512(to + group * kSegment, top.next(words, escaped));
}

template <int bits, int raw>
constexpr int top_base = Top<bits, raw>::kBase;

// ---- Deeper layers. ----

// One plane as a mask, more planes by a transposition and a table.
template <int bits>
PRUNUS_TARGET_PLANES void decode_layer(const uint8_t* words, int64_t groups, const uint8_t* table,
                                       const uint8_t* escaped, uint8_t* to) {
    const __m512i values = _mm512_broadcast_i32x4(
                      _mm_loadu_si128(reinterpret_cast<const __m128i*>(table))),
                  first = _mm512_set1_epi8(char(table[0])),
                  escape = _mm512_set1_epi8((1 << bits) - 1);
    int word[8];
    for (int i = 0; i < 8; ++i) word[i] = i < bits ? i : bits;  // the word behind them loads as 0
    const __m512i order = permutation(word);
    _Pragma("GCC unroll 2")
    for (int64_t group = 0; group < groups; ++group, words += bits * 8, to += kSegment) {
        __m512i bytes = first;
        __mmask64 mask;
        if (bits == 1) {
            mask = mask_at(words);
        } else {
            bytes = _mm512_gf2p8affine_epi64_epi8(
                unit_bytes(), _mm512_permutexvar_epi8(order, load_words<bits>(words)), 0);
            mask = _mm512_cmpeq_epi8_mask(bytes, escape);
            bytes = _mm512_shuffle_epi8(values, bytes);
        }
        _mm512_store_si512(to, merge(bytes, mask, escaped));
        escaped += escapes<bits>(words);
    }
}

// ---- Products of unpacked rows. ----

// Multiplies R rows by T tokens. Eight products share six loads.
template <int R, int T>
PRUNUS_TARGET_PLANES void multiply_rows(const Planes& job, int64_t row, int64_t token,
                                        const uint8_t* bytes) {
    const int8_t* x = job.x + token * job.row_bytes;
    const float* scales = job.x_scales + token * job.blocks * kLanes;
    const int32_t* excess = job.excess + token * job.blocks * kLanes;
    __m512 sum[R][T];
    PRUNUS_UNROLL for (int r = 0; r < R; ++r) PRUNUS_UNROLL for (int t = 0; t < T; ++t) sum[r][t] =
        _mm512_setzero_ps();
    for (int k = 0; k < job.class_count; ++k) {
        for (int64_t left = job.classes[k].groups; left > 0; left -= kBlockGroups) {
            __m512i dot[R][T];
            PRUNUS_UNROLL for (int t = 0; t < T; ++t) {
                dot[0][t] = _mm512_load_si512(excess + t * job.blocks * kLanes);
                PRUNUS_UNROLL for (int r = 1; r < R; ++r) dot[r][t] = dot[0][t];
            }
            const int64_t groups = left < kBlockGroups ? left : kBlockGroups;
            for (int64_t i = 0; i < groups * kSegment; i += kSegment) {
                __m512i weight[R];
                PRUNUS_UNROLL for (int r = 0; r < R; ++r) weight[r] =
                    _mm512_load_si512(bytes + r * job.row_bytes + i);
                PRUNUS_UNROLL for (int t = 0; t < T; ++t) {
                    const __m512i activation = _mm512_load_si512(x + t * job.row_bytes + i);
                    PRUNUS_UNROLL for (int r = 0; r < R; ++r) dot[r][t] =
                        _mm512_dpbusd_epi32(dot[r][t], weight[r], activation);
                }
            }
            PRUNUS_UNROLL for (int t = 0; t < T; ++t) {
                const __m512 scale = _mm512_load_ps(scales + t * job.blocks * kLanes);
                PRUNUS_UNROLL for (int r = 0; r < R; ++r) sum[r][t] =
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][t]), scale, sum[r][t]);
            }
            x += kBlock;
            bytes += kBlock;
            scales += kLanes;
            excess += kLanes;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t)
            finish(job, row + r, token + t, _mm512_reduce_add_ps(sum[r][t]));
}

struct Avx512 {
    static constexpr int64_t kExceptionPrice = Portable::kExceptionPrice;

    static int base(const Class& c) {
        constexpr int bases[] = {PRUNUS_TOPS(top_base)};
        return bases[which_top(c)];
    }

    PRUNUS_TARGET_PLANES static void escape_bytes(const uint8_t* from, int64_t count, int raw,
                                                  int base, uint8_t* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = uint8_t((from[i] << raw) + base);
    }

    static void layer(int bits, const uint8_t* words, int64_t groups, const uint8_t* table,
                      const uint8_t* escaped, uint8_t* to) {
        using Fn = void (*)(const uint8_t*, int64_t, const uint8_t*, const uint8_t*, uint8_t*);
        static constexpr Fn fns[] = {decode_layer<1>, decode_layer<2>, decode_layer<3>,
                                     decode_layer<4>};
        fns[bits - 1](words, groups, table, escaped, to);
    }

    static void top(const Class& c, const uint8_t* words, int64_t rows, const uint8_t* escaped,
                    uint8_t* to, int64_t stride) {
        using Fn = void (*)(const Class&, const uint8_t*, int64_t, const uint8_t*, uint8_t*,
                            int64_t);
        static constexpr Fn fns[] = {PRUNUS_TOPS(decode_top)};
        fns[which_top(c)](c, words, rows, escaped, to, stride);
    }

    static void unpack(int width, int64_t groups, const uint8_t* lines, uint8_t* to,
                       int64_t stride) {
        using Fn = void (*)(int64_t, const uint8_t*, uint8_t*, int64_t);
        static constexpr Fn fns[] = {PRUNUS_WIDTHS(lines512::unpack)};
        fns[width - 1](groups, lines, to, stride);
    }

    static void multiply_tile(const Planes& job, const Class& c, int width, const uint8_t* lines,
                              const TileSums& tile) {
        using Fn = void (*)(const Planes&, const Class&, const uint8_t*, const TileSums&);
        static constexpr Fn fns[] = {PRUNUS_WIDTHS(lines512::multiply)};
        fns[width - 1](job, c, lines, tile);
    }
    static float reduce(const float* sums) { return lines512::reduce(sums); }

    static void multiply(const Planes& job, int64_t row, int64_t rows, const uint8_t* bytes) {
        using Fn = void (*)(const Planes&, int64_t, int64_t, const uint8_t*);
        static constexpr Fn pairs[] = {multiply_rows<2, 1>, multiply_rows<2, 2>,
                                       multiply_rows<2, 3>, multiply_rows<2, 4>},
                            singles[] = {multiply_rows<1, 1>, multiply_rows<1, 2>,
                                         multiply_rows<1, 3>, multiply_rows<1, 4>};
        for_token_blocks(job.tokens, 4, [&](int64_t token, int64_t count) {
            int64_t i = 0;
            for (; i + 2 <= rows; i += 2)
                pairs[count - 1](job, row + i, token, bytes + i * job.row_bytes);
            if (i < rows) singles[count - 1](job, row + i, token, bytes + i * job.row_bytes);
        });
    }

    // Sixteen activations at a time: those of each class are moved together in a register. A store
    // through a mask would take a hundred cycles on Zen 4; here the next store overwrites what is
    // too much.
    PRUNUS_TARGET_PLANES static void order(const Planes& job, const void* x, int64_t first,
                                           Kind kind, float* const* to) {
        float* next[kMaxClasses];
        for (int k = 0; k < job.class_count; ++k) next[k] = to[k];
        for (int64_t column = 0; column < job.cols; column += 16) {
            const int64_t left = job.cols - column;
            const __mmask16 inside = left >= 16 ? __mmask16(~0) : __mmask16((1 << left) - 1);
            const __m128i classes = _mm_mask_loadu_epi8(_mm_set1_epi8(char(kMaxClasses)), inside,
                                                        job.class_of + column);
            const __m512 values =
                _mm512_mul_ps(load_floats(x, first + column, kind, inside),
                              load_floats(job.steps, column, kBf16, inside));
            for (int k = 0; k < job.class_count; ++k) {
                const __mmask16 mask = _mm_cmpeq_epi8_mask(classes, _mm_set1_epi8(char(k)));
                _mm512_storeu_ps(next[k], _mm512_maskz_compress_ps(mask, values));
                next[k] += _mm_popcnt_u32(mask);
            }
        }
    }

    PRUNUS_TARGET_PLANES PRUNUS_INLINE static __m512 load_floats(const void* from, int64_t at,
                                                                 Kind kind, __mmask16 inside) {
        if (kind == kF32)
            return _mm512_maskz_loadu_ps(inside, static_cast<const float*>(from) + at);
        const __m256i words =
            _mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(from) + at);
        return kind == kBf16 ? avx512::Float<kBf16>::widen(words)
                             : avx512::Float<kF16>::widen(words);
    }

    // A lane holds the sum over its four bytes of each group.
    PRUNUS_TARGET_PLANES static void sum_excess(const int8_t* x, int64_t groups, int bias,
                                                int32_t* to) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < groups; ++i)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(bias)),
                                      _mm512_loadu_si512(x + i * kSegment));
        _mm512_storeu_si512(to, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    }

    PRUNUS_TARGET_PLANES static void lay_out(Planes& job, const void* x, Kind kind,
                                             Scratch& scratch) {
        lay_out_tokens<Avx512>(job, x, kind, scratch);
    }

    PRUNUS_TARGET_PLANES static void expand_row(const Planes& job, const uint8_t* bytes,
                                                int64_t row, int64_t at) {
        alignas(64) int8_t levels[kSegment];
        const uint8_t* next[kMaxClasses];
        for (int k = 0; k < job.class_count; ++k)
            next[k] = bytes + job.classes[k].first_block * kBlock;
        const float scale = bf16_to_float(job.scales[row]);
        for (int64_t column = 0; column < job.cols; column += kSegment) {
            const int64_t left = job.cols - column, count = left < kSegment ? left : kSegment;
            const __mmask64 inside = ~uint64_t(0) >> (kSegment - count);
            const __m512i classes = _mm512_mask_loadu_epi8(
                _mm512_set1_epi8(char(kMaxClasses)), inside, job.class_of + column);
            __m512i values = _mm512_setzero_si512();
            for (int k = 0; k < job.class_count; ++k) {
                const __mmask64 mask =
                    _mm512_cmpeq_epi8_mask(classes, _mm512_set1_epi8(char(k)));
                values = merge(values, mask, next[k]);
                next[k] += _mm_popcnt_u64(_cvtmask64_u64(mask));
            }
            _mm512_store_si512(levels, _mm512_xor_si512(values, _mm512_set1_epi8(char(128))));
            convert_row(job, levels, column, count, scale, job.out, at * job.cols + column);
        }
    }
};

#undef PRUNUS_TOP_ROW
#undef PRUNUS_TOPS

}  // namespace prunus::planes
