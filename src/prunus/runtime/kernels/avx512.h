// AVX-512 with VBMI2 and VNNI (Ice Lake, Zen 4 and later), and with BF16 where the machine has it.
//
// Per 64 columns: read 64 mask bits, load the next values twice (the second load starts after the
// popcount of the lower half), put both into place with `vpexpandw`, multiply and add, and advance
// by the popcount. One move to a mask register per 64 columns instead of one per 32 made this 1.6
// times faster on Zen 4.
#pragma once

#include <immintrin.h>

#include "activations.h"
#include "job.h"

// All code here has one target. BF16 instructions come only from `Bf16` below, which is chosen only
// where the machine has them.
#define PRUNUS_TARGET                                                                             \
    __attribute__((                                                                               \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16," \
               "popcnt,bmi,bmi2")))
#define PRUNUS_INLINE __attribute__((always_inline)) inline
// An array of vectors stays in registers only if every loop over it is fully unrolled.
#define PRUNUS_UNROLL _Pragma("GCC unroll 64")

namespace prunus::avx512 {

// How far ahead to prefetch, in bytes and rows. The target is the second-level cache, and the
// distance is long: with short distances, or with the first level as target, a core waits for its
// few line-fill buffers. On Zen 4 this made one thread a fifth faster.
constexpr int kValuesAhead = 1 << 14, kDenseAhead = 1 << 12, kMaskRowsAhead = 4,
              kCodedAhead = 1 << 14;

PRUNUS_TARGET PRUNUS_INLINE void prefetch(const void* at, int64_t ahead) {
    _mm_prefetch(static_cast<const char*>(at) + ahead, _MM_HINT_T1);
}

// `vpexpand` of as many bytes or words as `mask` has bits, from any address.
//
// On Zen 4 an expansion waits for the previous content of its target register although it zeroes
// it. Clearing the target first saves a tenth of the time of coded values. This is assembly because
// compilers remove the clearing. The sanitizer build uses the intrinsic, so that the sanitizer sees
// the loads.
#define PRUNUS_EXPAND(name, Mask, instruction, intrinsic)                   \
    PRUNUS_TARGET PRUNUS_INLINE __m512i name(Mask mask, const void* from) { \
        if (kChecked) return intrinsic(mask, _mm512_loadu_si512(from));     \
        __m512i to;                                                         \
        asm("vpxor %x0, %x0, %x0\n\t" instruction " %2, %0%{%1%}%{z%}"      \
            : "=&x"(to)                                                     \
            : "Yk"(mask), "m"(*static_cast<const __m512i_u*>(from)));       \
        return to;                                                          \
    }
#ifdef __SANITIZE_ADDRESS__
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif
PRUNUS_EXPAND(expand8, __mmask64, "vpexpandb", _mm512_maskz_expand_epi8)
PRUNUS_EXPAND(expand16, __mmask32, "vpexpandw", _mm512_maskz_expand_epi16)
#undef PRUNUS_EXPAND

// 64 weights of 16 bits.
struct Pair {
    __m512i low, high;
};

PRUNUS_TARGET PRUNUS_INLINE Pair expand(uint64_t word, const uint16_t*& values) {
    const __mmask64 mask = _cvtu64_mask64(word);
    const int lower = _mm_popcnt_u32(uint32_t(word));
    const Pair pair = {expand16(__mmask32(mask), values),
                       expand16(__mmask32(_kshiftri_mask64(mask, 32)), values + lower)};
    values += _mm_popcnt_u64(word);
    return pair;
}

PRUNUS_TARGET PRUNUS_INLINE __m512i expand(uint64_t word, const int8_t*& values) {
    const __m512i bytes = expand8(_cvtu64_mask64(word), values);
    values += _mm_popcnt_u64(word);
    return bytes;
}

// 64 words from their low and high bytes: the words of even columns, then those of odd columns.
// Shifts and logic do not need the execution port that expansion needs; instructions that
// interleave bytes would.
PRUNUS_TARGET PRUNUS_INLINE Pair join(__m512i low, __m512i high) {
    asm("" : "+v"(low), "+v"(high));  // keeps compilers from loading both twice
    const __m512i lower = _mm512_set1_epi16(0x00ff);
    return {_mm512_ternarylogic_epi32(_mm512_slli_epi16(high, 8), low, lower, 0xf8),   // a | b & c
            _mm512_ternarylogic_epi32(high, _mm512_srli_epi16(low, 8), lower, 0xdc)};  // a & ~c | b
}

PRUNUS_TARGET PRUNUS_INLINE Pair expand_coded(uint64_t word, const uint8_t* low,
                                              const uint8_t* high) {
    const __mmask64 mask = _cvtu64_mask64(word);
    return join(expand8(mask, low), expand8(mask, high));
}

// Prefetches the masks of a later row. Addresses of values depend on all masks before them, so a
// mask that arrives late delays everything.
PRUNUS_TARGET PRUNUS_INLINE void ask_for_masks(const Job& job, const uint8_t* mask) {
    for (int64_t byte = 0; byte < job.mask_stride; byte += 64)
        prefetch(mask, kMaskRowsAhead * job.mask_stride + byte);
}

// ---- Sources of weights: each yields the segments of one row in order. ----

template <typename Value>
struct Bitmap {
    const uint8_t* mask;
    const Value* values;
    // The last segment and its mask. The mask is read beforehand, because a call to memcpy within
    // the loop would save every vector register around it.
    int64_t last;
    uint64_t last_word;

    PRUNUS_TARGET PRUNUS_INLINE void start(const Job& job, int64_t row) {
        mask = job.mask + row * job.mask_stride;
        values = row_values<Value>(job, row);
        last = job.segments - 1;
        last_word = mask_word(mask, last, job.cols);
        ask_for_masks(job, mask);
    }
    // `inner` means that the segment is not the row's last, so that no check for the end is needed.
    template <bool inner>
    PRUNUS_TARGET PRUNUS_INLINE auto next(int64_t segment) {
        uint64_t word = last_word;
        if (inner || segment != last) std::memcpy(&word, mask + segment * 8, 8);
        // On average half of 64 columns survive, which is one cache line of 16-bit values. The
        // second prefetch keeps up with denser rows.
        prefetch(values, kValuesAhead);
        if (sizeof(Value) == 2) prefetch(values, kValuesAhead + 64);
        return expand(word, values);
    }
};

// A source whose columns are all stored.
template <typename Value>
struct Dense {
    const Value* values;
    int64_t cols;

    PRUNUS_TARGET PRUNUS_INLINE void start(const Job& job, int64_t row) {
        values = static_cast<const Value*>(job.values) + (row * job.cols - job.first);
        cols = job.cols;
    }
    template <bool inner>
    PRUNUS_TARGET PRUNUS_INLINE auto next(int64_t segment) {
        const Value* from = values + segment * kSegment;
        prefetch(from, kDenseAhead);
        if (sizeof(Value) == 2) prefetch(from, kDenseAhead + 64);
        const int64_t left = cols - segment * kSegment;
        // Masked-off lanes do not access memory.
        const uint64_t mask = inner || left >= kSegment ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
        return load(mask, from);
    }

    PRUNUS_TARGET PRUNUS_INLINE static Pair load(uint64_t mask, const uint16_t* from) {
        return {_mm512_maskz_loadu_epi16(__mmask32(mask), from),
                _mm512_maskz_loadu_epi16(__mmask32(mask >> 32), from + 32)};
    }
    PRUNUS_TARGET PRUNUS_INLINE static __m512i load(uint64_t mask, const int8_t* from) {
        return _mm512_maskz_loadu_epi8(mask, from);
    }
};

// Low bytes come from memory and decoded high bytes from the cache. This loop prefetches the low
// bytes and the decoding prefetches the codes, so that memory is busy during both.
struct CodedBytes {
    const uint8_t *low, *high;

    PRUNUS_TARGET PRUNUS_INLINE void start(const Job& job, int64_t row) {
        low = row_values<uint8_t>(job, row);
        high = job.decoded + (row_begin(job, row) - job.high_first);
    }
};

struct CodedBitmap {
    CodedBytes bytes;
    const uint8_t* mask;
    int64_t at, last;
    uint64_t last_word;

    PRUNUS_TARGET PRUNUS_INLINE void start(const Job& job, int64_t row) {
        bytes.start(job, row);
        at = 0;
        mask = job.mask + row * job.mask_stride;
        last = job.segments - 1;
        last_word = mask_word(mask, last, job.cols);
        ask_for_masks(job, mask);
    }
    template <bool inner>
    PRUNUS_TARGET PRUNUS_INLINE Pair next(int64_t segment) {
        uint64_t word = last_word;
        if (inner || segment != last) std::memcpy(&word, mask + segment * 8, 8);
        prefetch(bytes.low + at, kCodedAhead);
        const Pair pair = expand_coded(word, bytes.low + at, bytes.high + at);
        at += _mm_popcnt_u64(word);
        return pair;
    }
};

struct CodedDense {
    CodedBytes bytes;
    int64_t cols;

    PRUNUS_TARGET PRUNUS_INLINE void start(const Job& job, int64_t row) {
        bytes.start(job, row);
        cols = job.cols;
    }
    template <bool inner>
    PRUNUS_TARGET PRUNUS_INLINE Pair next(int64_t segment) {
        const int64_t at = segment * kSegment, left = cols - at;
        prefetch(bytes.low + at, kCodedAhead);
        const uint64_t inside =
            inner || left >= kSegment ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
        return join(_mm512_maskz_loadu_epi8(inside, bytes.low + at),
                    _mm512_maskz_loadu_epi8(inside, bytes.high + at));
    }
};

// 64 words, those of even columns before those of odd columns.
PRUNUS_TARGET PRUNUS_INLINE Pair part(const Pair& words) {
    alignas(64) static constexpr uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                       22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                       44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const __m512i even = _mm512_load_si512(kEven),
                  odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    return {_mm512_permutex2var_epi16(words.low, even, words.high),
            _mm512_permutex2var_epi16(words.low, odd, words.high)};
}

// Up to 64 words, with zeros past them.
PRUNUS_TARGET PRUNUS_INLINE Pair load_words(const uint16_t* from, int64_t count) {
    const uint64_t inside = count >= kSegment ? ~uint64_t(0)
                            : count > 0       ? (uint64_t(1) << count) - 1
                                              : 0;
    return {_mm512_maskz_loadu_epi16(__mmask32(inside), from),
            _mm512_maskz_loadu_epi16(__mmask32(inside >> 32), from + 32)};
}

// bf16 activations in the column order of joined weights.
PRUNUS_TARGET inline void lay_out_parted(Job& job, const void* x, Scratch& scratch) {
    uint16_t* to = aligned<uint16_t>(scratch.x, job.segments * job.tokens * kSegment);
    job.x = to;
    for (int64_t segment = 0; segment < job.segments; ++segment) {
        for (int64_t token = 0; token < job.tokens; ++token, to += kSegment) {
            const int64_t first = segment * kSegment;
            const Pair parted = part(load_words(
                static_cast<const uint16_t*>(x) + token * job.cols + first, job.cols - first));
            _mm512_store_si512(to, parted.low);
            _mm512_store_si512(to + 32, parted.high);
        }
    }
}

// ---- Arithmetic: how 64 weights meet 64 activations. ----
//
//   X, kWidth    the elements of the activations, and how many there are per segment and token
//   Sum, begin   an accumulator, and its value at the beginning of a group of segments
//   kGrouped     whether groups have scales of their own; if not, the row is one group
//   kChains      accumulators that take turns to hide latency, where registers allow it
//   kPairFrom    the number of tokens from which two rows at once pay off
//
// Two rows at once share the loads of activations. With few tokens the second row's stream costs
// float32 more in prefetches than the saved loads; the narrower types gain at once.

// bf16 weights, bf16 activations, float32 sums.
struct Bf16 {
    using X = uint16_t;
    using Sum = __m512;
    static constexpr int kWidth = kSegment, kChains = 2, kPairFrom = 1;
    static constexpr bool kGrouped = false;

    PRUNUS_TARGET PRUNUS_INLINE static Sum begin(const Job&, int64_t, int64_t) {
        return _mm512_setzero_ps();
    }
    PRUNUS_TARGET PRUNUS_INLINE static Pair prepare(Pair weights) { return weights; }
    PRUNUS_TARGET PRUNUS_INLINE static Pair load(const X* x) {
        return {_mm512_loadu_si512(x), _mm512_loadu_si512(x + 32)};
    }
    PRUNUS_TARGET PRUNUS_INLINE static void add(Sum& a, Sum& b, const Pair& w, const Pair& x) {
        a = _mm512_dpbf16_ps(a, (__m512bh)w.low, (__m512bh)x.low);
        b = _mm512_dpbf16_ps(b, (__m512bh)w.high, (__m512bh)x.high);
    }
    PRUNUS_TARGET PRUNUS_INLINE static __m512 total(const Sum& sum) { return sum; }
};

struct Quarters {
    __m512 q[4];
};

// 16-bit float weights, float32 activations: exact products, float32 sums.
template <Kind kind>
struct Float {
    using X = float;
    using Sum = __m512;
    static constexpr int kWidth = kSegment, kChains = 2, kPairFrom = 5;
    static constexpr bool kGrouped = false;

    PRUNUS_TARGET PRUNUS_INLINE static Sum begin(const Job&, int64_t, int64_t) {
        return _mm512_setzero_ps();
    }
    PRUNUS_TARGET PRUNUS_INLINE static __m512 widen(__m256i words) {
        if (kind == kF16) return _mm512_cvtph_ps(words);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    PRUNUS_TARGET PRUNUS_INLINE static Quarters prepare(Pair w) {
        return {{widen(_mm512_castsi512_si256(w.low)), widen(_mm512_extracti64x4_epi64(w.low, 1)),
                 widen(_mm512_castsi512_si256(w.high)),
                 widen(_mm512_extracti64x4_epi64(w.high, 1))}};
    }
    PRUNUS_TARGET PRUNUS_INLINE static Quarters load(const X* x) {
        return {{_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16), _mm512_loadu_ps(x + 32),
                 _mm512_loadu_ps(x + 48)}};
    }
    PRUNUS_TARGET PRUNUS_INLINE static void add(Sum& a, Sum& b, const Quarters& w,
                                                const Quarters& x) {
        a = _mm512_fmadd_ps(w.q[0], x.q[0], a);
        b = _mm512_fmadd_ps(w.q[1], x.q[1], b);
        a = _mm512_fmadd_ps(w.q[2], x.q[2], a);
        b = _mm512_fmadd_ps(w.q[3], x.q[3], b);
    }
    PRUNUS_TARGET PRUNUS_INLINE static __m512 total(const Sum& sum) { return sum; }
};

// int8 weights and 16-bit activations x = 256 h + l with h signed and l unsigned; exact int32 sums
// within a group. `vpdpbusd` multiplies unsigned by signed bytes: l · w directly, and (w + 128) ·
// h, which is 128 · Σh too much in every lane.
struct Int {
    using X = uint8_t;
    struct Sum {
        __m512i high, low;
    };
    static constexpr int kWidth = 2 * kSegment, kChains = 1, kPairFrom = 1;
    static constexpr bool kGrouped = true;

    PRUNUS_TARGET PRUNUS_INLINE static Sum begin(const Job& job, int64_t group, int64_t token) {
        const int32_t* excess = job.x_excess + (group * job.tokens + token) * 16;
        return {_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(excess)),
                _mm512_setzero_si512()};
    }
    PRUNUS_TARGET PRUNUS_INLINE static Pair prepare(__m512i weights) {
        return {weights, _mm512_xor_si512(weights, _mm512_set1_epi8(-128))};
    }
    PRUNUS_TARGET PRUNUS_INLINE static Pair load(const X* x) {
        return {_mm512_loadu_si512(x), _mm512_loadu_si512(x + kSegment)};
    }
    PRUNUS_TARGET PRUNUS_INLINE static void add(Sum& a, Sum&, const Pair& w, const Pair& x) {
        a.low = _mm512_dpbusd_epi32(a.low, x.low, w.low);
        a.high = _mm512_dpbusd_epi32(a.high, w.high, x.high);
    }
    PRUNUS_TARGET PRUNUS_INLINE static __m512 total(const Sum& sum) {
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low));
    }
};

