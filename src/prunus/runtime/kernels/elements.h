// What a block of a transformer computes between its products, for a few tokens: norms, rotary
// embeddings, the attention of one query per head, and the gate of its feed-forward network.
//
// Arithmetic is in float32 and rounds to the dtype of the model where the modules of transformers
// round. Loops over lanes are written for the compiler to vectorise, once per instruction set.
#pragma once

#include <cmath>
#include <type_traits>

#include "job.h"
#include "kernels.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define PRUNUS_X86 1
#include <immintrin.h>
#endif
#define PRUNUS_EVERYWHERE __attribute__((always_inline)) inline

namespace prunus::block {

constexpr int64_t kLanes = 16;

// How elements are stored.
template <Kind kind>
struct Element {
    using Stored = std::conditional_t<kind == kF32, float, uint16_t>;
    PRUNUS_EVERYWHERE static float load(Stored value) {
        if constexpr (kind == kF32)
            return value;
        else
            return kind == kBf16 ? bf16_to_float(value) : f16_to_float(value);
    }
    PRUNUS_EVERYWHERE static Stored store(float value) {
        if constexpr (kind == kF32)
            return value;
        else
            return kind == kBf16 ? float_to_bf16(value) : float_to_f16(value);
    }
    PRUNUS_EVERYWHERE static float rounded(float value) { return load(store(value)); }
};

template <typename E>
using StoredOf = typename E::Stored;

PRUNUS_EVERYWHERE float sum_of(float* lanes) {
    for (int64_t width = kLanes / 2; width; width /= 2)
        for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// e^x to about two units in the last place; what is too small for float32 becomes about 1e-38.
PRUNUS_EVERYWHERE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;  // a NaN stays a NaN
    x = x > 88.0f ? 88.0f : x;
    // Adding 1.5 · 2^23 rounds to nearest; the integer is then in the low bits.
    const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                       5.0000001201e-1f})
        sum = sum * rest + next;
    sum = sum * (rest * rest) + rest + 1.0f;
    return sum * bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
}

// Norms of rows. `form` is as in PrunusBlock.
template <typename E>
PRUNUS_EVERYWHERE void norm_rows(int form, int64_t rows, int64_t width, const void* from,
                                 const void* by, float eps, void* to) {
    const StoredOf<E>* __restrict x = static_cast<const StoredOf<E>*>(from);
    const StoredOf<E>* __restrict weight = static_cast<const StoredOf<E>*>(by);
    StoredOf<E>* __restrict out = static_cast<StoredOf<E>*>(to);
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
        if (form == 0)
            for (int64_t i = 0; i < width; ++i)
                out[i] = E::store(E::rounded(E::load(x[i]) * inverse) * E::load(weight[i]));
        else
            for (int64_t i = 0; i < width; ++i)
                out[i] = E::store(E::load(x[i]) * inverse * (1.0f + E::load(weight[i])));
    }
}

// out = x · cos + (-second half, first half) · sin of one head, with every product and the sum
// rounded.
template <typename E>
PRUNUS_EVERYWHERE void rotate_head(int64_t dim, const StoredOf<E>* __restrict x,
                                   const StoredOf<E>* __restrict cos,
                                   const StoredOf<E>* __restrict sin,
                                   StoredOf<E>* __restrict out) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i)
        out[i] = E::store(E::rounded(E::load(x[i]) * E::load(cos[i])) +
                          E::rounded(-E::load(x[half + i]) * E::load(sin[i])));
    for (int64_t i = half; i < dim; ++i)
        out[i] = E::store(E::rounded(E::load(x[i]) * E::load(cos[i])) +
                          E::rounded(E::load(x[i - half]) * E::load(sin[i])));
}

// The attention of the queries (queries, dim) that share a head of keys and values (length, dim).
// `mask` (length) is 0 where a position is not seen, or null. `memory` has attention_floats().
struct Attention {
    int64_t queries, dim, length;
    const void *query, *keys, *values;
    const uint8_t* mask;
    float scaling;
    void* out;  // (queries, dim)
};

inline int64_t padded_dim(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }
inline int64_t attention_floats(const Attention& a) {
    return (2 * a.queries + 1) * padded_dim(a.dim) + a.queries * a.length;
}

