// Weights of integers in lines: the form in memory that products and expansions read.
//
// Bit planes are made once into lines, when a weight is loaded. Eight rows make a tile. In a tile,
// each group of 64 columns of a class has as many lines of 64 bytes as a value of the class has
// bits, its width w. Byte i of a line belongs to column i. It holds 8 / w whole values, those of the
// next rows, in its low bits; the spare bits of the w lines, in order, hold the values of the
// remaining rows. So a value is extracted by a mask and at most a shift, or from a few such pieces.
//
// A line holds the value + 2^(w - 1). A value that does not fit is stored as the nearest one that
// does, and the difference is an exception of its tile and block of columns, in 16 bits, or several
// exceptions where it is large. A product adds the exceptions of a tile to its sums before it reads
// the tile.
//
// The order in memory: the header, where the exceptions of each tile begin, how many each block of
// each tile has, the tiles one after another, class after class, and the exceptions.
#pragma once

#include "planes.h"

namespace prunus::planes {

constexpr int kMaxWidth = 8;
constexpr int64_t kTileRows = 8, kLineBytes = kSegment;
// How far in front of a product its lines are prefetched, in bytes.
constexpr int64_t kAhead = 1 << 14;
// The largest difference that one exception holds.
constexpr int kMostDifference = 16;

struct LinesHeader {
    uint8_t widths[kMaxClasses];
    uint8_t unused[kLineBytes - kMaxClasses];
};

// ---- The bits of a tile. ----

// The bits `shift` to `shift + bits - 1` of a line are the bits `to` to `to + bits - 1` of a value.
struct Piece {
    int line, shift, bits, to;
};

struct Pieces {
    int count;
    Piece piece[kMaxWidth];
};

// Where the value of a row of a tile lies.
constexpr Pieces pieces_of(int width, int row) {
    const int whole = 8 / width, spare = 8 % width;
    if (row < width * whole) return {1, {{row / whole, row % whole * width, width, 0}}};
    Pieces found{0, {}};
    for (int bit = 0; bit < width; ++bit) {
        const int number = (row - width * whole) * width + bit;
        if (bit && number % spare)
            ++found.piece[found.count - 1].bits;
        else
            found.piece[found.count++] = {number / spare, width * whole + number % spare, 1, bit};
    }
    return found;
}

// What is done for each row of a tile, with the number of the row known to the compiler.
#define PRUNUS_EIGHT_ROWS(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7)

// The instances of a function for all widths.
#define PRUNUS_WIDTHS(name) \
    name<1>, name<2>, name<3>, name<4>, name<5>, name<6>, name<7>, name<8>

// The piece with the highest bits of a value, and where the lowest bit is if that piece stays there.
// The other pieces are the highest bits of their lines, so that they need shifts to the right only.
template <int width, int row>
constexpr Piece highest_piece() {
    return pieces_of(width, row).piece[pieces_of(width, row).count - 1];
}
template <int width, int row>
constexpr int place_of() {
    return highest_piece<width, row>().shift - highest_piece<width, row>().to;
}

struct AllPieces {
    Pieces of[kMaxWidth + 1][kTileRows];
};

constexpr AllPieces make_all_pieces() {
    AllPieces all{};
    for (int width = 1; width <= kMaxWidth; ++width)
        for (int row = 0; row < kTileRows; ++row) all.of[width][row] = pieces_of(width, row);
    return all;
}

inline constexpr AllPieces kPieces = make_all_pieces();

constexpr int mask_of(int bits) { return (1 << bits) - 1; }

// What is added to what a line holds to give the byte value + 128.
constexpr int byte_base(int width) { return 128 - (1 << (width - 1)); }

// ---- The arrays. ----

struct Lines {
    const LinesHeader* header;
    const int64_t* begins;   // (tiles): the first exception of each tile
    const uint16_t* counts;  // (tiles, blocks): exceptions of each block
    const uint8_t* tiles;
    const uint16_t* exceptions;
    int64_t count, tile_bytes;

    Lines() = default;

    static int64_t tiles_of(const Planes& job) { return (job.rows + kTileRows - 1) / kTileRows; }

