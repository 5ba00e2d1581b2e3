// RMS norms and rotary embeddings, which a token needs between its products.
//
// One call replaces half a dozen torch operations of some microseconds each. It is written for one
// token on one thread, for the compiler to vectorise. Arithmetic is in float32 and rounds where the
// modules of transformers round, so results equal theirs except for the order of the sum.
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "job.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define PRUNUS_X86 1
#include <immintrin.h>
#define PRUNUS_TARGET_AVX2 __attribute__((target("avx2,f16c")))
#endif
#define PRUNUS_EVERYWHERE __attribute__((always_inline)) inline

// A fused multiply-add, which some processors always have, would skip a rounding that torch does.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace prunus {
namespace {

// How a norm ends, from the normed value n (float32) and the weight w. With T the dtype: T(w ·
// T(n)), T(w · n), T((1 + w) · n).
enum NormForm : int { kRoundedThenScaled = 0, kScaled = 1, kScaledByOnePlus = 2 };

// How elements are stored, for every machine.
template <Kind kind>
struct Element {
    using Stored = std::conditional_t<kind == kF32, float, uint16_t>;
    static float load(Stored value) {
        if constexpr (kind == kF32)
            return value;
        else
            return kind == kBf16 ? bf16_to_float(value) : f16_to_float(value);
    }
    static Stored store(float value) {
        if constexpr (kind == kF32)
            return value;
        else
            return kind == kBf16 ? float_to_bf16(value) : float_to_f16(value);
    }
};

template <typename E>
PRUNUS_EVERYWHERE float rounded(float value) {
    return E::load(E::store(value));
}

template <typename E>
PRUNUS_EVERYWHERE void norm_rows(int form, int64_t rows, int64_t width, const void* from,
                                 const void* by, float eps, void* to) {
    constexpr int64_t kLanes = 8;
    using Stored = typename E::Stored;
    const Stored* __restrict x = static_cast<const Stored*>(from);
    const Stored* __restrict weight = static_cast<const Stored*>(by);
    Stored* __restrict out = static_cast<Stored*>(to);
    const int64_t whole = width - width % kLanes;
    for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
        // Sums are in float64, so that their order hardly shows. A square is a float32, as in
        // torch.
        double lanes[kLanes] = {};
        for (int64_t i = 0; i < whole; i += kLanes)
            for (int64_t lane = 0; lane < kLanes; ++lane)
                lanes[lane] += E::load(x[i + lane]) * E::load(x[i + lane]);
        for (int64_t i = whole; i < width; ++i) lanes[i - whole] += E::load(x[i]) * E::load(x[i]);
        double sum = 0;
        for (double lane : lanes) sum += lane;
        const float inverse = 1.0f / std::sqrt(float(sum) / float(width) + eps);
        if (form == kRoundedThenScaled)
            for (int64_t i = 0; i < width; ++i)
                out[i] = E::store(rounded<E>(E::load(x[i]) * inverse) * E::load(weight[i]));
        else if (form == kScaled)
            for (int64_t i = 0; i < width; ++i)
                out[i] = E::store(E::load(x[i]) * inverse * E::load(weight[i]));
        else
            for (int64_t i = 0; i < width; ++i)
                out[i] = E::store(E::load(x[i]) * inverse * (1.0f + E::load(weight[i])));
    }
}

// Per head, out = x · cos + (-second half, first half) · sin, with every product and the sum
// rounded to the dtype.
template <typename E>
PRUNUS_EVERYWHERE void rotate_heads(int64_t heads, int64_t dim, const void* from,
                                    const void* cosines, const void* sines, void* to) {
    using Stored = typename E::Stored;
    const Stored* __restrict x = static_cast<const Stored*>(from);
    const Stored* __restrict cos = static_cast<const Stored*>(cosines);
    const Stored* __restrict sin = static_cast<const Stored*>(sines);
    Stored* __restrict out = static_cast<Stored*>(to);
    const int64_t half = dim / 2;
    for (int64_t head = 0; head < heads; ++head, x += dim, out += dim) {
        for (int64_t i = 0; i < half; ++i)
            out[i] = E::store(rounded<E>(E::load(x[i]) * E::load(cos[i])) +
                              rounded<E>(-E::load(x[half + i]) * E::load(sin[i])));
        for (int64_t i = half; i < dim; ++i)
            out[i] = E::store(rounded<E>(E::load(x[i]) * E::load(cos[i])) +
                              rounded<E>(E::load(x[i - half]) * E::load(sin[i])));
    }
}

