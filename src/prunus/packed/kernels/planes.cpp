// Products with weights in layered bit planes: the C interface and the choice of the instruction
// set.
//
// kernels.h describes the interface. The inner loops are in one header per instruction set.

#include <new>

#include "bitmap.h"
#include "planes.h"
#include "planes_portable.h"
#include "threads.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define PRUNUS_X86 1
#include "planes_avx2.h"
#include "planes_avx512.h"
#elif PRUNUS_ARM
#include "planes_neon.h"
#endif

namespace prunus::planes {
namespace {

thread_local Scratch t_scratch;

// Unpacked rows of this size stay in the first-level cache, if a tile is not larger. For many tokens
// more rows pay, which stay in the second-level cache.
constexpr int64_t kUnpackedBytes = 1 << 14, kUnpackedForMany = 1 << 17;

// ---- What is done with tiles. ----

using TilesFn = void (*)(const Planes&, const Lines&, int64_t begin, int64_t end, uint8_t* memory);

// Calls fn(first row, rows, bytes) for a few rows at a time. Bytes are value + 128.
template <typename Isa, typename Fn>
void for_unpacked_rows(const Planes& job, const Lines& lines, int64_t begin, int64_t end,
                       uint8_t* memory, Fn fn) {
    for (int64_t tile = begin; tile < end; tile += job.tiles_at_once) {
        const int64_t last = tile + job.tiles_at_once < end ? tile + job.tiles_at_once : end;
        for (int64_t i = tile; i < last; ++i)
            unpack_tile<Isa>(job, lines, i, memory + (i - tile) * kTileRows * job.row_bytes);
        const int64_t row = tile * kTileRows, stop = last * kTileRows;
        fn(row, (stop < job.rows ? stop : job.rows) - row, memory);
    }
}

template <typename Isa>
void multiply_tiles(const Planes& job, const Lines& lines, int64_t begin, int64_t end,
                    uint8_t* memory) {
    for_unpacked_rows<Isa>(
        job, lines, begin, end, memory,
        [&](int64_t row, int64_t rows, const uint8_t* bytes) {
            Isa::multiply(job, row, rows, bytes);
        });
}

template <typename Isa>
void expand_tiles(const Planes& job, const Lines& lines, int64_t begin, int64_t end,
                  uint8_t* memory) {
    for_unpacked_rows<Isa>(
        job, lines, begin, end, memory,
        [&](int64_t row, int64_t rows, const uint8_t* bytes) {
            for (int64_t i = 0; i < rows; ++i, bytes += job.row_bytes)
                Isa::expand_row(job, bytes, row + i, row + i);
        });
}

// One token: values are multiplied in the registers that they are extracted to.
template <typename Isa>
void multiply_token(const Planes& job, const Lines& lines, int64_t begin, int64_t end,
                    uint8_t* memory) {
    float* sums = reinterpret_cast<float*>(memory);
    int32_t* lanes = reinterpret_cast<int32_t*>(sums + kTileRows * kLanes);
    for (int64_t i = 0; i < job.blocks * kTileRows; ++i)
        std::memcpy(lanes + i * kLanes, job.excess + i / kTileRows * kLanes,
                    kLanes * sizeof(int32_t));
    const uint8_t* from = lines.tiles + begin * lines.tile_bytes;
    for (int64_t tile = begin; tile < end; ++tile) {
        add_exceptions(lines, tile, job.x_lanes, lanes);
        TileSums state{sums, false, lanes};
        for (int k = 0; k < job.class_count; ++k) {
            const Class& c = job.classes[k];
            if (!c.groups) continue;
            Isa::multiply_tile(job, c, lines.header->widths[k], from, state);
            state.adds = true;
            from += c.groups * lines.header->widths[k] * kLineBytes;
        }
        for (int64_t row = tile * kTileRows, i = 0; i < kTileRows && row < job.rows; ++i, ++row)
            finish(job, row, 0, Isa::reduce(sums + i * kLanes));
    }
}

// ---- Division among threads. ----

struct Loop {
    const Planes* job;
    const Lines* lines;
    TilesFn fn;
    uint8_t* memory;
    int64_t stride, take;
    std::atomic<int64_t> next{0};
    std::atomic<int> begun{0};
};

void take_tiles(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    uint8_t* memory =
        loop.memory + loop.stride * loop.begun.fetch_add(1, std::memory_order_relaxed);
    const int64_t tiles = loop.lines->count;
    for (;;) {
        const int64_t begin = loop.next.fetch_add(loop.take, std::memory_order_relaxed);
        if (begin >= tiles) return;
        const int64_t end = begin + loop.take < tiles ? begin + loop.take : tiles;
        loop.fn(*loop.job, *loop.lines, begin, end, memory);
    }
}

// `memory` is the number of bytes that a thread needs.
void run_tiles(const Planes& job, int threads, TilesFn fn, int64_t memory) {
    // Below this size, waking a thread costs more time than it saves.
    constexpr int64_t bytes_per_thread = 1 << 15;
    const Lines lines(job, job.lines);
    const int64_t tokens = job.tokens ? job.tokens : 16,
                  useful = lines.count * lines.tile_bytes / bytes_per_thread * (tokens / 4 + 1);
    if (threads > useful) threads = int(useful);
    if (threads > lines.count) threads = int(lines.count);
    const GompParallel parallel = g_parallel.load(std::memory_order_relaxed);
    if (!parallel || threads < 1) threads = 1;
    Loop loop;
    loop.job = &job;
    loop.lines = &lines;
    loop.fn = fn;
    loop.stride = (memory + 63) / 64 * 64;
    loop.memory = aligned<uint8_t>(t_scratch.panels, threads * loop.stride);
    // Neighbouring tiles let the prefetches of one serve the next.
    loop.take = threads == 1 ? lines.count : lines.count / (8 * threads) + 1;
    if (threads == 1)
        take_tiles(&loop);
    else
        parallel(take_tiles, &loop, unsigned(threads), 0);
}

int64_t unpacked_bytes(const Planes& job) {
    return job.tiles_at_once * kTileRows * job.row_bytes + kSegment;
}

// ---- The choice of the instruction set. ----

struct Choice {
    TilesFn multiply, multiply_one, expand;
    void (*lay_out)(Planes&, const void*, Kind, Scratch&);
    void (*expand_row)(const Planes&, const uint8_t*, int64_t, int64_t);
    void (*unpack)(const Planes&, const Lines&, int64_t, uint8_t*);
    int64_t (*choose_widths)(const Planes&, Scratch&, uint8_t*);
    void (*write_lines)(const Planes&, Scratch&, uint8_t*);
};

template <typename Isa>
constexpr Choice choice_of(TilesFn multiply_one) {
    return {multiply_tiles<Isa>, multiply_one,     expand_tiles<Isa>,  Isa::lay_out,
            Isa::expand_row,     unpack_tile<Isa>, choose_widths<Isa>, write_lines<Isa>};
}

Choice choose(int isa) {
#if PRUNUS_X86
    static const bool transposes = __builtin_cpu_supports("gfni");
    if (isa >= kAvx512 && transposes) return choice_of<Avx512>(multiply_token<Avx512>);
    if (isa >= kAvx2) return choice_of<Avx2>(multiply_token<Avx2>);
#elif PRUNUS_ARM
    if (isa >= kNeonDot) return choice_of<Neon<true>>(multiply_token<Neon<true>>);
    if (isa >= kNeon) return choice_of<Neon<false>>(multiply_token<Neon<false>>);
#endif
    (void)isa;
    return choice_of<Portable>(nullptr);
}

template <typename Fn>
int guarded(Fn fn) {
    try {
        return fn();
    } catch (const std::bad_alloc&) { return PRUNUS_OUT_OF_MEMORY; }
}

// A job that reads lines.
int describe_job(Planes& job, int isa, const PrunusPlanes* weight, int kind) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (kind < kBf16 || kind > kF32) return PRUNUS_BAD_ARGUMENT;
    const int fault = describe(job, weight);
    if (fault) return fault;
    if (!job.lines || !job.steps || !job.scales) return PRUNUS_BAD_ARGUMENT;
    job.out_kind = Kind(kind);
    return PRUNUS_OK;
}

void choose_tiles_at_once(Planes& job) {
    const int64_t bytes = job.tokens > kFewTokens ? kUnpackedForMany : kUnpackedBytes;
    job.tiles_at_once = bytes / (kTileRows * job.row_bytes);
    if (job.tiles_at_once < 1) job.tiles_at_once = 1;
}

// A job that makes lines.
int describe_planes(Planes& job, int isa, const PrunusPlanes* weight) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    const int fault = describe(job, weight);
    if (fault) return fault;
    return job.offsets ? PRUNUS_OK : PRUNUS_BAD_ARGUMENT;
}

