// What a lane holds of one row's tile, for each FORMAT: see formats.cu.
//
// load reads nothing at or beyond column K, and leaves zeros there: of weights, or of scales.

__device__ __forceinline__ uint4 load16(const void* at) { return __ldcs((const uint4*)at); }

#define NOTHING make_uint4(0u, 0u, 0u, 0u)

// Four fields of `bits` bits, one in each byte, the lowest `at` bits up: 1 + q / 2^bits each.
template <int bits>
__device__ __forceinline__ float4 fields(u32 word, int at) {
  const u32 mask = ((1u << bits) - 1u) << (23 - bits);
  float found[4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    int up = 23 - bits - (8 * e + at);
    u32 moved = up >= 0 ? word << (up & 31) : word >> (-up & 31);
    found[e] = __uint_as_float((moved & mask) | 0x3f800000u);
  }
  return make_float4(found[0], found[1], found[2], found[3]);
}

// scale * q + offset of fields as above.
template <int bits>
__device__ __forceinline__ float4 scaled(float4 f, float scale, float offset) {
  float s = scale * (float)(1 << bits), o = offset - s;
  return make_float4(fmaf(f.x, s, o), fmaf(f.y, s, o), fmaf(f.z, s, o), fmaf(f.w, s, o));
}

#if SCALAR
// Any format and any K, weight by weight: rows that do not begin at 16 bytes, and rarer formats.
#define SLOTS 4
struct Piece {
  float4 v[4];
};

__device__ __forceinline__ void load(Piece& p, const Stored* w, int N, int K, int n, int tile,
                                     int lane) {
#pragma unroll
  for (int u = 0; u < 4; u++) {
    int k = tile * 512 + u * 128 + lane * 4;
    p.v[u].x = k < K ? weight_at(w, N, K, n, k) : 0.f;
    p.v[u].y = k + 1 < K ? weight_at(w, N, K, n, k + 1) : 0.f;
    p.v[u].z = k + 2 < K ? weight_at(w, N, K, n, k + 2) : 0.f;
    p.v[u].w = k + 3 < K ? weight_at(w, N, K, n, k + 3) : 0.f;
  }
}
__device__ __forceinline__ int slot(int f) { return f / 32 * PITCH + f % 32; }
__device__ __forceinline__ float4 decode(const Piece& p, int j, int lane) { return p.v[j]; }

#elif FORMAT == F32
#define SLOTS 4
struct Piece {
  uint4 v[4];
};

__device__ __forceinline__ void load(Piece& p, const Stored* w, int N, int K, int n, int tile,
                                     int lane) {
#pragma unroll
  for (int u = 0; u < 4; u++) {
    int k = tile * 512 + u * 128 + lane * 4;
    p.v[u] = k < K ? load16(w + (size_t)n * K + k) : NOTHING;
  }
}
__device__ __forceinline__ int slot(int f) { return f / 32 * PITCH + f % 32; }
__device__ __forceinline__ float4 decode(const Piece& p, int j, int lane) {
  uint4 v = p.v[j];
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                     __uint_as_float(v.w));
}

#elif FORMAT == F16 || FORMAT == BF16
#define SLOTS 8
struct Piece {
  uint4 v[4];
};

__device__ __forceinline__ void load(Piece& p, const Stored* w, int N, int K, int n, int tile,
                                     int lane) {
#pragma unroll
  for (int u = 0; u < 4; u++) {
    int k = tile * 1024 + u * 256 + lane * 8;
    p.v[u] = k < K ? load16(w + (size_t)n * K + k) : NOTHING;
  }
}
__device__ __forceinline__ int slot(int f) { return (f / 64 * 2 + f % 2) * PITCH + f / 2 % 32; }
__device__ __forceinline__ float4 decode(const Piece& p, int j, int lane) {
  u32 a = component(p.v[j / 2], j % 2 * 2), b = component(p.v[j / 2], j % 2 * 2 + 1);
#if FORMAT == BF16
  return make_float4(from_bf16(a), __uint_as_float(a & 0xffff0000u), from_bf16(b),
                     __uint_as_float(b & 0xffff0000u));
#else
  return make_float4(from_f16(a & 0xffffu), from_f16(a >> 16), from_f16(b & 0xffffu),
                     from_f16(b >> 16));
#endif
}

#elif FORMAT == Q8_0
// All signed bytes, then all scales.
#define SLOTS 8
struct Piece {
  uint4 v[2];
  u16 d[2];
};

__device__ __forceinline__ void load(Piece& p, const Stored* w, int N, int K, int n, int tile,
                                     int lane) {
  const u16* scales = (const u16*)(w + (size_t)N * K);
#pragma unroll
  for (int u = 0; u < 2; u++) {
    int k = tile * 1024 + u * 512 + lane * 16;
    p.v[u] = k < K ? load16(w + (size_t)n * K + k) : NOTHING;
    p.d[u] = k < K ? scales[((size_t)n * K + k) / 32] : 0;
  }
}
__device__ __forceinline__ int slot(int f) { return (f / 128 * 4 + f % 4) * PITCH + f / 4 % 32; }
__device__ __forceinline__ float4 decode(const Piece& p, int j, int lane) {
  float d = from_f16(p.d[j / 4]);
  return scaled<8>(fields<8>(component(p.v[j / 4], j % 4) ^ 0x80808080u, 0), d, -128.f * d);
}

