// Runs the rows of a job on the threads that torch already has.
//
// A second pool would compete with torch's spinning workers for the cores. With a pool of our own,
// a matrix-vector product took twice as long, and the torch operation before it four times as long.
#pragma once

#include <atomic>

#include "coded.h"
#include "job.h"

namespace prunus {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline std::atomic<GompParallel> g_parallel{nullptr};

inline void take_rows(void* data) {
    Job job = *static_cast<const Job*>(data);
    const int64_t thread = job.threads->fetch_add(1, std::memory_order_relaxed);
    if (job.decoded) job.decoded += job.decoded_stride * thread;
    if (job.panels) job.panels += job.panels_stride * thread;
    for (;;) {
        const int64_t begin = job.next->fetch_add(job.chunk, std::memory_order_relaxed);
        if (begin >= job.rows) return;
        const int64_t end = begin + job.chunk < job.rows ? begin + job.chunk : job.rows;
        job.rows_fn(job, begin, end);
        if (job.sums) finish_rows(job, begin, end);
    }
}

// Calls fn(part) for every part, on up to `threads` threads, which take the parts one by one.
template <typename Fn>
inline void for_parts(int threads, int64_t parts, const Fn& fn) {
    struct Loop {
        const Fn& fn;
        int64_t parts;
        std::atomic<int64_t> next{0};
    } loop{fn, parts};
    const auto take = [](void* data) {
        Loop& shared = *static_cast<Loop*>(data);
        for (int64_t part;
             (part = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.parts;)
            shared.fn(part);
    };
    const GompParallel parallel = g_parallel.load(std::memory_order_relaxed);
    threads = int(threads < parts ? threads : parts);
    if (!parallel || threads <= 1)
        take(&loop);
    else
        parallel(take, &loop, unsigned(threads), 0);
}

inline void run(Job& job, int threads, int64_t bytes_per_row, Scratch& scratch) {
    // A long chunk lets the hardware prefetch run ahead. With several token blocks a chunk must
    // also stay in the cache.
    const int64_t bytes_per_chunk = job.tokens > kTokenBlock ? 1 << 17 : 1 << 20;
    // Below this size, waking a thread costs more time than it saves.
    constexpr int64_t bytes_per_thread = 1 << 15;
    // Up to four tokens take as long as one.
    const int64_t useful = job.rows * bytes_per_row / bytes_per_thread * (job.tokens / 4 + 1);
    if (threads > useful) threads = int(useful);
    const GompParallel parallel = g_parallel.load(std::memory_order_relaxed);
    if (!parallel || threads < 1) threads = 1;
    // Threads take chunks one by one, so that a delayed thread does not delay the others.
    int64_t chunk = job.rows / (8 * threads) + 1;
    const int64_t most = bytes_per_chunk / (bytes_per_row + 1) + 1;
    job.chunk = chunk < most ? chunk : most;
    if (job.rows_at_once)
        job.chunk = (job.chunk + job.rows_at_once - 1) / job.rows_at_once * job.rows_at_once;
    if (job.coded) split_decoded_memory(job, threads, scratch);
    if (job.panels_stride)
        job.panels = aligned<uint8_t>(scratch.panels, threads * job.panels_stride);
    std::atomic<int64_t> next{0};
    std::atomic<int> begun{0};
    job.next = &next;
    job.threads = &begun;
    if (threads == 1)
        take_rows(&job);
    else
        parallel(take_rows, &job, unsigned(threads), 0);
}

}  // namespace prunus
