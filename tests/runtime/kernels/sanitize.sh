#!/bin/sh
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their C++ tests in tests/runtime/kernels.
set -eu
cd "$(dirname "$0")/../../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
kernels=src/prunus/runtime/kernels
for name in kernels block planes gram sweep codewords; do
    set -- "$@" "$folder/$name.o"
    ${CXX:-c++} -std=c++17 -O1 -g -Wall -Wextra -Werror -pthread \
        -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer \
        -c "$kernels/$name.cpp" -o "$folder/$name.o"
done
for test in kernels_test planes_test; do
    ${CXX:-c++} -std=c++17 -O1 -g -Wall -Wextra -Werror -pthread \
        -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer \
        "tests/runtime/kernels/$test.cpp" "$@" -o "$folder/$test"
    ASAN_OPTIONS=detect_leaks=1 "$folder/$test"
done