#elif FORMAT == Q4_0 || FORMAT == Q4_1
// All nibbles, then all scales; of Q4_1 pairs of scale and minimum.
#define SLOTS 8
#if FORMAT == Q4_0
typedef u16 Scale;
#else
typedef u32 Scale;
#endif
struct Piece {
  uint4 v;
  Scale d;
};

__device__ __forceinline__ void load(Piece& p, const Stored* w, int N, int K, int n, int tile,
                                     int lane) {
  const Scale* scales = (const Scale*)(w + (size_t)N * K / 2);
  int k = tile * 1024 + lane * 32;
  p.v = k < K ? load16(w + ((size_t)n * K + k) / 2) : NOTHING;
  p.d = k < K ? scales[((size_t)n * K + k) / 32] : 0;
}
__device__ __forceinline__ int slot(int f) { return f % 8 * PITCH + f / 8; }
__device__ __forceinline__ float4 decode(const Piece& p, int j, int lane) {
  float d = from_f16(p.d & 0xffffu);
#if FORMAT == Q4_0
  float offset = -8.f * d;
#else
  float offset = from_f16(p.d >> 16);
#endif
  return scaled<4>(fields<4>(component(p.v, j % 4), j / 4 * 4), d, offset);
}

#elif FORMAT == Q4_K
// All nibbles, then of every block its 16 bytes of scales. Eight lanes share a block: a lane has 16
// weights of one part of 32 in its low nibbles, and 16 of the next in the high ones.
#define SLOTS 8
struct Piece {
  uint4 v, head;
};

__device__ __forceinline__ void load(Piece& p, const Stored* w, int N, int K, int n, int tile,
                                     int lane) {
  const Stored* heads = w + (size_t)N * K / 2;
  int k = tile * 1024 + lane / 8 * 256;
  size_t block = ((size_t)n * K + k) / 256;
  p.v = k < K ? load16(w + block * 128 + lane % 8 * 16) : NOTHING;
  p.head = k < K ? *(const uint4*)(heads + block * 16) : NOTHING;
}
__device__ __forceinline__ int slot(int f) {
  int lane = f / 64 * 8 + f % 64 / 16 * 2 + f % 8 / 4;
  return (f % 16 / 8 * 4 + f % 4) * PITCH + lane;
}
__device__ __forceinline__ float4 decode(const Piece& p, int j, int lane) {
  int s = lane % 8 / 2 * 2 + j / 4, at = s % 4 * 8;
  u32 a = p.head.y >> at & 255u, b = p.head.z >> at & 255u, c = p.head.w >> at & 255u;
  float d = from_f16(p.head.x & 0xffffu), least = from_f16(p.head.x >> 16);
  float scale = d * (float)k_scale(s, a, c), minimum = least * (float)k_minimum(s, b, c);
  return scaled<4>(fields<4>(component(p.v, j % 4), j / 4 * 4), scale, -minimum);
}

#elif FORMAT == Q6_K
// All low nibbles, high pairs, scales, and block scales. Eight lanes share a block: a lane has of
// one half four runs of 8 weights, 32 apart. Their low nibbles, 8 bytes for runs 0 and 2 and 8 for
// runs 1 and 3, are put beside each other for that.
#define SLOTS 8
struct Piece {
  uint4 low;
  uint2 high, scales;
  u16 d;
};

__device__ __forceinline__ void load(Piece& p, const Stored* w, int N, int K, int n, int tile,
                                     int lane) {
  size_t all = (size_t)N * K;
  int k = tile * 1024 + lane / 8 * 256;
  size_t block = ((size_t)n * K + k) / 256;
  const u8 *highs = w + all / 2, *scales = highs + all / 4, *ds = scales + all / 16;
  bool in = k < K;
  p.low = in ? load16(w + block * 128 + lane % 8 * 16) : NOTHING;
  p.high = in ? __ldcs((const uint2*)(highs + block * 64 + lane % 8 * 8)) : make_uint2(0u, 0u);
  p.scales = in ? *(const uint2*)(scales + block * 16 + lane % 8 / 4 * 8) : make_uint2(0u, 0u);
  p.d = in ? *(const u16*)(ds + block * 2) : 0;
}
__device__ __forceinline__ int slot(int f) {
  int lane = f / 64 * 8 + f % 64 / 32 * 4 + f % 8 / 2;
  return (f % 32 / 8 * 2 + f % 2) * PITCH + lane;
}
__device__ __forceinline__ float4 decode(const Piece& p, int j, int lane) {
  int run = j / 2, s = lane % 4 / 2 + 2 * run;  // byte s of the eight scales of this half
  u32 low = component(p.low, run % 2 * 2 + j % 2) >> (run / 2 * 4) & 0x0f0f0f0fu;
  u32 high = (j % 2 ? p.high.y : p.high.x) >> (2 * run) & 0x03030303u;
  int scale = (signed char)((run < 2 ? p.scales.x : p.scales.y) >> (s % 4 * 8));
  float d = from_f16(p.d) * (float)scale;
  return scaled<6>(fields<6>(low | high << 4, 0), d, -32.f * d);
}
#endif
