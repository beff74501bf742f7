// Numbers and warps: what every kernel stands on. No header is included, so that NVRTC needs none.
//
// Letters as in model.py: N, K rows and columns of a weight in the products, query and key/value
// heads in attention; M rows of the batch, each one token. A pitch is the floats from one row of a
// buffer to the next. CuPy compiles with -ftz=true: float32 below 2^-126 is zero.

#define ALL_LANES 0xffffffffu
#define MINUS_INFINITY __int_as_float(0xff800000)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

// ---- 16-bit floats, by their bits: sm_75 has no bf16 arithmetic, and f16's is in headers --------

__device__ __forceinline__ float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

// Exact for all 65536. Subnormals have their own way because float32's would be flushed to zero.
__device__ __forceinline__ float from_f16(u32 bits) {
  u32 moved = (bits & 0x7fffu) << 13;
  float wide = __uint_as_float(moved + (112u << 23));  // the bias: 127 - 15
  if (moved < (1u << 23)) wide = __uint_as_float(moved + (113u << 23)) - 6.103515625e-05f;  // 2^-14
  if (moved >= (31u << 23)) wide = __uint_as_float(moved + (224u << 23));  // inf, nan
  return bits & 0x8000u ? -wide : wide;
}

// To nearest, ties to even, as NumPy rounds; nan stays nan.
__device__ __forceinline__ u16 to_bf16(float wide) {
  u32 bits = __float_as_uint(wide);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 0x40u);
  return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ u16 to_f16(float wide) {
  u32 bits = __float_as_uint(wide), sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) return (u16)(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (bits < 0x38800000u)  // below 2^-14: 0.5 has units of 2^-24 too, and the adder rounds to them
    return (u16)(sign | (__float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u));
  return (u16)(sign | (bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13);
}

__device__ __forceinline__ float rounded_bf16(float wide) { return from_bf16(to_bf16(wide)); }

__device__ __forceinline__ u32 component(uint4 v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// ---- over the lanes of a warp: every lane gets the result, of the same bits ---------------------

__device__ __forceinline__ float warp_sum(float own) {
#pragma unroll
  for (int o = 16; o; o >>= 1) own += __shfl_xor_sync(ALL_LANES, own, o);
  return own;
}

__device__ __forceinline__ float warp_max(float own) {
#pragma unroll
  for (int o = 16; o; o >>= 1) own = fmaxf(own, __shfl_xor_sync(ALL_LANES, own, o));
  return own;
}