    Lines(const Planes& job, const uint8_t* at) : tile_bytes(0) {
        header = reinterpret_cast<const LinesHeader*>(at);
        count = tiles_of(job);
        for (int k = 0; k < job.class_count; ++k)
            tile_bytes += job.classes[k].groups * header->widths[k] * kLineBytes;
        begins = reinterpret_cast<const int64_t*>(at + sizeof(LinesHeader));
        counts = reinterpret_cast<const uint16_t*>(begins + count);
        const int64_t bytes = reinterpret_cast<const uint8_t*>(counts + count * job.blocks) - at;
        tiles = at + (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
        exceptions = reinterpret_cast<const uint16_t*>(tiles + count * tile_bytes);
    }

    int64_t bytes(int64_t exception_count) const {
        return reinterpret_cast<const uint8_t*>(exceptions + exception_count) -
               reinterpret_cast<const uint8_t*>(header);
    }
};

// An exception: the row of the tile, the column of the block in the order of lanes, and the
// difference: -16 to -1 and 1 to 16 in five bits.
constexpr uint16_t exception_at(int64_t row, int64_t column, int difference) {
    const int64_t by_lane = column % kSegment / kLaneBytes << 4 | column / kSegment << 2 |
                            column % kLaneBytes;
    return uint16_t(row << 13 | by_lane << 5 | (difference + kMostDifference - (difference > 0)));
}
constexpr int difference_of(uint16_t exception) {
    const int number = exception & 31;
    return number - kMostDifference + (number >= kMostDifference);
}
constexpr int64_t row_of(uint16_t exception) { return exception >> 13; }
// The lane, among those of the eight rows.
constexpr int64_t lane_of(uint16_t exception) { return exception >> 9; }
// The place in a block of activations that are in the order of lanes.
constexpr int64_t place_by_lane(uint16_t exception) { return exception >> 5 & 255; }
// The place in the order of columns.
constexpr int64_t place_by_column(uint16_t exception) {
    return (exception >> 7 & 3) << 6 | (exception >> 9 & 15) << 2 | (exception >> 5 & 3);
}

// How many exceptions a value needs that is `value` above the lowest one of its width.
constexpr int64_t exceptions_of(int value, int width) {
    const int most = mask_of(width), beyond = value < 0 ? -value : value > most ? value - most : 0;
    return (beyond + kMostDifference - 1) / kMostDifference;
}

// ---- Making them. ----

// Calls fn(tile, bytes) for all tiles of a weight in bit planes: value + bias of the class, (rows,
// columns in the order of the classes). Rows past the last one hold anything.
template <typename Isa, typename Fn>
inline void for_tiles(const Planes& job, Scratch& scratch, Fn fn) {
    uint8_t* buffers = aligned<uint8_t>(scratch.panels, 2 * job.buffer_bytes);
    uint8_t* rows = aligned<uint8_t>(scratch.decoded,
                                     (job.rows_per_chunk + kTileRows) * job.row_bytes + kSegment);
    int64_t tile = 0, ready = 0;
    for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
        const int64_t count = rows_of_chunk(job, chunk);
        decode_chunk<Isa>(job, chunk, buffers, rows + ready * job.row_bytes);
        ready += count;
        const int64_t begin = tile;
        const bool last = chunk + 1 == job.chunks;
        const uint8_t* from = rows;
        for (; ready >= kTileRows || (last && ready > 0); ready -= kTileRows) {
            fn(tile++, from);
            from += kTileRows * job.row_bytes;
        }
        if (tile > begin && ready > 0)
            std::memmove(rows, from, size_t(ready * job.row_bytes));
    }
}

// Chooses the width of every class that costs least. Returns the number of exceptions, or -1 if a
// level is too low.
template <typename Isa>
inline int64_t choose_widths(const Planes& job, Scratch& scratch, uint8_t* widths) {
    // Four copies, because neighbouring values are often equal.
    static_assert(kSegment % 4 == 0);
    int64_t counts[kMaxClasses][4][256] = {};
    for_tiles<Isa>(job, scratch, [&](int64_t tile, const uint8_t* bytes) {
        const int64_t left = job.rows - tile * kTileRows,
                      rows = left < kTileRows ? left : kTileRows;
        for (int64_t row = 0; row < rows; ++row, bytes += job.row_bytes)
            for (int k = 0; k < job.class_count; ++k) {
                const Class& c = job.classes[k];
                const uint8_t* from = bytes + c.first_block * kBlock;
                for (int64_t i = 0; i < c.groups * kSegment; i += 4)
                    for (int64_t copy = 0; copy < 4; ++copy) ++counts[k][copy][from[i + copy]];
            }
    });
    int64_t exceptions = 0;
    for (int k = 0; k < job.class_count; ++k) {
        const int64_t groups = job.classes[k].groups * job.rows;
        int64_t best = -1, fewest = 0;
        for (int width = kMaxWidth; width > 0; --width) {
            int64_t needed = 0;
            for (int byte = 0; byte < 256; ++byte) {
                const int level = byte - job.classes[k].bias;
                const int64_t count = counts[k][0][byte] + counts[k][1][byte] +
                                      counts[k][2][byte] + counts[k][3][byte];
                // Kernels hold the byte of a lower level as 0 or not at all.
                if (count && level < -127) return -1;
                needed += count * exceptions_of(level + (1 << (width - 1)), width);
            }
            const int64_t price =
                groups * width * kLineBytes / kTileRows + needed * Isa::kExceptionPrice;
            if (best >= 0 && price >= best) continue;
            best = price;
            fewest = needed;
            widths[k] = uint8_t(width);
        }
        exceptions += fewest;
    }
    return exceptions;
}

// Writes a group of 64 values of one row, biased for the lines, to the lines of its tile.
inline void put_group(const uint8_t* values, int width, int row, uint8_t* lines) {
    const Pieces& pieces = kPieces.of[width][row];
    for (int number = 0; number < pieces.count; ++number) {
        const Piece piece = pieces.piece[number];
        uint8_t* to = lines + piece.line * kLineBytes;
        const uint8_t mask = uint8_t(mask_of(piece.bits));
        for (int64_t i = 0; i < kSegment; ++i)
            to[i] = uint8_t(to[i] | (values[i] >> piece.to & mask) << piece.shift);
    }
}

// Reads what `put_group` wrote, as bytes value + 128.
inline void get_group(const uint8_t* lines, int width, int row, uint8_t* bytes) {
    const Pieces& pieces = kPieces.of[width][row];
    for (int64_t i = 0; i < kSegment; ++i) bytes[i] = uint8_t(byte_base(width));
    for (int number = 0; number < pieces.count; ++number) {
        const Piece piece = pieces.piece[number];
        const uint8_t* from = lines + piece.line * kLineBytes;
        const uint8_t mask = uint8_t(mask_of(piece.bits));
        for (int64_t i = 0; i < kSegment; ++i)
            bytes[i] = uint8_t(bytes[i] + ((from[i] >> piece.shift & mask) << piece.to));
    }
}

// A bit for each value of a group that does not fit.
inline uint64_t find_exceptions(const uint8_t* values, int width) {
    uint8_t flags[kSegment];
    uint64_t found = 0;
    for (int64_t i = 0; i < kSegment; ++i) flags[i] = values[i] > mask_of(width);
    for (int64_t i = 0; i < kSegment; i += 8)
        found |= load_word(flags + i) * 0x0102040810204080 >> 56 << i;
    return found;
}

// Writes all arrays behind the header, which has the widths. Their memory is `out`.
template <typename Isa>
inline void write_lines(const Planes& job, Scratch& scratch, uint8_t* out) {
    const Lines lines(job, out);
    int64_t* begins = const_cast<int64_t*>(lines.begins);
    uint16_t* counts = const_cast<uint16_t*>(lines.counts);
    uint8_t* to = const_cast<uint8_t*>(lines.tiles);
    uint16_t *const first_exception = const_cast<uint16_t*>(lines.exceptions),
             *next = first_exception;
    std::memset(to, 0, size_t(lines.count * lines.tile_bytes));
    for_tiles<Isa>(job, scratch, [&](int64_t tile, const uint8_t* bytes) {
        const int64_t left = job.rows - tile * kTileRows,
                      rows = left < kTileRows ? left : kTileRows;
        begins[tile] = next - first_exception;
        for (int k = 0; k < job.class_count; ++k) {
            const Class& c = job.classes[k];
            const int width = lines.header->widths[k], most = mask_of(width);
            const int first = c.bias - (1 << (width - 1));
            for (int64_t group = 0; group < c.groups; ++group, to += width * kLineBytes) {
                const uint16_t* const before = next;
                for (int64_t row = 0; row < rows; ++row) {
                    const uint8_t* from = bytes + row * job.row_bytes + c.first_block * kBlock +
                                          group * kSegment;
                    uint8_t values[kSegment];
                    for (int64_t i = 0; i < kSegment; ++i) values[i] = uint8_t(from[i] - first);
                    for (uint64_t left_over = find_exceptions(values, width); left_over;
                         left_over &= left_over - 1) {
                        const int64_t i = portable::popcount((left_over & -left_over) - 1),
                                      column = group % kBlockGroups * kSegment + i;
                        const int value = from[i] - first,
                                  nearest = value < 0 ? 0 : value > most ? most : value;
                        values[i] = uint8_t(nearest);
                        for (int rest = value - nearest; rest;) {
                            const int step = rest > kMostDifference    ? kMostDifference
                                             : rest < -kMostDifference ? -kMostDifference
                                                                       : rest;
                            *next++ = exception_at(row, column, step);
                            rest -= step;
                        }
                    }
                    put_group(values, width, int(row), to);
                }
                uint16_t& count =
                    counts[tile * job.blocks + c.first_block + group / kBlockGroups];
                count = uint16_t((group % kBlockGroups ? count : 0) + (next - before));
            }
        }
    });
}

// ---- Reading them. ----

// Calls fn(block, exception) for the exceptions of a tile.
template <typename Fn>
inline void for_exceptions(const Planes& job, const Lines& lines, int64_t tile, Fn fn) {
    const uint16_t *at = lines.exceptions + lines.begins[tile],
                   *counts = lines.counts + tile * job.blocks;
    for (int64_t block = 0; block < job.blocks; ++block)
        for (const uint16_t* const end = at + counts[block]; at < end; ++at) fn(block, *at);
}

// Writes the rows of a tile as bytes value + 128 (rows, columns in the order of the classes).
template <typename Isa>
inline void unpack_tile(const Planes& job, const Lines& lines, int64_t tile, uint8_t* to) {
    const uint8_t* from = lines.tiles + tile * lines.tile_bytes;
    for (int k = 0; k < job.class_count; ++k) {
        const Class& c = job.classes[k];
        const int width = lines.header->widths[k];
        Isa::unpack(width, c.groups, from, to + c.first_block * kBlock, job.row_bytes);
        from += c.groups * width * kLineBytes;
    }
    for_exceptions(job, lines, tile, [&](int64_t block, uint16_t exception) {
        uint8_t& byte = to[row_of(exception) * job.row_bytes + block * kBlock +
                           place_by_column(exception)];
        byte = uint8_t(byte + difference_of(exception));
    });
}

// Adds the exceptions of a tile to the sums of its lanes. `x` is in the order of lanes.
inline void add_exceptions(const Planes& job, const Lines& lines, int64_t tile, int32_t* lanes) {
    for_exceptions(job, lines, tile, [&](int64_t block, uint16_t exception) {
        lanes[block * kTileRows * kLanes + lane_of(exception)] +=
            difference_of(exception) * job.x_lanes[block * kBlock + place_by_lane(exception)];
    });
}

// What a product of one token needs for a tile.
struct TileSums {
    float* sums;     // (8, kLanes)
    bool adds;       // to the sums of another class
    int32_t* lanes;  // (blocks, 8, kLanes): exceptions and excess. It is left with the excess.
};

}  // namespace prunus::planes
