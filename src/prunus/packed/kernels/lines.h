// Weights of integers in lines: the form in memory that products and expansions read.
//
// Bit planes are made once into lines, when a weight is loaded. Eight rows make a tile. In a tile,
// each group of 64 columns of a class has as many lines of 64 bytes as a value of the class has
// bits, its width w. Byte i of a line belongs to column i. It holds 8 / w whole values, those of the
// next rows, in its low bits; the spare bits of the w lines, in order, hold the values of the
// remaining rows. So a value is extracted by a mask and at most a shift, or from a few such pieces.
//
// A line holds the value + 2^(w - 1). A value that does not fit is stored as the nearest one that
// does, and the difference is an exception of its tile: 32 bits, in the order of the blocks of
// columns. So a product has added the exceptions of a block to its sums long before it reads them.
//
// The order in memory: the header, where the exceptions of each tile begin, the tiles one after
// another, class after class, and the exceptions.
#pragma once

#include "planes.h"

namespace prunus::planes {

constexpr int kMaxWidth = 8;
constexpr int64_t kTileRows = 8, kLineBytes = kSegment;
// The most blocks of columns that an exception can name. Wider weights have no exceptions.
constexpr int64_t kMaxBlocks = 1 << 13;

// What an exception costs in a product, in bytes that are read meanwhile: its own four, and two to
// three processor cycles.
constexpr int64_t kExceptionPrice = 16;

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
    const int64_t* begins;  // (tiles + 1): the first exception of each tile
    const uint8_t* tiles;
    const uint32_t* exceptions;
    int64_t count, tile_bytes;

    static int64_t tiles_of(const Planes& job) { return (job.rows + kTileRows - 1) / kTileRows; }

