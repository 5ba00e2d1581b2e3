// The C interface of the kernels. It takes plain pointers and lengths; it knows no torch, throws no
// exceptions and keeps no global state except the parallel runtime. library.py is its only caller
// in Python.
//
// Common to all functions:
//
//   isa      0 portable; on x86-64 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16, 4 AVX-512 with BF16 and
//            AMX; at most prunus_best_isa()
//   threads  how many threads share the work; the result does not depend on it
//
// Functions return 0 or one of the codes below. They read and write only inside the given arrays.
#pragma once

#include <cstdint>

namespace prunus {
enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
}

extern "C" {

enum {
    PRUNUS_OK = 0,
    PRUNUS_BAD_ARGUMENT = 1,
    PRUNUS_NO_SUCH_ISA = 2,
    PRUNUS_OUT_OF_MEMORY = 3,
};

// The version of this interface. It grows with every incompatible change.
int prunus_abi(void);

// The best instruction set of this machine.
int prunus_best_isa(void);

// Sets the parallel runtime: the address of an OpenMP library's GOMP_parallel, or null. Without a
// runtime every call stays on the calling thread.
void prunus_set_runtime(void* gomp_parallel);

// Adds xᵀx to `sums` (features, features), which is symmetric, for x (tokens, features) in
// bfloat16. Products are exact, and sums are in float32. It needs AVX-512 with BF16.
int prunus_add_gram(int isa, int threads, int64_t tokens, int64_t features, const void* x,
                    float* sums);

// Finds for `words` codewords of `columns` (4 or 8) columns in `rows` rows the row v of `grid`
// (count, columns) of the least Σ importance·v²/2 − Σ target·v, with `targets` (words, columns,
// rows) and `importances` (words, columns). `least` and `index` (words, rows) receive that number,
// and which row. At most 128 left and as many right halves of the rows of the grid may differ.
int prunus_find_codewords(int isa, int threads, int64_t words, int64_t columns, int64_t rows,
                          int64_t count, const float* targets, const float* importances,
                          const float* grid, float* least, int32_t* index);
}
