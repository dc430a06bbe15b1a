// Tiles of rows in shared memory: how they lie, how they are filled from global memory, and how
// warps read them as operands of tensor-core products.
//
// A row is kWidth elements rounded up to 16, in chunks of 16 bytes; what lies beyond the tensor is
// 0. ldmatrix reads the same chunk of 8 consecutive rows at once, so these must lie in 8 different
// groups of banks: where a row is a multiple of 8 chunks, the chunk's number is XORed with the
// row's (the 128-byte swizzle); else rows are an odd number of chunks apart.
#pragma once
#include <cute/arch/copy_sm80.hpp>

#include "cuda/packed.cuh"

namespace ae {

constexpr int kChunkElements = 8;  // of 2 bytes

template <int kRows_, int kWidth_>
struct SharedTile {
  static constexpr int kRows = kRows_, kWidth = kWidth_;
  static constexpr int kChunks = (kWidth + 15) / 16 * 2;  // of a row that hold data
  static constexpr bool kSwizzled = kChunks % 8 == 0;
  static constexpr int kPitch = kSwizzled || kChunks % 2 != 0 ? kChunks : kChunks + 1;
  static constexpr int kBytes = kRows * kPitch * 16;

  // Byte offset of a chunk.
  __device__ static __forceinline__ int at(int row, int chunk) {
    return (row * kPitch + (kSwizzled ? chunk ^ (row & 7) : chunk)) * 16;
  }
};

// The first kWidth_ columns of a tile's rows.
template <class Tile, int kWidth_>
struct TilePart : Tile {
  static constexpr int kWidth = kWidth_;
  static constexpr int kChunks = (kWidth + 15) / 16 * 2;
};

// Rows of a tensor in global memory, from `first` on: `data` is element 0 of that row.
struct GlobalRows {
  const uint16_t* data;
  int64_t row_stride, column_stride;  // elements

  // Whether each row starts at a multiple of 16 bytes and is contiguous.
  __device__ __forceinline__ bool aligned() const {
    return column_stride == 1 && row_stride % kChunkElements == 0 &&
           reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  __device__ __forceinline__ const uint16_t* row(int64_t i) const { return data + i * row_stride; }
};

// Copies one chunk through registers, element by element if need be; `mod` is applied to the
// elements that exist, and the others are 0.
template <class Elem, int kWidth, class Mod>
__device__ __forceinline__ uint4 staged_chunk(const uint16_t* row, int64_t column_stride, int chunk,
                                              bool exists, bool vectors, const Mod& mod) {
  uint16_t x[kChunkElements] = {};
  const int first = chunk * kChunkElements;
  if (exists) {
    if (vectors && first + kChunkElements <= kWidth) {
      *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(row + first);
    } else {
#pragma unroll
      for (int i = 0; i < kChunkElements; ++i) {
        if (first + i < kWidth) x[i] = row[(first + i) * column_stride];
      }
    }
#pragma unroll
    for (int i = 0; i < kChunkElements; ++i) {
      if (first + i < kWidth) x[i] = mod(x[i]);
    }
  }
  uint4 packed;
  packed.x = x[0] | uint32_t(x[1]) << 16;
  packed.y = x[2] | uint32_t(x[3]) << 16;
  packed.z = x[4] | uint32_t(x[5]) << 16;
  packed.w = x[6] | uint32_t(x[7]) << 16;
  return packed;
}

struct NoMod {
  static constexpr bool kIdentity = true;
  __device__ __forceinline__ uint16_t operator()(uint16_t x) const { return x; }
};

// Fills a tile: row i comes from row_of(i), which is asked for i < count only. Asynchronous copies
// where nothing changes the elements and rows are aligned (`vectors`), else through registers. The
// caller commits, waits and synchronises.
template <class Tile, class Elem, int kThreads, class RowOf, class Mod>
__device__ __forceinline__ void fill(char* tile, int count, int64_t column_stride, bool vectors,
                                     const RowOf& row_of, const Mod& mod) {
  constexpr int kTotal = Tile::kRows * Tile::kChunks;
  if (Mod::kIdentity && Tile::kWidth % kChunkElements == 0 && vectors) {
#pragma unroll
    for (int base = 0; base < kTotal; base += kThreads) {
      int row, chunk;
      if constexpr (kThreads % Tile::kChunks == 0) {  // a thread keeps its chunk
        row = int(threadIdx.x) / Tile::kChunks + base / Tile::kChunks;
        chunk = int(threadIdx.x) % Tile::kChunks;
      } else {
        row = (int(threadIdx.x) + base) / Tile::kChunks;
        chunk = (int(threadIdx.x) + base) % Tile::kChunks;
      }
      if (kTotal % kThreads != 0 && row >= Tile::kRows) break;
      const bool exists = row < count && chunk < Tile::kWidth / kChunkElements;
      // A chunk that does not exist is filled with 0 and read from nowhere; its address is that of
      // an existing one all the same.
      const uint16_t* from = row_of(exists ? row : 0) + (exists ? chunk * kChunkElements : 0);
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(
          *reinterpret_cast<const uint4*>(from),
          *reinterpret_cast<uint4*>(tile + Tile::at(row, chunk)), exists);
    }
  } else {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kTotal; i += kThreads) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      const bool exists = row < count;
      *reinterpret_cast<uint4*>(tile + Tile::at(row, chunk)) = staged_chunk<Elem, Tile::kWidth>(
          row_of(exists ? row : 0), column_stride, chunk, exists, vectors, mod);
    }
  }
}

