// How a stored weight is read. FORMAT says which; weights.py lays blocks out as described here.
//
// A row is read by a warp, in tiles. Of each row's tile a lane holds a Piece, loaded 16 bytes at a
// time and decoded as it is used, and of the vector SLOTS groups of four numbers at the places
// where its weights are: slot(f) tells where in shared memory the tile's f-th four have to lie,
// such that neither filling nor reading meets bank conflicts (a PITCH of 33).
//
// An integer q of b bits becomes a float without a conversion, which has a fraction of the
// speed: its bits are put below an exponent of 0, which makes 1 + q / 2^b; scale and offset
// then take the 1 away, exactly where the result is exact. FORMATs of GGUF: ggml-common.h.

#define F32 0
#define F16 1
#define BF16 2
#define Q8_0 3
#define Q4_0 4
#define Q4_1 5
#define Q4_K 6
#define Q6_K 7
#define Q5_0 8
#define Q5_1 9
#define Q2_K 10
#define Q3_K 11
#define Q5_K 12

#define PITCH 33

#if FORMAT == F32
typedef float Stored;
#elif FORMAT == F16 || FORMAT == BF16
typedef u16 Stored;
#else
typedef u8 Stored;
#endif

__device__ __forceinline__ float half_at(const u8* at) { return from_f16(*(const u16*)at); }

// ---- one weight: row n, column k, with the bits of ggml.decode ----------------------------------

// The sixth of the eight pairs of 6-bit scale and minimum in Q4_K and Q5_K: a, b, c are bytes
// s & 3, 4 + (s & 3) and 8 + (s & 3) of the twelve.
__device__ __forceinline__ u32 k_scale(int s, u32 a, u32 c) {
  return s < 4 ? a & 63u : (c & 15u) | a >> 6 << 4;
}
__device__ __forceinline__ u32 k_minimum(int s, u32 b, u32 c) {
  return s < 4 ? b & 63u : c >> 4 | b >> 6 << 4;
}

__device__ __forceinline__ float affine(float scale, float q, float offset) {
  return __fadd_rn(__fmul_rn(scale, q), offset);  // two roundings, as ggml.decode has
}

__device__ __forceinline__ float weight_at(const Stored* w, int N, int K, int n, int k) {
  size_t i = (size_t)n * K + k, all = (size_t)N * K;
#if FORMAT == F32
  return w[i];
#elif FORMAT == F16
  return from_f16(w[i]);
#elif FORMAT == BF16
  return from_bf16(w[i]);
#elif FORMAT == Q8_0
  return half_at(w + all + i / 32 * 2) * (float)(signed char)w[i];
#elif FORMAT == Q4_0 || FORMAT == Q4_1
  u32 q = w[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4) & 15u;
#if FORMAT == Q4_0
  return half_at(w + all / 2 + i / 32 * 2) * (float)((int)q - 8);
#else
  const u8* d = w + all / 2 + i / 32 * 4;
  return affine(half_at(d), (float)q, half_at(d + 2));
#endif
#elif FORMAT == Q4_K
  int s = k % 256 / 32;
  u32 q = w[i / 64 * 32 + i % 32] >> (s % 2 * 4) & 15u;
  const u8* head = w + all / 2 + i / 256 * 16;
  u32 a = head[4 + (s & 3)], b = head[8 + (s & 3)], c = head[12 + (s & 3)];
  float d = half_at(head), least = half_at(head + 2);
  return affine(d * (float)k_scale(s, a, c), (float)q, -least * (float)k_minimum(s, b, c));
#elif FORMAT == Q6_K
  int half = k % 256 / 128, run = k % 128 / 32, l = k % 32;  // see Piece for the order of low
  const u8* low = w + i / 256 * 128 + half * 64 + l / 8 * 16 + run % 2 * 8 + l % 8;
  const u8* high = w + all / 2 + i / 256 * 64 + half * 32 + l;
  const u8* scales = w + all / 4 * 3 + i / 256 * 16;
  u32 q = (*low >> (run / 2 * 4) & 15u) | (*high >> (2 * run) & 3u) << 4;
  float d = half_at(w + all / 4 * 3 + all / 16 + i / 256 * 2);
  return d * (float)(signed char)scales[k % 256 / 16] * (float)((int)q - 32);
#elif FORMAT == Q5_0 || FORMAT == Q5_1
  const u8* block = w + i / 32 * (FORMAT == Q5_0 ? 22 : 24) + (FORMAT == Q5_0 ? 2 : 4);
  u32 q = (block[4 + i % 16] >> (i % 32 / 16 * 4) & 15u) | (block[i % 32 / 8] >> (i % 8) & 1u) << 4;
#if FORMAT == Q5_0
  return half_at(block - 2) * (float)((int)q - 16);
#else
  return affine(half_at(block - 4), (float)q, half_at(block - 2));
#endif
#elif FORMAT == Q2_K
  const u8* block = w + i / 256 * 84;
  u32 q = block[16 + k % 256 / 128 * 32 + k % 32] >> (k % 128 / 32 * 2) & 3u;
  u32 scale = block[k % 256 / 16] & 15u, minimum = block[k % 256 / 16] >> 4;
  return affine(half_at(block + 80) * (float)scale, (float)q,
                -half_at(block + 82) * (float)minimum);
#elif FORMAT == Q3_K
  const u8* block = w + i / 256 * 110;
  int s = k % 256 / 16;
  u32 q = (block[32 + k % 256 / 128 * 32 + k % 32] >> (k % 128 / 32 * 2) & 3u) |
          (block[k % 32] >> (k % 256 / 32) & 1u) << 2;
  u32 low = block[96 + s % 8] >> (s / 8 * 4) & 15u, high = block[104 + s % 4] >> (s / 4 * 2) & 3u;
  u32 scale = low | high << 4;
  return half_at(block + 108) * (float)((int)scale - 32) * (float)((int)q - 4);
#elif FORMAT == Q5_K
  const u8* block = w + i / 256 * 176;
  int s = k % 256 / 32;
  u32 low = block[48 + s / 2 * 32 + k % 32] >> (s % 2 * 4) & 15u,
      high = block[16 + k % 32] >> s & 1u;
  u32 q = low | high << 4;
  u32 a = block[4 + (s & 3)], b = block[8 + (s & 3)], c = block[12 + (s & 3)];
  float d = half_at(block), least = half_at(block + 2);
  return affine(d * (float)k_scale(s, a, c), (float)q, -least * (float)k_minimum(s, b, c));
#endif
}
