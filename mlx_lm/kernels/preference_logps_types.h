// Copyright © 2026 MLX Contributors

// 16-bit numbers for a text that includes none of CUDA's headers.

struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ explicit bfloat16(float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  __device__ operator float() const {
    return __uint_as_float(unsigned(bits) << 16);
  }
};

struct float16 {
  unsigned short bits;
  float16() = default;
  __device__ explicit float16(float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  __device__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
