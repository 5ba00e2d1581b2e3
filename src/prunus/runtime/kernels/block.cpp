// A block of a transformer for a few tokens that each continue a sequence, in one call.
//
// kernels.h describes the interface. Products are those of prunus_linear() and
// prunus_plane_linear(); what lies between them is in elements.h.

#include <new>
#include <utility>

#include "activations.h"
#include "bitmap.h"
#include "threads.h"

// A fused multiply-add, which some processors always have, would skip a rounding that torch does.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "elements.h"

namespace prunus::block {
namespace {

thread_local Scratch t_scratch;

// The loops of elements.h for one dtype.
struct Loops {
    void (*norm)(int form, int64_t rows, int64_t width, const void* x, const void* weight,
                 float eps, void* out);
    void (*rotate)(int64_t dim, const void* x, const void* cos, const void* sin, void* out);
    void (*attend)(const Attention&, float* memory);
    void (*gate)(int activation, int64_t count, void* gates, const void* ups);
    void (*add)(int64_t count, const void* x, void* out);
};

// A copy of all loops for one instruction set.
#define PRUNUS_LOOPS(Copy, target)                                                                \
    template <typename E>                                                                         \
    struct Copy {                                                                                 \
        target static void norm(int form, int64_t rows, int64_t width, const void* x,             \
                                const void* weight, float eps, void* out) {                       \
            norm_rows<E>(form, rows, width, x, weight, eps, out);                                 \
        }                                                                                         \
        target static void rotate(int64_t dim, const void* x, const void* cos, const void* sin,   \
                                  void* out) {                                                    \
            using Stored = StoredOf<E>;                                                           \
            rotate_head<E>(dim, static_cast<const Stored*>(x), static_cast<const Stored*>(cos),   \
                           static_cast<const Stored*>(sin), static_cast<Stored*>(out));           \
        }                                                                                         \
        target static void attention(const Attention& a, float* memory) { attend<E>(a, memory); } \
        target static void gate(int activation, int64_t count, void* gates, const void* ups) {    \
            gate_rows<E>(activation, count, gates, ups);                                          \
        }                                                                                         \
        target static void add(int64_t count, const void* x, void* out) {                         \
            add_rows<E>(count, x, out);                                                           \
        }                                                                                         \
        static constexpr Loops loops{norm, rotate, attention, gate, add};                         \
    };
PRUNUS_LOOPS(Anywhere, )
#if PRUNUS_X86
PRUNUS_LOOPS(Avx2, __attribute__((target("avx2,f16c"))))
PRUNUS_LOOPS(Avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c"))))
#endif
#undef PRUNUS_LOOPS

template <template <typename> class Copy>
const Loops& loops_of(Kind kind) {
    return kind == kBf16  ? Copy<Element<kBf16>>::loops
           : kind == kF16 ? Copy<Element<kF16>>::loops
                          : Copy<Element<kF32>>::loops;
}

const Loops& choose(int isa, Kind kind) {
#if PRUNUS_X86
    if (isa >= kAvx512) return loops_of<Avx512>(kind);
    if (isa >= kAvx2) return loops_of<Avx2>(kind);
#endif
    (void)isa;
    return loops_of<Anywhere>(kind);
}

// One call: the block, its tokens and where they are stored.
struct Call {
    const PrunusBlock& block;
    const PrunusTokens& tokens;
    const Loops& loops;
    Kind kind;
    int isa, threads;

    int64_t size() const { return size_of(kind); }

    // Computes the products of `count` matrices with the same x.
    int multiply(const PrunusMatrix* matrices, int64_t count, const void* x,
                 void* const* outs) const {
        const PrunusPlanes* planes[3];
        const void* biases[3];
        bool together = true;
        for (int64_t i = 0; i < count; ++i) {
            planes[i] = matrices[i].planes;
            biases[i] = matrices[i].bias;
            together = together && planes[i];
        }
        if (together)
            return prunus_plane_linears(isa, threads, count, planes, tokens.count, kind, x, biases,
                                        outs);
        int fault = PRUNUS_OK;
        for (int64_t i = 0; i < count && !fault; ++i)
            fault = planes[i] ? prunus_plane_linear(isa, threads, planes[i], tokens.count, kind, x,
                                                    biases[i], outs[i])
                              : prunus_linear(isa, threads, matrices[i].weight, tokens.count, kind,
                                              x, biases[i], outs[i]);
        return fault;
    }

    void norm(const void* weight, int64_t rows, int64_t width, const void* x, void* out) const {
        loops.norm(block.norm_form, rows, width, x, weight, block.eps, out);
    }
};

struct HeadLoop {
    const Call* call;
    const uint8_t* query;
    uint8_t* out;
    float* memory;
    int64_t stride;
    std::atomic<int64_t> next{0};
    std::atomic<int> begun{0};
};

// The attention of one token and the heads that share a head of keys.
Attention attention_of(const HeadLoop& loop, int64_t index) {
    const PrunusBlock& block = loop.call->block;
    const PrunusTokens& tokens = loop.call->tokens;
    const int64_t token = index / block.key_heads, head = index % block.key_heads,
                  queries = block.heads / block.key_heads, size = loop.call->size(),
                  place = (token * block.heads + head * queries) * block.dim * size,
                  cached = (token * block.key_heads + head) * tokens.head_stride * size;
    return {queries,
            block.dim,
            tokens.length,
            loop.query + place,
            static_cast<const uint8_t*>(tokens.keys) + cached,
            static_cast<const uint8_t*>(tokens.values) + cached,
            tokens.mask ? tokens.mask + token * tokens.length : nullptr,
            block.scaling,
            loop.out + place};
}

void take_heads(void* data) {
    HeadLoop& loop = *static_cast<HeadLoop*>(data);
    float* memory =
        loop.memory + loop.stride * loop.begun.fetch_add(1, std::memory_order_relaxed);
    const int64_t count = loop.call->tokens.count * loop.call->block.key_heads;
    for (;;) {
        const int64_t index = loop.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= count) return;
        loop.call->loops.attend(attention_of(loop, index), memory);
    }
}

void attend(const Call& call, const uint8_t* query, uint8_t* out) {
    // Below this length, waking a thread costs more time than it saves.
    constexpr int64_t kShort = 64;
    const int64_t count = call.tokens.count * call.block.key_heads;
    const GompParallel parallel = g_parallel.load(std::memory_order_relaxed);
    int64_t threads = parallel && call.tokens.length >= kShort ? call.threads : 1;
    if (threads > count) threads = count;
    if (threads < 1) threads = 1;
    HeadLoop loop;
    loop.call = &call;
    loop.query = query;
    loop.out = out;
    loop.stride = attention_floats(attention_of(loop, 0));
    loop.memory = aligned<float>(t_scratch.panels, threads * loop.stride);
    if (threads == 1)
        take_heads(&loop);
    else
        parallel(take_heads, &loop, unsigned(threads), 0);
}

// Rotates queries to `rotated` and keys to their place in the cache, where values are copied too.
void place_heads(const Call& call, const uint8_t* query, const uint8_t* key, const uint8_t* value,
                 uint8_t* rotated) {
    const PrunusBlock& block = call.block;
    const PrunusTokens& tokens = call.tokens;
    const int64_t bytes = block.dim * call.size();
    for (int64_t token = 0; token < tokens.count; ++token) {
        const int64_t angle = token * tokens.angle_stride * call.size();
        const uint8_t *cos = static_cast<const uint8_t*>(tokens.cos) + angle,
                      *sin = static_cast<const uint8_t*>(tokens.sin) + angle;
        for (int64_t head = 0; head < block.heads; ++head, query += bytes, rotated += bytes)
            call.loops.rotate(block.dim, query, cos, sin, rotated);
        for (int64_t head = 0; head < block.key_heads; ++head, key += bytes, value += bytes) {
            const int64_t place = ((token * block.key_heads + head) * tokens.head_stride +
                                   (tokens.length - 1) * block.dim) *
                                  call.size();
            call.loops.rotate(block.dim, key, cos, sin, static_cast<uint8_t*>(tokens.keys) + place);
            std::memcpy(static_cast<uint8_t*>(tokens.values) + place, value, size_t(bytes));
        }
    }
}

int run_block(const Call& call, const void* x, void* out) {
    const PrunusBlock& block = call.block;
    const int64_t count = call.tokens.count, size = call.size(), all = count * block.hidden,
                  heads = count * block.heads * block.dim,
                  key_heads = count * block.key_heads * block.dim, inner = count * block.inner;
    uint8_t* hidden = sized<uint8_t>(t_scratch.x, all * size);
    uint8_t* normed = sized<uint8_t>(t_scratch.x_float, all * size);
    uint8_t* wide = sized<uint8_t>(
        t_scratch.x_tiles, size * (2 * heads + 2 * key_heads > 2 * inner ? 2 * heads + 2 * key_heads
                                                                        : 2 * inner));
    uint8_t *query = wide, *rotated = query + heads * size, *key = rotated + heads * size,
            *value = key + key_heads * size, *gate = wide, *up = gate + inner * size;
    const PrunusMatrix of_heads[3] = {block.query, block.key, block.value},
                       of_inner[2] = {block.gate, block.up};
    void *const to_heads[3] = {query, key, value}, *const to_inner[2] = {gate, up},
               *const to_hidden[1] = {hidden};
    int fault = PRUNUS_OK;
    // A norm of a result, where the family has one there. `spare` is overwritten.
    const auto norm_result = [&](const void* weight, uint8_t* result, uint8_t* spare) {
        if (!weight) return result;
        call.norm(weight, count, block.hidden, result, spare);
        return spare;
    };
    call.norm(block.norm_attention, count, block.hidden, x, normed);
    if ((fault = call.multiply(of_heads, 3, normed, to_heads))) return fault;
    if (block.norm_query) {
        // Through `rotated`, because a norm may not write over its input.
        call.norm(block.norm_query, count * block.heads, block.dim, query, rotated);
        std::swap(query, rotated);
        call.norm(block.norm_key, count * block.key_heads, block.dim, key, rotated);
        std::memcpy(key, rotated, size_t(key_heads * size));
    }
    place_heads(call, query, key, value, rotated);
    attend(call, rotated, query);
    if ((fault = call.multiply(&block.output, 1, query, to_hidden))) return fault;
    std::memcpy(out, x, size_t(all * size));
    call.loops.add(all, norm_result(block.norm_attended, hidden, normed), out);
    call.norm(block.norm_feed, count, block.hidden, out, normed);
    if ((fault = call.multiply(of_inner, 2, normed, to_inner))) return fault;
    call.loops.gate(block.activation, inner, gate, up);
    if ((fault = call.multiply(&block.down, 1, gate, to_hidden))) return fault;
    call.loops.add(all, norm_result(block.norm_fed, hidden, normed), out);
    return PRUNUS_OK;
}

}  // namespace
}  // namespace prunus::block