// ---- The loop. ----

// One segment of R rows times T tokens.
template <typename Math, bool inner, int kChains, int R, int T, typename Source, typename Sum>
PRUNUS_TARGET PRUNUS_INLINE void multiply(Source (&source)[R], Sum (&sum)[R * T][kChains],
                                          const typename Math::X* x, int64_t segment) {
    decltype(Math::prepare(source[0].template next<inner>(0))) weights[R];
    PRUNUS_UNROLL for (int r = 0; r < R; ++r) weights[r] =
        Math::prepare(source[r].template next<inner>(segment));
    PRUNUS_UNROLL for (int t = 0; t < T; ++t) {
        const auto activations = Math::load(x + t * Math::kWidth);
        PRUNUS_UNROLL for (int r = 0; r < R; ++r)
            Math::add(sum[r * T + t][0], sum[r * T + t][kChains - 1], weights[r], activations);
    }
}

// R rows times T tokens.
template <typename Math, typename Source, int R, int T>
PRUNUS_TARGET PRUNUS_INLINE void tile(const Job& job, int64_t row, int64_t token) {
    constexpr int N = R * T;
    constexpr int kChains = N > 8 ? 1 : Math::kChains;
    Source source[R];
    typename Math::Sum sum[N][kChains];
    __m512 scaled[N];
    PRUNUS_UNROLL for (int r = 0; r < R; ++r) source[r].start(job, row + r);
    PRUNUS_UNROLL for (int i = 0; i < N; ++i) {
        sum[i][0] = Math::begin(job, 0, token + i % T);
        if (kChains == 2) sum[i][kChains - 1] = sum[i][0];
        scaled[i] = _mm512_setzero_ps();
    }
    const auto* x = static_cast<const typename Math::X*>(job.x) + token * Math::kWidth;
    const int64_t stride = job.tokens * Math::kWidth;
    int64_t segment = 0, group = 0;
    const auto close_group = [&](bool more) PRUNUS_TARGET {
        const float* x_scales = job.x_scales + group * job.tokens + token;
        PRUNUS_UNROLL for (int i = 0; i < N; ++i) {
            scaled[i] =
                _mm512_fmadd_ps(Math::total(sum[i][0]), _mm512_set1_ps(x_scales[i % T]), scaled[i]);
            if (more) sum[i][0] = Math::begin(job, group + 1, token + i % T);
        }
        ++group;
    };
    // Whole groups that do not reach the end of the row take a loop without branches. Most of the
    // time is spent there.
    for (const int64_t whole = (job.segments - 1) / kGroup * kGroup; segment < whole;
         segment += kGroup) {
        PRUNUS_UNROLL for (int step = 0; step < kGroup; ++step, x += stride)
            multiply<Math, true, kChains, R, T>(source, sum, x, segment + step);
        if (Math::kGrouped) close_group(true);
    }
    for (; segment < job.segments; ++segment, x += stride)
        multiply<Math, false, kChains, R, T>(source, sum, x, segment);
    if (Math::kGrouped) close_group(false);
    PRUNUS_UNROLL for (int i = 0; i < N; ++i) {
        __m512 total = Math::kGrouped ? scaled[i] : Math::total(sum[i][0]);
        if (kChains == 2) total = _mm512_add_ps(total, Math::total(sum[i][kChains - 1]));
        job.sums[(token + i % T) * job.rows + row + i / T] = _mm512_reduce_add_ps(total);
    }
}