// Two copies of these loops: one for every machine, one for AVX2.
template <typename E>
void norm_anywhere(int form, int64_t rows, int64_t width, const void* x, const void* weight,
                   float eps, void* out) {
    norm_rows<E>(form, rows, width, x, weight, eps, out);
}

template <typename E>
void rotate_anywhere(int64_t heads, int64_t dim, const void* x, const void* cos, const void* sin,
                     void* out) {
    rotate_heads<E>(heads, dim, x, cos, sin, out);
}

#if PRUNUS_X86
// float16 with the processor's own conversions.
struct HalfElement {
    using Stored = uint16_t;
    PRUNUS_TARGET_AVX2 static float load(Stored value) { return _cvtsh_ss(value); }
    PRUNUS_TARGET_AVX2 static Stored store(float value) {
        return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    }
};

template <typename E>
PRUNUS_TARGET_AVX2 void norm_avx2(int form, int64_t rows, int64_t width, const void* x,
                                  const void* weight, float eps, void* out) {
    norm_rows<E>(form, rows, width, x, weight, eps, out);
}

template <typename E>
PRUNUS_TARGET_AVX2 void rotate_avx2(int64_t heads, int64_t dim, const void* x, const void* cos,
                                    const void* sin, void* out) {
    rotate_heads<E>(heads, dim, x, cos, sin, out);
}

#define PRUNUS_COPIES(name)                                                      \
    constexpr decltype(&name##_anywhere<Element<kBf16>>) name##_copies[2][3] = { \
        {name##_anywhere<Element<kBf16>>, name##_anywhere<Element<kF16>>,        \
         name##_anywhere<Element<kF32>>},                                        \
        {name##_avx2<Element<kBf16>>, name##_avx2<HalfElement>, name##_avx2<Element<kF32>>}};
int copy_for(int isa) { return isa >= kAvx2; }
#else
#define PRUNUS_COPIES(name)                                                      \
    constexpr decltype(&name##_anywhere<Element<kBf16>>) name##_copies[1][3] = { \
        {name##_anywhere<Element<kBf16>>, name##_anywhere<Element<kF16>>,        \
         name##_anywhere<Element<kF32>>}};
int copy_for(int) { return 0; }
#endif
// Selected by the instruction set and by kind.
PRUNUS_COPIES(norm)
PRUNUS_COPIES(rotate)
#undef PRUNUS_COPIES

}  // namespace
}  // namespace prunus

using namespace prunus;

extern "C" {

int prunus_rms_norm(int isa, int kind, int form, int64_t rows, int64_t width, const void* x,
                    const void* weight, float eps, void* out) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (kind < kBf16 || kind > kF32 || form < kRoundedThenScaled || form > kScaledByOnePlus)
        return PRUNUS_BAD_ARGUMENT;
    if (rows < 1 || width < 1 || !x || !weight || !out) return PRUNUS_BAD_ARGUMENT;
    norm_copies[copy_for(isa)][kind](form, rows, width, x, weight, eps, out);
    return PRUNUS_OK;
}

int prunus_rotate(int isa, int kind, int64_t heads, int64_t key_heads, int64_t dim,
                  const void* query, const void* key, const void* cos, const void* sin,
                  void* out_query, void* out_key) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (kind < kBf16 || kind > kF32 || heads < 1 || key_heads < 1 || dim < 2 || dim % 2)
        return PRUNUS_BAD_ARGUMENT;
    if (!query || !key || !cos || !sin || !out_query || !out_key) return PRUNUS_BAD_ARGUMENT;
    const auto fn = rotate_copies[copy_for(isa)][kind];
    fn(heads, dim, query, cos, sin, out_query);
    fn(key_heads, dim, key, cos, sin, out_key);
    return PRUNUS_OK;
}
}
