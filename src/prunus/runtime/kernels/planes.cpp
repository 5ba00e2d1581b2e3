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
#include "planes_amx.h"
#include "planes_avx2.h"
#elif PRUNUS_ARM
#include "planes_neon.h"
#endif

namespace prunus::planes {
namespace {

// The most products that share a call.
constexpr int64_t kMaxProducts = 3;

thread_local Scratch t_scratch;
thread_local Scratch t_inputs[kMaxProducts];  // activations as each product reads them

// Unpacked rows of this size stay in the first-level cache, if a tile is not larger. For many tokens
// more rows pay, which stay in the second-level cache.
constexpr int64_t kUnpackedBytes = 1 << 14, kUnpackedForMany = 1 << 17;

// ---- What is done with tiles. ----

using TilesFn = void (*)(const Planes&, const Lines&, int64_t begin, int64_t end, uint8_t* memory);
// What a thread does with its memory before its first tile.
using BeginFn = void (*)(const Planes&, uint8_t* memory);

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

// The memory of a thread for one token.
float* sums_in(uint8_t* memory) { return reinterpret_cast<float*>(memory); }
int32_t* lanes_in(uint8_t* memory) {
    return reinterpret_cast<int32_t*>(sums_in(memory) + kTileRows * kLanes);
}

// How many lines are prefetched while exceptions are added.
constexpr int64_t kLinesAhead = 24;

void begin_token(const Planes& job, uint8_t* memory) {
    int32_t* lanes = lanes_in(memory);
    for (int64_t i = 0; i < job.blocks * kTileRows; ++i)
        std::memcpy(lanes + i * kLanes, job.excess + i / kTileRows * kLanes,
                    kLanes * sizeof(int32_t));
}

// One token: values are multiplied in the registers that they are extracted to.
template <typename Isa>
void multiply_token(const Planes& job, const Lines& lines, int64_t begin, int64_t end,
                    uint8_t* memory) {
    float* sums = sums_in(memory);
    int32_t* lanes = lanes_in(memory);
    const uint8_t* from = lines.tiles + begin * lines.tile_bytes;
    for (int64_t tile = begin; tile < end; ++tile) {
        // Memory is read on while the exceptions are added; the products read on from there.
        for (int64_t line = 0; line < kLinesAhead; ++line)
            __builtin_prefetch(from + kAhead + line * kLineBytes);
        add_exceptions(job, lines, tile, lanes);
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

// The tiles that a thread has left: the first in the low half, past the last in the high half. The
// thread takes from the front, and others that have nothing left take from the back.
struct alignas(64) Share {
    std::atomic<uint64_t> left;

    void set(int64_t begin, int64_t end) {
        left.store(uint64_t(end) << 32 | uint64_t(begin), std::memory_order_relaxed);
    }
    // Takes up to `most` tiles and returns how many.
    int64_t take(int64_t most, bool from_front, int64_t& begin) {
        uint64_t before = left.load(std::memory_order_relaxed);
        for (;;) {
            const int64_t first = int64_t(before & 0xffffffff), end = int64_t(before >> 32),
                          count = end - first < most ? end - first : most;
            if (count < 1) return 0;
            begin = from_front ? first : end - count;
            const uint64_t after = from_front ? uint64_t(end) << 32 | uint64_t(first + count)
                                              : uint64_t(end - count) << 32 | uint64_t(first);
            if (left.compare_exchange_weak(before, after, std::memory_order_relaxed)) return count;
        }
    }
};

struct Task {
    const Planes* job;
    Lines lines;
    TilesFn fn;
    BeginFn begin;  // or null
    int64_t memory;  // bytes that a thread needs
};

struct Loop {
    const Task* tasks;
    int64_t count;
    Share* shares;  // (count, threads)
    int threads;
    uint8_t* memory;
    int64_t stride;
    std::atomic<int> begun{0};
};

// Every thread has a run of neighbouring tiles of each task, so that its prefetches are not lost.
void take_tiles(void* data) {
    // Few enough that threads end together, and enough for the price of taking them.
    constexpr int64_t kBytesAtOnce = 1 << 13;
    Loop& loop = *static_cast<Loop*>(data);
    const int self = loop.begun.fetch_add(1, std::memory_order_relaxed);
    uint8_t* memory = loop.memory + loop.stride * self;
    const Task* begun = nullptr;
    for (int turn = 0; turn < loop.threads; ++turn) {
        const int owner = (self + turn) % loop.threads;
        for (const Task* task = loop.tasks; task < loop.tasks + loop.count; ++task) {
            Share& share = loop.shares[(task - loop.tasks) * loop.threads + owner];
            const int64_t at_once = task->job->tiles_at_once,
                          most = kBytesAtOnce / task->lines.tile_bytes / at_once * at_once + at_once;
            int64_t first = 0;
            while (const int64_t count = share.take(most, turn == 0, first)) {
                if (begun != task && task->begin) task->begin(*task->job, memory);
                begun = task;
                task->fn(*task->job, task->lines, first, first + count, memory);
            }
        }
    }
}

void run_tasks(const Task* tasks, int64_t count, int threads) {
    // Below this size, waking a thread costs more time than it saves.
    constexpr int64_t bytes_per_thread = 1 << 15;
    Loop loop{tasks, count, nullptr, 1, nullptr, 0};
    int64_t useful = 0;
    for (const Task* task = tasks; task < tasks + count; ++task) {
        const int64_t tokens = task->job->tokens ? task->job->tokens : 16;
        useful += task->lines.count * task->lines.tile_bytes / bytes_per_thread * (tokens / 4 + 1);
        if (task->memory > loop.stride) loop.stride = (task->memory + 63) / 64 * 64;
    }
    const GompParallel parallel = g_parallel.load(std::memory_order_relaxed);
    if (threads > useful) threads = int(useful);
    if (!parallel || threads < 1) threads = 1;
    loop.threads = threads;
    loop.memory = aligned<uint8_t>(t_scratch.panels, threads * loop.stride);
    loop.shares = aligned<Share>(t_scratch.decoded, count * threads);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t tiles = tasks[i].lines.count;
        for (int owner = 0; owner < threads; ++owner)
            (new (loop.shares + i * threads + owner) Share)
                ->set(tiles * owner / threads, tiles * (owner + 1) / threads);
    }
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

void choose_tiles_at_once(Planes& job, bool one) {
    const int64_t bytes = job.tokens > kFewTokens ? kUnpackedForMany : kUnpackedBytes;
    job.tiles_at_once = one ? 1 : bytes / (kTileRows * job.row_bytes);
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
    return prunus_plane_linears(isa, threads, 1, &weight, tokens, act_kind, x, &bias, &out);
}

int prunus_plane_linears(int isa, int threads, int64_t count, const PrunusPlanes* const* weights,
                         int64_t tokens, int act_kind, const void* x, const void* const* biases,
                         void* const* outs) {
    return guarded([&] {
        if (count < 1 || count > kMaxProducts || !weights || !biases || !outs || tokens < 1 || !x)
            return int(PRUNUS_BAD_ARGUMENT);
        Planes jobs[kMaxProducts];
        [[maybe_unused]] Job matrices[kMaxProducts];
        for (int64_t i = 0; i < count; ++i) {
            const int fault = describe_job(jobs[i], isa, weights[i], act_kind);
            if (fault) return fault;
            if (!outs[i] || jobs[i].cols != jobs[0].cols) return int(PRUNUS_BAD_ARGUMENT);
            jobs[i].bias = biases[i];
        }
        const Choice choice = choose(isa);
        const int64_t size = size_of(Kind(act_kind));
        for (int64_t token = 0; token < tokens; token += kTokensAtOnce) {
            Task tasks[kMaxProducts];
            for (int64_t i = 0; i < count; ++i) {
                Planes& job = jobs[i];
                job.tokens = tokens - token < kTokensAtOnce ? tokens - token : kTokensAtOnce;
                job.out = static_cast<uint8_t*>(outs[i]) + token * job.rows * size;
                const bool one = job.tokens == 1 && choice.multiply_one;
                choose_tiles_at_once(job, one);
                const Lines lines(job, job.lines);
                const auto* from = static_cast<const uint8_t*>(x) + token * job.cols * size;
#if PRUNUS_X86
                if (isa >= kAmx && job.tokens > kFewTokens && act_kind == kBf16) {
                    const int64_t memory =
                        describe_matrix(job, matrices[i], threads, t_inputs[i]);
                    for_parts(threads, panels::blocks_of(matrices[i]), [&](int64_t block) {
                        lay_out_matrix(job, reinterpret_cast<const uint16_t*>(from), block,
                                       t_scratch);
                    });
                    tasks[i] = {&job, lines, multiply_many, nullptr, memory};
                    continue;
                }
#endif
                for (int k = 0; k < job.class_count; ++k)
                    job.classes[k].zero = one ? 1 << (lines.header->widths[k] - 1) : 128;
                choice.lay_out(job, from, job.out_kind, t_inputs[i]);
                if (one) lay_out_lanes(job, t_inputs[i]);
                const int64_t memory =
                    one ? (job.blocks + 1) * kTileRows * kLanes * 4 : unpacked_bytes(job);
                tasks[i] = {&job, lines, one ? choice.multiply_one : choice.multiply,
                            one ? begin_token : nullptr, memory};
            }
            run_tasks(tasks, count, threads);
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
        choose_tiles_at_once(job, false);
        job.out = out;
        const Task task{&job, Lines(job, job.lines), choose(isa).expand, nullptr,
                        unpacked_bytes(job)};
        run_tasks(&task, 1, threads);
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
