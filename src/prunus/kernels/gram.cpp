// XᵀX of bfloat16 inputs, added to a float32 matrix: the C interface, and how work is divided.
//
// The matrix is divided into squares, and only those on and above its diagonal are computed. Within
// a square, sums stay in registers over kTokensAtATime tokens and are then added to the matrix.
// That many tokens of a panel stay in the first-level cache, and the square and its left factor in
// the second-level cache. The sums of a few hundred tokens also add up more precisely.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"
#include "threads.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include "gram.h"

namespace prunus::gram {
namespace {

constexpr int64_t kTokensAtATime = 512;
// Both packed factors have at most this many bytes each. glibc keeps memory of this size, while
// larger pieces come from the system at every call and start with page faults.
constexpr int64_t kPackedBytes = 24 << 20;
constexpr int64_t kMostPanels = 16;  // of the side of a square
constexpr int64_t kSquares = 8;      // a narrow matrix has about this many squares on a side

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

Memory allocate(int64_t bytes) {
    Memory memory(static_cast<uint8_t*>(std::aligned_alloc(64, size_t(bytes))));
    if (!memory) throw std::bad_alloc();
    return memory;
}

struct Loop {
    const uint16_t* x;
    int64_t tokens, features, tiles, panels, side;
    bool amx, last;
    uint8_t *left, *right;
    float* sums;
};

void pack_tile(const Loop& loop, int64_t tile) {
    const int64_t token = tile * kTokens, at = tile * kStepBytes;
    pack(loop.x + token * loop.features, std::min(kTokens, loop.tokens - token), loop.features,
         loop.tiles * kStepBytes, loop.amx ? loop.left + at : nullptr, loop.right + at);
}

// Square number `part` on or above the diagonal, row after row.
PRUNUS_TARGET void multiply_square(const Loop& loop, int64_t part) {
    int64_t row = 0, count = ceil_divide(loop.panels, loop.side);
    while (part >= count) part -= count--, ++row;
    const int64_t i_begin = row * loop.side, i_end = std::min(i_begin + loop.side, loop.panels);
    const int64_t j_begin = (row + part) * loop.side;
    const int64_t j_end = std::min(j_begin + loop.side, loop.panels);
    const int64_t stride = loop.tiles * kStepBytes, at_a_time = kTokensAtATime / kTokens;
    const uint8_t* const left = loop.amx ? loop.left : loop.right;
    alignas(64) float sums[kPanel * kPanel];
    for (int64_t tile = 0; tile < loop.tiles; tile += at_a_time) {
        const int64_t tiles = std::min(at_a_time, loop.tiles - tile), at = tile * kStepBytes;
        for (int64_t j = j_begin; j < j_end; ++j) {
            for (int64_t i = i_begin; i < std::min(i_end, j + 1); ++i) {
                (loop.amx ? multiply_tiles : multiply_vectors)(
                    left + i * stride + at, loop.right + j * stride + at, tiles, sums);
                add_block(sums, loop.sums + i * kPanel * loop.features + j * kPanel, loop.features,
                          std::min(kPanel, loop.features - i * kPanel),
                          loop.features - j * kPanel);
            }
        }
    }
    if (!loop.last) return;
    // Copy the square to the other side of the diagonal while it is in the cache. Sums do not
    // depend on which factor is left, so blocks on the diagonal are symmetric already.
    const int64_t features = loop.features, sixteen = kPanel / 2;
    for (int64_t j = j_begin * kPanel; j < std::min(j_end * kPanel, features); j += sixteen) {
        const int64_t end = std::min(i_end * kPanel, j / kPanel * kPanel);
        for (int64_t i = i_begin * kPanel; i < end; i += sixteen)
            copy_transposed(loop.sums + i * features + j, loop.sums + j * features + i, features,
                            features - i, features - j);
    }
}

PRUNUS_AMX_TARGET void multiply_square_with_tiles(const Loop& loop, int64_t part) {
    configure();
    multiply_square(loop, part);
    _tile_release();
}

int add(int isa, int threads, int64_t tokens, int64_t features, const uint16_t* x, float* sums) {
    Loop loop{};
    loop.features = features;
    loop.panels = ceil_divide(features, kPanel);
    loop.side = std::clamp<int64_t>(ceil_divide(loop.panels, kSquares), 1, kMostPanels);
    loop.amx = isa >= kAmx;
    loop.sums = sums;
    const int64_t token_bytes = loop.panels * kPanel * 2;
    const int64_t most =
        std::max<int64_t>(kPackedBytes / token_bytes / kTokensAtATime, 1) * kTokensAtATime;
    const int64_t bytes = ceil_divide(std::min(tokens, most), kTokens) * kTokens * token_bytes;
    const Memory right = allocate(bytes), left = loop.amx ? allocate(bytes) : Memory();
    loop.right = right.get();
    loop.left = left.get();
    const int64_t count = ceil_divide(loop.panels, loop.side);
    for (int64_t token = 0; token < tokens; token += most) {
        loop.x = x + token * features;
        loop.tokens = std::min(most, tokens - token);
        loop.last = token + loop.tokens == tokens;
        loop.tiles = ceil_divide(loop.tokens, kTokens);
        for_parts(threads, loop.tiles, [&](int64_t tile) { pack_tile(loop, tile); });
        const auto multiply = loop.amx ? multiply_square_with_tiles : multiply_square;
        for_parts(threads, count * (count + 1) / 2, [&](int64_t part) { multiply(loop, part); });
    }
    return PRUNUS_OK;
}

}  // namespace
}  // namespace prunus::gram
#endif

extern "C" int prunus_add_gram(int isa, int threads, int64_t tokens, int64_t features,
                               const void* x, float* sums) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (tokens < 0 || features < 1 || (tokens && !x) || !sums) return PRUNUS_BAD_ARGUMENT;
#if defined(__x86_64__) && defined(__GNUC__)
    if (isa < prunus::kAvx512Bf16) return PRUNUS_NO_SUCH_ISA;
    if (tokens == 0) return PRUNUS_OK;
    try {
        return prunus::gram::add(isa, threads, tokens, features, static_cast<const uint16_t*>(x),
                                 sums);
    } catch (const std::bad_alloc&) { return PRUNUS_OUT_OF_MEMORY; }
#else
    (void)threads;
    return PRUNUS_NO_SUCH_ISA;
#endif
}