    Lines(const Planes& job, const uint8_t* at) : tile_bytes(0) {
        header = reinterpret_cast<const LinesHeader*>(at);
        count = tiles_of(job);
        for (int k = 0; k < job.class_count; ++k)
            tile_bytes += job.classes[k].groups * header->widths[k] * kLineBytes;
        begins = reinterpret_cast<const int64_t*>(at + sizeof(LinesHeader));
        const int64_t bytes = (count + 1) * int64_t(sizeof(int64_t));
        tiles = at + sizeof(LinesHeader) + (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
        exceptions = reinterpret_cast<const uint32_t*>(tiles + count * tile_bytes);
    }

    int64_t bytes(int64_t exception_count) const {
        return reinterpret_cast<const uint8_t*>(exceptions + exception_count) -
               reinterpret_cast<const uint8_t*>(header);
    }
};

// An exception: the block of columns, the row of the tile, the column in the order of lanes, and
// the difference. Without its last 12 bits it numbers a lane among those of the eight rows.
constexpr uint32_t exception_at(int64_t block, int64_t row, int64_t column, int difference) {
    const int64_t by_lane = column % kSegment / kLaneBytes << 4 | column / kSegment << 2 |
                            column % kLaneBytes;
    return uint32_t(block << 19 | row << 16 | by_lane << 8) | uint8_t(difference);
}
constexpr int64_t row_of(uint32_t exception) { return exception >> 16 & 7; }
// The place in activations that are in the order of lanes.
constexpr int64_t place_by_lane(uint32_t exception) {
    return exception >> 19 << 8 | (exception >> 8 & 255);
}
// The place in the order of columns.
constexpr int64_t place_by_column(uint32_t exception) {
    return exception >> 19 << 8 | (exception >> 10 & 3) << 6 | (exception >> 12 & 15) << 2 |
           (exception >> 8 & 3);
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

// Counts the values in some groups of a row that do not fit into a width.
inline int64_t count_exceptions(const uint8_t* bytes, int64_t groups, int width, int bias) {
    const uint8_t first = uint8_t(bias - (1 << (width - 1))), most = uint8_t(mask_of(width));
    int64_t count = 0;
    for (int64_t begin = 0; begin < groups; begin += 255) {
        const int64_t end = begin + 255 < groups ? begin + 255 : groups;
        uint8_t lanes[kSegment] = {};
        for (int64_t group = begin; group < end; ++group)
            for (int64_t i = 0; i < kSegment; ++i)
                lanes[i] = uint8_t(lanes[i] +
                                   (uint8_t(bytes[group * kSegment + i] - first) > most));
        for (uint8_t lane : lanes) count += lane;
    }
    return count;
}

// Whether a row holds a level below -127, of which kernels hold the byte 0 or none.
inline bool is_below(const uint8_t* bytes, int64_t groups, int bias) {
    uint8_t lanes[kSegment];
    std::memset(lanes, 255, sizeof lanes);
    for (int64_t at = 0; at < groups * kSegment; at += kSegment)
        for (int64_t i = 0; i < kSegment; ++i)
            lanes[i] = bytes[at + i] < lanes[i] ? bytes[at + i] : lanes[i];
    for (uint8_t lane : lanes)
        if (lane < bias - 127) return true;
    return false;
}

// Chooses the width of every class that costs least. Returns the number of exceptions, or -1 if a
// level is too low.
template <typename Isa>
inline int64_t choose_widths(const Planes& job, Scratch& scratch, uint8_t* widths) {
    int64_t counts[kMaxClasses][kMaxWidth + 1] = {};
    bool below = false;
    for_tiles<Isa>(job, scratch, [&](int64_t tile, const uint8_t* bytes) {
        const int64_t left = job.rows - tile * kTileRows,
                      rows = left < kTileRows ? left : kTileRows;
        for (int64_t row = 0; row < rows; ++row, bytes += job.row_bytes)
            for (int k = 0; k < job.class_count; ++k) {
                const Class& c = job.classes[k];
                const uint8_t* from = bytes + c.first_block * kBlock;
                below = below || is_below(from, c.groups, c.bias);
                for (int width = 1; width < kMaxWidth; ++width)
                    counts[k][width] += count_exceptions(from, c.groups, width, c.bias);
            }
    });
    if (below) return -1;
    int64_t exceptions = 0;
    for (int k = 0; k < job.class_count; ++k) {
        const int64_t groups = job.classes[k].groups * job.rows;
        int best = kMaxWidth;
        const auto price = [&](int width) {
            return groups * width * kLineBytes / kTileRows + counts[k][width] * kExceptionPrice;
        };
        for (int width = kMaxWidth - 1; width > 0 && job.blocks <= kMaxBlocks; --width)
            if (price(width) < price(best)) best = width;
        widths[k] = uint8_t(best);
        exceptions += counts[k][best];
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

// Writes all arrays behind the header, which has the widths. Their memory is `out`.
template <typename Isa>
inline void write_lines(const Planes& job, Scratch& scratch, uint8_t* out) {
    const Lines lines(job, out);
    int64_t* begins = const_cast<int64_t*>(lines.begins);
    uint8_t* to = const_cast<uint8_t*>(lines.tiles);
    uint32_t* exceptions = const_cast<uint32_t*>(lines.exceptions);
    int64_t count = 0;
    std::memset(to, 0, size_t(lines.count * lines.tile_bytes));
    for_tiles<Isa>(job, scratch, [&](int64_t tile, const uint8_t* bytes) {
        const int64_t left = job.rows - tile * kTileRows,
                      rows = left < kTileRows ? left : kTileRows;
        begins[tile] = count;
        for (int k = 0; k < job.class_count; ++k) {
            const Class& c = job.classes[k];
            const int width = lines.header->widths[k], most = mask_of(width);
            const int first = c.bias - (1 << (width - 1));
            for (int64_t group = 0; group < c.groups; ++group, to += width * kLineBytes) {
                const int64_t block = c.first_block + group / kBlockGroups;
                for (int64_t row = 0; row < rows; ++row) {
                    const uint8_t* from = bytes + row * job.row_bytes + c.first_block * kBlock +
                                          group * kSegment;
                    uint8_t values[kSegment];
                    for (int64_t i = 0; i < kSegment; ++i) values[i] = uint8_t(from[i] - first);
                    if (width < kMaxWidth && count_exceptions(from, 1, width, c.bias))
                        for (int64_t i = 0; i < kSegment; ++i) {
                            const int value = from[i] - first,
                                      nearest = value < 0 ? 0 : value > most ? most : value;
                            if (value == nearest) continue;
                            values[i] = uint8_t(nearest);
                            exceptions[count++] = exception_at(
                                block, row, group % kBlockGroups * kSegment + i, value - nearest);
                        }
                    put_group(values, width, int(row), to);
                }
            }
        }
    });
    begins[lines.count] = count;
}

// ---- Reading them. ----

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
    for (int64_t i = lines.begins[tile]; i < lines.begins[tile + 1]; ++i) {
        const uint32_t exception = lines.exceptions[i];
        uint8_t& byte = to[row_of(exception) * job.row_bytes + place_by_column(exception)];
        byte = uint8_t(byte + exception);
    }
}

// Adds the exceptions of a tile to the sums of its lanes. `x` is in the order of lanes.
inline void add_exceptions(const Lines& lines, int64_t tile, const int8_t* x, int32_t* lanes) {
    const uint32_t *at = lines.exceptions + lines.begins[tile],
                   *const end = lines.exceptions + lines.begins[tile + 1];
    for (; at < end; ++at)
        lanes[*at >> 12] += int8_t(*at) * x[place_by_lane(*at)];
}

// What a product of one token needs for a tile.
struct TileSums {
    float* sums;     // (8, kLanes)
    bool adds;       // to the sums of another class
    int32_t* lanes;  // (blocks, 8, kLanes): exceptions and excess. It is left with the excess.
};

}  // namespace prunus::planes
