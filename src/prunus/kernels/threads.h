// Runs the parts of a loop on the threads that torch already has.
//
// A second pool would compete with torch's spinning workers for the cores. With a pool of our own,
// a matrix-vector product took twice as long, and the torch operation before it four times as long.
#pragma once

#include <atomic>
#include <cstdint>

namespace prunus {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern std::atomic<GompParallel> g_parallel;  // see prunus_set_runtime()

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

}  // namespace prunus
