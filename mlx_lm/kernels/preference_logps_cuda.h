// Copyright © 2026 MLX Contributors

// What CUDA needs to read the bodies: Metal's words, and reads and writes of
// 16 bytes, the widest there are.

#define threadgroup __shared__
#define threadgroup_barrier(flags) __syncthreads()
#define threadgroup_position_in_grid blockIdx
#define thread_position_in_threadgroup threadIdx
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

namespace metal {
__device__ inline float max(float a, float b) { return fmaxf(a, b); }

namespace fast {
// Results below 2^-126 become 0.
__device__ inline float exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}
}  // namespace fast

namespace precise {
__device__ inline float log(float x) { return logf(x); }
}  // namespace precise
}  // namespace metal

__device__ inline float simd_max(float value) {
  for (int i = 16; i > 0; i /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, i));
  }
  return value;
}

__device__ inline float simd_sum(float value) {
  for (int i = 16; i > 0; i /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, i);
  }
  return value;
}

// The 16 bytes (or fewer, in a small block) that one instruction moves.
template <typename T, int BLOCK>
struct alignas(BLOCK * sizeof(T) < 16 ? BLOCK * sizeof(T) : 16) Pack {
  static constexpr int size = BLOCK * sizeof(T) < 16 ? BLOCK : 16 / sizeof(T);
  T values[size];
};

template <typename T>
__device__ inline bool aligned(const T* address, int bytes) {
  return reinterpret_cast<size_t>(address) % bytes == 0;
}

// How far the first block starts before its row, so that packs are aligned.
template <int BLOCK, typename T>
__device__ inline int row_shift(const T* row) {
  return reinterpret_cast<size_t>(row) / sizeof(T) % Pack<T, BLOCK>::size;
}

// A block on its way: loaded when it is made, turned into float when it is
// read.
template <typename T, int BLOCK>
struct Block {
  using P = Pack<T, BLOCK>;
  const T* row;
  const int start;
  const int size;
  const bool packed;
  P packs[BLOCK / P::size];

  __device__ Block(const T* row, int start, int size, bool wanted)
      : row(row),
        start(start),
        size(size),
        packed(wanted && start >= 0 && start + BLOCK <= size &&
               aligned(row + start, sizeof(P))) {
    if (packed) {
#pragma unroll
      for (int i = 0; i < BLOCK / P::size; i++) {
        packs[i] = reinterpret_cast<const P*>(row + start)[i];
      }
    }
  }

  // What lies outside of the row has probability 0.
  __device__ void read(float (&out)[BLOCK]) const {
    if (packed) {
#pragma unroll
      for (int j = 0; j < BLOCK; j++) {
        out[j] = float(packs[j / P::size].values[j % P::size]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < BLOCK; j++) {
        const int v = start + j;
        const bool inside = v >= 0 && v < size;
        out[j] = inside ? float(row[v]) : -__int_as_float(0x7f800000);
      }
    }
  }
};

template <typename T, int BLOCK>
__device__ inline void write_block(T* row, int start, int size,
                                   const float (&in)[BLOCK]) {
  using P = Pack<T, BLOCK>;
  if (start >= 0 && start + BLOCK <= size && aligned(row + start, sizeof(P))) {
#pragma unroll
    for (int i = 0; i < BLOCK / P::size; i++) {
      P pack;
#pragma unroll
      for (int j = 0; j < P::size; j++) {
        pack.values[j] = T(in[i * P::size + j]);
      }
      reinterpret_cast<P*>(row + start)[i] = pack;
    }
  } else {
#pragma unroll
    for (int j = 0; j < BLOCK; j++) {
      const int v = start + j;
      if (v >= 0 && v < size) {
        row[v] = T(in[j]);
      }
    }
  }
}

#define ROW_SHIFT(array, row) row_shift<BLOCK>(array + row)
#define LOAD_BLOCK(array, type, row, start, size, wanted) \
  const Block<type, BLOCK> array##_block(array + row, start, size, wanted);
#define READ_BLOCK(values, array, row, start, size) array##_block.read(values);
#define WRITE_BLOCK(array, row, start, size, values) \
  write_block(array + row, start, size, values);
