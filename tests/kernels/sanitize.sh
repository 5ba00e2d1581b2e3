#!/bin/sh
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs kernels_test.cpp.
set -eu
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${CXX:-c++} -std=c++17 -O1 -g -Wall -Wextra -Werror -pthread \
    -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all \
    -fno-omit-frame-pointer src/prunus/kernels/*.cpp tests/kernels/kernels_test.cpp \
    -o "$folder/kernels_test"
ASAN_OPTIONS=detect_leaks=1 "$folder/kernels_test"