template <typename Math, typename Source, int T>
PRUNUS_TARGET void rows(const Job& job, int64_t begin, int64_t end, int64_t token) {
    constexpr int R = T >= Math::kPairFrom ? 2 : 1;
    int64_t row = begin;
    for (; row + R <= end; row += R) tile<Math, Source, R, T>(job, row, token);
    for (; row < end; ++row) tile<Math, Source, 1, T>(job, row, token);
}

PRUNUS_TARGET inline void expand_row(const uint8_t* row_mask, const uint16_t* values, int64_t cols,
                                     uint16_t* out) {
    for (int64_t segment = 0; segment * kSegment < cols; ++segment) {
        const Pair pair = expand(mask_word(row_mask, segment, cols), values);
        const int64_t left = cols - segment * kSegment;
        uint16_t* to = out + segment * kSegment;
        const uint64_t inside = left >= kSegment ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
        _mm512_mask_storeu_epi16(to, __mmask32(inside), pair.low);
        _mm512_mask_storeu_epi16(to + 32, __mmask32(inside >> 32), pair.high);
    }
}

// Decodes the high bytes of a group. Its upper 32 codes are the upper halves of the bytes. A
// look-up uses six bits of an index. The two bits above a code belong to the other code, so the table is
// stored four times.
PRUNUS_TARGET PRUNUS_INLINE __m512i look_up(const uint8_t* codes, const uint8_t* high_bytes) {
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high_bytes)));
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return _mm512_permutexvar_epi8(_mm512_srlv_epi16(_mm512_broadcast_i64x4(pairs), shifts), table);
}