template <typename E>
PRUNUS_EVERYWHERE void attend(const Attention& a, float* memory) {
    const int64_t dim = a.dim, padded = padded_dim(dim);
    float *query = memory, *one = query + a.queries * padded, *sums = one + padded,
          *scores = sums + a.queries * padded;
    for (int64_t i = 0; i < (2 * a.queries + 1) * padded; ++i) memory[i] = 0.0f;
    const auto* from = static_cast<const StoredOf<E>*>(a.query);
    for (int64_t g = 0; g < a.queries; ++g)
        for (int64_t i = 0; i < dim; ++i) query[g * padded + i] = E::load(from[g * dim + i]);
    const auto* key = static_cast<const StoredOf<E>*>(a.keys);
    for (int64_t at = 0; at < a.length; ++at, key += dim) {
        for (int64_t i = 0; i < dim; ++i) one[i] = E::load(key[i]);
        for (int64_t g = 0; g < a.queries; ++g) {
            const float* q = query + g * padded;
            float lanes[kLanes] = {};
            for (int64_t i = 0; i < padded; i += kLanes)
                for (int64_t lane = 0; lane < kLanes; ++lane)
                    lanes[lane] += q[i + lane] * one[i + lane];
            const bool seen = !a.mask || a.mask[at];
            scores[g * a.length + at] = seen ? sum_of(lanes) * a.scaling : -INFINITY;
        }
    }
    for (int64_t g = 0; g < a.queries; ++g) {
        float *score = scores + g * a.length, most = -INFINITY;
        for (int64_t at = 0; at < a.length; ++at) most = score[at] > most ? score[at] : most;
        if (most == -INFINITY) most = 0.0f;  // nothing is seen, or all is NaN
        for (int64_t at = 0; at < a.length; ++at)
            score[at] = score[at] == -INFINITY ? 0.0f : exponential(score[at] - most);
        double sum = 0;
        for (int64_t at = 0; at < a.length; ++at) sum += score[at];
        const float total = float(sum);
        for (int64_t at = 0; at < a.length; ++at) score[at] /= total;
    }
    const auto* value = static_cast<const StoredOf<E>*>(a.values);
    for (int64_t at = 0; at < a.length; ++at, value += dim) {
        for (int64_t i = 0; i < dim; ++i) one[i] = E::load(value[i]);
        for (int64_t g = 0; g < a.queries; ++g) {
            float* __restrict sum = sums + g * padded;
            const float weight = scores[g * a.length + at];
            if (weight == 0.0f) continue;
            for (int64_t i = 0; i < padded; ++i) sum[i] += weight * one[i];
        }
    }
    auto* out = static_cast<StoredOf<E>*>(a.out);
    for (int64_t g = 0; g < a.queries; ++g)
        for (int64_t i = 0; i < dim; ++i) out[g * dim + i] = E::store(sums[g * padded + i]);
}

// gate = activation(gate) · up: SiLU, or GELU by its formula with tanh.
template <typename E>
PRUNUS_EVERYWHERE void gate_rows(int activation, int64_t count, void* gates, const void* ups) {
    auto* __restrict gate = static_cast<StoredOf<E>*>(gates);
    const auto* __restrict up = static_cast<const StoredOf<E>*>(ups);
    for (int64_t i = 0; i < count; ++i) {
        const float x = E::load(gate[i]);
        // tanh(y) = 1 - 2 / (e^2y + 1), so (1 + tanh(y)) / 2 = 1 / (1 + e^-2y)
        const float inner =
            activation == 0 ? x : 1.595769122f * (x + 0.044715f * x * x * x);
        const float gated = E::rounded(x / (1.0f + exponential(-inner)));
        gate[i] = E::store(gated * E::load(up[i]));
    }
}

// out += x
template <typename E>
PRUNUS_EVERYWHERE void add_rows(int64_t count, const void* x, void* to) {
    const auto* __restrict from = static_cast<const StoredOf<E>*>(x);
    auto* __restrict out = static_cast<StoredOf<E>*>(to);
    for (int64_t i = 0; i < count; ++i) out[i] = E::store(E::load(out[i]) + E::load(from[i]));
}

}  // namespace prunus::block
