#!/bin/sh
# Builds the kernels for 64-bit Arm and runs their C++ tests in tests/runtime/kernels in an emulator:
# on a processor with dot products and on one without. With the argument `exact` it compares exact
# products of quantised weights only, in some seconds.
set -eu
cd "$(dirname "$0")/../../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
kernels=src/prunus/runtime/kernels
if [ $# -gt 0 ]; then
    sources="$kernels/kernels.cpp $kernels/planes.cpp" tests=planes_test processors=max level=-O0
else
    sources=$(ls $kernels/*.cpp) tests="kernels_test planes_test" processors="max cortex-a53" level=-O1
fi
build() { ${ARM_CXX:-aarch64-linux-gnu-g++} -std=c++17 -Wall -Wextra -Werror "$@"; }
for source in $sources; do
    build $level -c "$source" -o "$folder/$(basename "$source" .cpp).o"
done
for test in $tests; do
    build -O1 -static -pthread "tests/runtime/kernels/$test.cpp" "$folder"/*.o -o "$folder/$test"
    for processor in $processors; do
        echo "$processor"
        qemu-aarch64 -cpu "$processor" "$folder/$test" "$@"
    done
done
