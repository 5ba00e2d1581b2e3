// What the tests of the kernels share: checks that report and go on, random numbers, and a stand-in
// for an OpenMP runtime.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

namespace {

int g_failures = 0;

#define CHECK(condition, ...)                       \
    do {                                            \
        if (!(condition)) {                         \
            std::printf("FAILED %s: ", #condition); \
            std::printf(__VA_ARGS__);               \
            std::printf("\n");                      \
            if (++g_failures > 10) std::exit(1);    \
        }                                           \
    } while (0)

// Every test begins with a seed of its own.
std::mt19937 g_random;

int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(g_random);
}
float normal() { return std::normal_distribution<float>()(g_random); }

// The threaded path runs on it without OpenMP.
void fork_and_join(void (*fn)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; ++i) team.emplace_back(fn, data);
    fn(data);
    for (auto& thread : team) thread.join();
}

}  // namespace