// Where a lane reads matrices of 8 x 8 from a tile: lane l gives the address of row l % 8 of matrix
// l / 8. Rows that are a multiple of 8 further on, and other chunks, are one XOR and an immediate
// away.
template <class Tile>
class MatrixReader {
 public:
  // Lane l starts at (row, chunk); chunk is 0 or 1.
  __device__ __forceinline__ MatrixReader(const char* tile, int row, int chunk)
      : address_(static_cast<uint32_t>(__cvta_generic_to_shared(tile)) + Tile::at(row, chunk)) {}

  // Four matrices, `rows` (a multiple of 8) and `chunks` (even) further on.
  __device__ __forceinline__ void load(int rows, int chunks, uint32_t (&r)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at(rows, chunks)));
  }
  __device__ __forceinline__ void load_transposed(int rows, int chunks, uint32_t (&r)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at(rows, chunks)));
  }

 private:
  uint32_t address_;

  __device__ __forceinline__ uint32_t at(int rows, int chunks) const {
    // A swizzled row is a multiple of 128 bytes and tiles start at one: the chunk's number modulo 8
    // is bits 4 to 6 of the address.
    if constexpr (Tile::kSwizzled) {
      return (address_ ^ uint32_t(chunks % 8 * 16)) +
             uint32_t((rows * Tile::kPitch + chunks / 8 * 8) * 16);
    } else {
      return address_ + uint32_t((rows * Tile::kPitch + chunks) * 16);
    }
  }
};

// The A operand of 16 rows of a tile: read(16 m, 2 step) has columns 16 step to 16 step + 15.
template <class Tile>
__device__ __forceinline__ MatrixReader<Tile> read_a(const char* tile, int row, int lane) {
  return {tile, row + lane % 16, lane / 16};
}

// The B operands of 16 columns, which are rows of the tile: load(16 n, 2 step) gives columns 16 n
// to 16 n + 7 in r[0], r[1] and the next 8 in r[2], r[3].
template <class Tile>
__device__ __forceinline__ MatrixReader<Tile> read_b(const char* tile, int lane) {
  return {tile, lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

// The same where the tile's rows are what is summed over: load_transposed(16 step, 2 n).
template <class Tile>
__device__ __forceinline__ MatrixReader<Tile> read_b_transposed(const char* tile, int lane) {
  return {tile, lane % 16, lane / 16};
}

}  // namespace ae