void convert_steps(Planes& job) {
    float* steps = sized<float>(t_scratch.x_float, job.cols);
    for (int64_t column = 0; column < job.cols; ++column)
        steps[column] = bf16_to_float(job.steps[column]);
    job.steps_float = steps;
}

}  // namespace
}  // namespace prunus::planes

using namespace prunus;
using namespace prunus::planes;

extern "C" {

int prunus_plane_offsets(const PrunusPlanes* weight, int64_t* offsets) {
    Planes job;
    const int fault = describe(job, weight);
    if (fault) return fault;
    if (!offsets) return PRUNUS_BAD_ARGUMENT;
    return find_offsets(job, offsets);
}

int prunus_plane_widths(int isa, const PrunusPlanes* weight, uint8_t* widths, int64_t* bytes) {
    return guarded([&] {
        Planes job;
        const int fault = describe_planes(job, isa, weight);
        if (fault) return fault;
        if (!widths || !bytes) return int(PRUNUS_BAD_ARGUMENT);
        LinesHeader header{};
        const int64_t exceptions = choose(isa).choose_widths(job, t_scratch, header.widths);
        if (exceptions < 0) return int(PRUNUS_BAD_LEVEL);
        std::memcpy(widths, header.widths, kMaxClasses);
        *bytes = Lines(job, reinterpret_cast<const uint8_t*>(&header)).bytes(exceptions);
        return int(PRUNUS_OK);
    });
}

int prunus_plane_lines(int isa, const PrunusPlanes* weight, const uint8_t* widths,
                       uint8_t* lines) {
    return guarded([&] {
        Planes job;
        const int fault = describe_planes(job, isa, weight);
        if (fault) return fault;
        if (!widths || !lines) return int(PRUNUS_BAD_ARGUMENT);
        LinesHeader header{};
        std::memcpy(header.widths, widths, kMaxClasses);
        std::memcpy(lines, &header, sizeof header);
        choose(isa).write_lines(job, t_scratch, lines);
        return int(PRUNUS_OK);
    });
}

int prunus_plane_linear(int isa, int threads, const PrunusPlanes* weight, int64_t tokens,
                        int act_kind, const void* x, const void* bias, void* out) {
    return guarded([&] {
        Planes job;
        const int fault = describe_job(job, isa, weight, act_kind);
        if (fault) return fault;
        if (tokens < 1 || !x || !out) return int(PRUNUS_BAD_ARGUMENT);
        const Choice choice = choose(isa);
        job.bias = bias;
        const int64_t size = size_of(job.out_kind);
        for (int64_t token = 0; token < tokens; token += kTokensAtOnce) {
            job.tokens = tokens - token < kTokensAtOnce ? tokens - token : kTokensAtOnce;
            job.out = static_cast<uint8_t*>(out) + token * job.rows * size;
            choose_tiles_at_once(job);
            const bool one = job.tokens == 1 && choice.multiply_one;
            const Lines lines(job, job.lines);
            for (int k = 0; k < job.class_count; ++k)
                job.classes[k].zero = one ? 1 << (lines.header->widths[k] - 1) : 128;
            choice.lay_out(job, static_cast<const uint8_t*>(x) + token * job.cols * size,
                           job.out_kind, t_scratch);
            if (one) lay_out_lanes(job, t_scratch);
            const int64_t memory =
                one ? (job.blocks + 1) * kTileRows * kLanes * 4 : unpacked_bytes(job);
            run_tiles(job, threads, one ? choice.multiply_one : choice.multiply, memory);
        }
        return int(PRUNUS_OK);
    });
}

int prunus_plane_expand(int isa, int threads, const PrunusPlanes* weight, int out_kind,
                        void* out) {
    return guarded([&] {
        Planes job;
        const int fault = describe_job(job, isa, weight, out_kind);
        if (fault) return fault;
        if (!out) return int(PRUNUS_BAD_ARGUMENT);
        convert_steps(job);
        choose_tiles_at_once(job);
        job.out = out;
        run_tiles(job, threads, choose(isa).expand, unpacked_bytes(job));
        return int(PRUNUS_OK);
    });
}

int prunus_plane_expand_rows(int isa, const PrunusPlanes* weight, const int64_t* rows,
                             int64_t count, int out_kind, void* out) {
    return guarded([&] {
        Planes job;
        const int fault = describe_job(job, isa, weight, out_kind);
        if (fault) return fault;
        if (!rows || count < 1 || !out) return int(PRUNUS_BAD_ARGUMENT);
        for (int64_t i = 0; i < count; ++i)
            if (rows[i] < 0 || rows[i] >= job.rows) return int(PRUNUS_BAD_ARGUMENT);
        convert_steps(job);
        job.out = out;
        job.tiles_at_once = 1;
        const Choice choice = choose(isa);
        const Lines lines(job, job.lines);
        uint8_t* bytes = aligned<uint8_t>(t_scratch.panels, unpacked_bytes(job));
        for (int64_t i = 0; i < count; ++i) {
            choice.unpack(job, lines, rows[i] / kTileRows, bytes);
            choice.expand_row(job, bytes + rows[i] % kTileRows * job.row_bytes, rows[i], i);
        }
        return int(PRUNUS_OK);
    });
}
}