using namespace prunus;
using namespace prunus::block;

extern "C" {

int prunus_block(int isa, int threads, int kind, const PrunusBlock* block,
                 const PrunusTokens* tokens, const void* x, void* out) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (kind < kBf16 || kind > kF32 || !block || !tokens || !x || !out) return PRUNUS_BAD_ARGUMENT;
    const PrunusBlock& b = *block;
    const PrunusTokens& t = *tokens;
    if (b.hidden < 1 || b.inner < 1 || b.key_heads < 1 || b.heads < 1 || b.heads % b.key_heads ||
        b.dim < 2 || b.dim % 2 || b.norm_form < 0 || b.norm_form > 1 || b.activation < 0 ||
        b.activation > 1 || !b.norm_attention || !b.norm_feed || !b.norm_query != !b.norm_key)
        return PRUNUS_BAD_ARGUMENT;
    if (t.count < 1 || t.length < 1 || t.head_stride < t.length * b.dim || t.angle_stride < 0 ||
        !t.cos || !t.sin || !t.keys || !t.values)
        return PRUNUS_BAD_ARGUMENT;
    const int64_t query = b.heads * b.dim, key = b.key_heads * b.dim;
    const auto fits = [](const PrunusMatrix& matrix, int64_t rows, int64_t cols) {
        const PrunusWeight* w = matrix.weight;
        const PrunusPlanes* p = matrix.planes;
        return !w != !p && (w ? w->rows : p->rows) == rows && (w ? w->cols : p->cols) == cols;
    };
    if (!fits(b.query, query, b.hidden) || !fits(b.key, key, b.hidden) ||
        !fits(b.value, key, b.hidden) || !fits(b.output, b.hidden, query) ||
        !fits(b.gate, b.inner, b.hidden) || !fits(b.up, b.inner, b.hidden) ||
        !fits(b.down, b.hidden, b.inner))
        return PRUNUS_BAD_ARGUMENT;
    try {
        return run_block({b, t, choose(isa, Kind(kind)), Kind(kind), isa, threads}, x, out);
    } catch (const std::bad_alloc&) { return PRUNUS_OUT_OF_MEMORY; }
}
}
