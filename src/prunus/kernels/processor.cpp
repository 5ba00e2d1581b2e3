// Which instruction sets this processor has, and the parallel runtime that all kernels share.

#include "kernels.h"
#include "threads.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define PRUNUS_X86 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prunus {

std::atomic<GompParallel> g_parallel{nullptr};

namespace {

#if PRUNUS_X86
// Whether the machine has AMX tiles for bfloat16 and Linux lets this process use them. A process
// has to ask for that.
bool has_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBits = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
    if ((d & kBits) != kBits) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

int detect_isa() {
#if PRUNUS_X86
    __builtin_cpu_init();  // the checks below cover the operating system's support as well
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return kAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
    return has_tiles() ? kAmx : kAvx512Bf16;
#else
    return kPortable;
#endif
}

}  // namespace
}  // namespace prunus

extern "C" {

int prunus_abi(void) { return 13; }

int prunus_best_isa(void) {
    static const int best = prunus::detect_isa();
    return best;
}

void prunus_set_runtime(void* gomp_parallel) {
    prunus::g_parallel = reinterpret_cast<prunus::GompParallel>(gomp_parallel);
}
}