PRUNUS_TARGET inline void decode_high(const uint8_t* codes, const uint8_t* high_bytes,
                                      int64_t count, uint8_t* out) {
    for (int64_t done = 0; done < count; done += kCodedGroup) {
        prefetch(codes + done / 2, kCodedAhead / 2);
        _mm512_storeu_si512(out + done, look_up(codes + done / 2, high_bytes));
    }
}

PRUNUS_TARGET inline void decode(const uint8_t* low_bytes, const uint8_t* codes,
                                 const uint8_t* high_bytes, int64_t count, uint16_t* out) {
    for (int64_t done = 0; done < count; done += kCodedGroup) {
        const __m512i high = look_up(codes + done / 2, high_bytes);
        for (int half = 0; half < 2; ++half) {
            const __m256i low =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low_bytes + done + 32 * half));
            const __m256i upper =
                half ? _mm512_extracti64x4_epi64(high, 1) : _mm512_castsi512_si256(high);
            _mm512_storeu_si512(out + done + 32 * half,
                                _mm512_or_si512(_mm512_slli_epi16(_mm512_cvtepu8_epi16(upper), 8),
                                                _mm512_cvtepu8_epi16(low)));
        }
    }
}

PRUNUS_TARGET inline void dequantise(const int8_t* values, int64_t count, float scale,
                                     uint16_t* words) {
    dequantise_loop(values, count, scale, words);
}

}  // namespace prunus::avx512
