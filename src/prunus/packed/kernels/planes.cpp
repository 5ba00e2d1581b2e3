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
#endif

namespace prunus::planes {
namespace {

thread_local Scratch t_scratch;

// Rows of a chunk that are decoded at a time. They stay in the second-level cache.
constexpr int64_t kDecodedBytes = 1 << 17;

// Memory of a thread: two buffers of a layer, and decoded rows or the sums of rows.
int64_t memory_of(const Planes& job, bool fused) {
    const int64_t bytes = fused ? job.rows_per_chunk * 16 * int64_t(sizeof(float))
                                : job.rows_at_once * job.row_bytes + kSegment;
    return (2 * job.buffer_bytes + bytes + 63) / 64 * 64;
}

// ---- What is done with a chunk. ----

using ChunkFn = void (*)(const Planes&, int64_t chunk, uint8_t* memory);

// Calls fn(first row, rows, decoded bytes) for a few rows of a chunk at a time.
template <typename Isa, typename Fn>
void for_decoded_rows(const Planes& job, int64_t chunk, uint8_t* memory, Fn fn) {
    uint8_t* decoded = memory + 2 * job.buffer_bytes;
    const int64_t rows = rows_of_chunk(job, chunk);
    for (int64_t begin = 0; begin < rows; begin += job.rows_at_once) {
        const int64_t end = begin + job.rows_at_once < rows ? begin + job.rows_at_once : rows;
        decode_rows<Isa>(job, chunk, begin, end, memory, decoded);
        fn(chunk * job.rows_per_chunk + begin, end - begin, decoded);
    }
}

template <typename Isa>
void multiply_chunk(const Planes& job, int64_t chunk, uint8_t* memory) {
    for_decoded_rows<Isa>(job, chunk, memory, [&](int64_t row, int64_t rows, const uint8_t* bytes) {
        Isa::multiply(job, row, rows, bytes);
    });
}

template <typename Isa>
void expand_chunk(const Planes& job, int64_t chunk, uint8_t* memory) {
    for_decoded_rows<Isa>(job, chunk, memory, [&](int64_t row, int64_t rows, const uint8_t* bytes) {
        for (int64_t i = 0; i < rows; ++i, bytes += job.row_bytes)
            Isa::expand_row(job, bytes, row + i, row + i);
    });
}

#if PRUNUS_X86
// One token: values are multiplied in the registers that they are decoded into.
void multiply_token(const Planes& job, int64_t chunk, uint8_t* memory) {
    float* sums = reinterpret_cast<float*>(memory + 2 * job.buffer_bytes);
    bool adds = false;
    int64_t rows = 0;
    for (int k = 0; k < job.class_count; ++k) {
        const Part part(job, chunk, k);
        const Class& c = part.c;
        rows = part.rows;
        if (!c.groups) continue;
        const uint8_t* escaped = decode_deeper<Avx512>(job, part, memory);
        const uint8_t* words = job.data + part.offsets[0];
        // The same class of the next chunk has about as many bytes.
        const int64_t bytes = part.end - part.offsets[0],
                      ahead = chunk + 1 < job.chunks ? part.offsets[job.class_count * kOffsets]
                                                     : part.offsets[0];
        const Product product{job.x + c.first_group * kSegment,
                              job.x_scales + c.first_block * kLanes,
                              job.excess + c.first_block * kLanes,
                              sums,
                              adds,
                              job.data + ahead,
                              bytes / (rows * c.blocks) + 1};
        Avx512::product(c, words, rows, escaped, product);
        adds = true;
    }
    Avx512::finish_rows(job, chunk * job.rows_per_chunk, rows, sums);
}
#endif

// ---- Division among threads. ----

struct Loop {
    const Planes* job;
    ChunkFn chunk_fn;
    uint8_t* memory;
    int64_t stride, take;
    std::atomic<int64_t> next{0};
    std::atomic<int> begun{0};
};

void take_chunks(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    uint8_t* memory =
        loop.memory + loop.stride * loop.begun.fetch_add(1, std::memory_order_relaxed);
    const int64_t chunks = loop.job->chunks;
    for (;;) {
        const int64_t begin = loop.next.fetch_add(loop.take, std::memory_order_relaxed);
        if (begin >= chunks) return;
        const int64_t end = begin + loop.take < chunks ? begin + loop.take : chunks;
        for (int64_t chunk = begin; chunk < end; ++chunk)
            loop.chunk_fn(*loop.job, chunk, memory);
    }
}

void run_chunks(const Planes& job, int threads, ChunkFn chunk_fn, int64_t memory) {
    // Below this size, waking a thread costs more time than it saves.
    constexpr int64_t bytes_per_thread = 1 << 15;
    const int64_t tokens = job.tokens ? job.tokens : 16,
                  useful = job.bytes / bytes_per_thread * (tokens / 4 + 1);
    if (threads > useful) threads = int(useful);
    if (threads > job.chunks) threads = int(job.chunks);
    const GompParallel parallel = g_parallel.load(std::memory_order_relaxed);
    if (!parallel || threads < 1) threads = 1;
    Loop loop;
    loop.job = &job;
    loop.chunk_fn = chunk_fn;
    loop.stride = memory;
    loop.memory = aligned<uint8_t>(t_scratch.panels, threads * memory);
    // Neighbouring chunks let the prefetches of one serve the next.
    loop.take = job.chunks / (8 * threads) + 1;
    if (threads == 1)
        take_chunks(&loop);
    else
        parallel(take_chunks, &loop, unsigned(threads), 0);
}

// ---- The choice of the instruction set. ----

struct Choice {
    ChunkFn multiply, multiply_one, expand;
    void (*lay_out)(Planes&, const void*, Kind, Scratch&);
    void (*expand_row)(const Planes&, const uint8_t*, int64_t, int64_t);
    void (*decode)(const Planes&, int64_t, int64_t, int64_t, uint8_t*, uint8_t*);
};

template <typename Isa>
constexpr Choice choice_of() {
    return {multiply_chunk<Isa>, nullptr,         expand_chunk<Isa>,
            Isa::lay_out,        Isa::expand_row, decode_rows<Isa>};
}

Choice choose(int isa) {
#if PRUNUS_X86
    static const bool transposes = __builtin_cpu_supports("gfni");
    if (isa >= kAvx512 && transposes) {
        Choice choice = choice_of<Avx512>();
        choice.multiply_one = multiply_token;
        return choice;
    }
    if (isa >= kAvx2) return choice_of<Avx2>();
#endif
    (void)isa;
    return choice_of<Portable>();
}

template <typename Fn>
int guarded(Fn fn) {
    try {
        return fn();
    } catch (const std::bad_alloc&) { return PRUNUS_OUT_OF_MEMORY; }
}

int describe_job(Planes& job, int isa, const PrunusPlanes* weight, int kind) {
    if (isa < 0 || isa > prunus_best_isa()) return PRUNUS_NO_SUCH_ISA;
    if (kind < kBf16 || kind > kF32) return PRUNUS_BAD_ARGUMENT;
    const int fault = describe(job, weight);
    if (fault) return fault;
    if (!job.offsets || !job.steps || !job.scales) return PRUNUS_BAD_ARGUMENT;
    job.out_kind = Kind(kind);
    job.rows_at_once = kDecodedBytes / job.row_bytes;
    if (job.rows_at_once < 2) job.rows_at_once = 2;
    if (job.rows_at_once > job.rows_per_chunk) job.rows_at_once = job.rows_per_chunk;
    return PRUNUS_OK;
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
            choice.lay_out(job, static_cast<const uint8_t*>(x) + token * job.cols * size,
                           job.out_kind, t_scratch);
            const bool fused = job.tokens == 1 && choice.multiply_one;
            run_chunks(job, threads, fused ? choice.multiply_one : choice.multiply,
                       memory_of(job, fused));
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
        job.out = out;
        run_chunks(job, threads, choose(isa).expand, memory_of(job, false));
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
        job.rows_at_once = 1;
        const Choice choice = choose(isa);
        uint8_t* memory = aligned<uint8_t>(t_scratch.panels, memory_of(job, false));
        uint8_t* decoded = memory + 2 * job.buffer_bytes;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t chunk = rows[i] / job.rows_per_chunk,
                          row = rows[i] % job.rows_per_chunk;
            choice.decode(job, chunk, row, row + 1, memory, decoded);
            choice.expand_row(job, decoded, rows[i], i);
        }
        return int(PRUNUS_OK);
    });
}
}
