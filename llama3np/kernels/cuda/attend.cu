// Attention of one new token a row over a preallocated cache, keys and values cut into stretches.
//
// Defined: HEAD head size, GROUP query heads to a key/value head, HEADS of them to a block, CACHED
// how keys and values are stored, VEC numbers to a load, LANES that share a position, CHUNKS loads
// of each lane for it (VEC * LANES * CHUNKS >= HEAD), PAIRING 0 interleaved or 1 half.
//
// The cache is k_BKSH, v_BKSH, with `slots` positions; what lies beyond a row's position is never
// read.

// Positions of a block: fixed, so that bits do not depend on the room in a cache.
#define STRETCH 256
#define THREADS 128
#define GROUPS (THREADS / LANES)
#define UNROLL 4

#if CACHED == 0
typedef float Cached;
#else
typedef u16 Cached;
#endif

#if VEC == 1
typedef Cached Loaded;
#define NO_LOAD 0
#else
typedef uint4 Loaded;
#define NO_LOAD make_uint4(0u, 0u, 0u, 0u)
#endif

__device__ __forceinline__ float wide(u32 bits) {
#if CACHED == 0
  return __uint_as_float(bits);
#elif CACHED == 1
  return from_f16(bits);
#else
  return from_bf16(bits);
#endif
}

// Number e of a load.
__device__ __forceinline__ float number(const Loaded& loaded, int e) {
#if VEC == 1 && CACHED == 0
  return loaded;
#elif VEC == 1
  return wide(loaded);
#elif CACHED == 0
  return wide(component(loaded, e));
#else
  return wide(component(loaded, e / 2) >> (e % 2 * 16) & 0xffffu);
#endif
}

__device__ __forceinline__ Cached narrow(float x) {
#if CACHED == 0
  return x;
#elif CACHED == 1
  return to_f16(x);
#else
  return to_bf16(x);
#endif
}

// Turn the pairs of queries, in place, and of keys by the angles of their position; put keys and
// values into the cache. qkv: N + 2 K heads a row. Blocks: (head, row).
extern "C" __global__ void __launch_bounds__(64, 1)
    turn(float* __restrict__ qkv, int pitch, int N, int K, const float* __restrict__ cos_SP,
         const float* __restrict__ sin_SP, const int* __restrict__ positions,
         Cached* __restrict__ keys, Cached* __restrict__ values, int slots) {
  int head = blockIdx.x, m = blockIdx.y, position = positions[m];
  if (position < 0) return;
  float* own = qkv + (size_t)m * pitch + head * HEAD;
  size_t row = (size_t)m * K + (head < N + K ? head - N : head - N - K);
  if (head >= N + K) {
    for (int d = threadIdx.x; d < HEAD; d += blockDim.x)
      values[(row * slots + position) * HEAD + d] = narrow(own[d]);
    return;
  }
  for (int p = threadIdx.x; p < HEAD / 2; p += blockDim.x) {
    int first = PAIRING ? p : 2 * p, second = PAIRING ? p + HEAD / 2 : 2 * p + 1;
    float c = cos_SP[(size_t)position * (HEAD / 2) + p],
          s = sin_SP[(size_t)position * (HEAD / 2) + p];
    float a = own[first], b = own[second];
    float new_a = a * c - b * s, new_b = a * s + b * c;
    if (head < N) {
      own[first] = new_a;
      own[second] = new_b;
    } else {
      Cached* to = keys + (row * slots + position) * HEAD;
      to[first] = narrow(new_a);
      to[second] = narrow(new_b);
    }
  }
}

// Load what this lane has of position i: numbers (c * LANES + lane) * VEC on, for each chunk c.
__device__ __forceinline__ void load_position(Loaded (&own)[CHUNKS], const Cached* rows, int i,
                                              int lane, bool in) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int d = (c * LANES + lane) * VEC;
    own[c] = in && d < HEAD ? *(const Loaded*)(rows + (size_t)i * HEAD + d) : NO_LOAD;
  }
}

// scores[g][i] = q_g . key_i for the count positions of this stretch, q already scaled.
__device__ __forceinline__ void score(float (*scores)[STRETCH],
                                      const float (&q)[HEADS][CHUNKS * VEC], const Cached* keys,
                                      int count) {
  int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  for (int start = 0; start < count; start += GROUPS * UNROLL) {  // all lanes: they shuffle
    Loaded loaded[UNROLL][CHUNKS];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      int i = start + u * GROUPS + group;
      load_position(loaded[u], keys, i, lane, i < count);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      int i = start + u * GROUPS + group;
#pragma unroll
      for (int g = 0; g < HEADS; g++) {
        float sum = 0.f;
#pragma unroll
        for (int e = 0; e < CHUNKS * VEC; e++)
          sum = fmaf(q[g][e], number(loaded[u][e / VEC], e % VEC), sum);
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, o);
        if (lane == 0 && i < count) scores[g][i] = sum;
      }
    }
  }
}

// Powers in place of scores; the largest score and the sum of powers to where the stretches meet.
__device__ __forceinline__ void soften(float (*scores)[STRETCH], int count, int heads, float* peaks,
                                       float* sums, int step) {
  int lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < heads; g += THREADS / 32) {
    float own = MINUS_INFINITY, sum = 0.f;
    for (int i = lane; i < count; i += 32) own = fmaxf(own, scores[g][i]);
    float peak = warp_max(own);
    for (int i = lane; i < count; i += 32) {
      float power = expf(scores[g][i] - peak);
      scores[g][i] = power;
      sum += power;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      peaks[g * step] = peak;
      sums[g * step] = sum;
    }
  }
}

// parts[group][g] = sum of powers[g][i] * value_i over the positions i of this group of lanes.
__device__ __forceinline__ void weigh(float (*parts)[HEADS][HEAD], const float (*powers)[STRETCH],
                                      const Cached* values, int count) {
  int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  float sums[HEADS][CHUNKS * VEC];
#pragma unroll
  for (int g = 0; g < HEADS; g++)
#pragma unroll
    for (int e = 0; e < CHUNKS * VEC; e++) sums[g][e] = 0.f;
  for (int start = group; start < count; start += GROUPS * UNROLL) {
    Loaded loaded[UNROLL][CHUNKS];
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      load_position(loaded[u], values, start + u * GROUPS, lane, start + u * GROUPS < count);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      int i = start + u * GROUPS;
#pragma unroll
      for (int g = 0; g < HEADS; g++) {
        float power = i < count ? powers[g][i] : 0.f;
#pragma unroll
        for (int e = 0; e < CHUNKS * VEC; e++)
          sums[g][e] = fmaf(power, number(loaded[u][e / VEC], e % VEC), sums[g][e]);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < HEADS; g++)
#pragma unroll
    for (int e = 0; e < CHUNKS * VEC; e++) {
      int d = (e / VEC * LANES + lane) * VEC + e % VEC;
      if (d < HEAD) parts[group][g][d] = sums[g][e];
    }
}

// One stretch of one row, for HEADS query heads of one key/value head. out: heads' unnormed means.
// Blocks: (stretch, key/value head and share of its GROUP, row).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend(const float* __restrict__ qkv, int pitch, const Cached* __restrict__ keys,
           const Cached* __restrict__ values, const int* __restrict__ positions, int K, int slots,
           float scale, float* __restrict__ out, float* __restrict__ peaks,
           float* __restrict__ sums) {
  __shared__ float scores[HEADS][STRETCH];
  __shared__ float parts[GROUPS][HEADS][HEAD];
  int m = blockIdx.z, first = blockIdx.x * STRETCH, position = positions[m];
  if (first > position) return;
  int count = min(STRETCH, position + 1 - first), lane = threadIdx.x % LANES;
  int shares = (GROUP + HEADS - 1) / HEADS, kv = blockIdx.y / shares,
      g0 = blockIdx.y % shares * HEADS;
  int n0 = kv * GROUP + g0, heads = min(HEADS, GROUP - g0);
  size_t at = ((size_t)(m * K + kv) * slots + first) * HEAD;
  size_t to = ((size_t)m * K * GROUP + n0) * gridDim.x + blockIdx.x;
  float q[HEADS][CHUNKS * VEC];
#pragma unroll
  for (int g = 0; g < HEADS; g++)
#pragma unroll
    for (int e = 0; e < CHUNKS * VEC; e++) {
      int d = (e / VEC * LANES + lane) * VEC + e % VEC;
      q[g][e] = g < heads && d < HEAD ? qkv[(size_t)m * pitch + (n0 + g) * HEAD + d] * scale : 0.f;
    }
  score(scores, q, keys + at, count);
  __syncthreads();
  soften(scores, count, heads, peaks + to, sums + to, gridDim.x);
  __syncthreads();
  weigh(parts, scores, values + at, count);
  __syncthreads();
  for (int i = threadIdx.x; i < heads * HEAD; i += THREADS) {
    float sum = 0.f;
    for (int group = 0; group < GROUPS; group++) sum += parts[group][i / HEAD][i % HEAD];
    out[(to + (size_t)(i / HEAD) * gridDim.x) * HEAD + i % HEAD] = sum;
  }
}

// Put the stretches of each head together; an idle row gets zeros. Blocks: (query head, row).
extern "C" __global__ void __launch_bounds__(64, 1)
    combine(const float* __restrict__ out, const float* __restrict__ peaks,
            const float* __restrict__ sums, const int* __restrict__ positions, int stretches,
            float* __restrict__ y, int pitch) {
  int n = blockIdx.x, m = blockIdx.y, used = (positions[m] + STRETCH) / STRETCH;
  size_t first = ((size_t)m * gridDim.x + n) * stretches;
  float peak = MINUS_INFINITY, total = 0.f;
  for (int i = 0; i < used; i++) peak = fmaxf(peak, peaks[first + i]);
  for (int i = 0; i < used; i++) total += sums[first + i] * expf(peaks[first + i] - peak);
  for (int d = threadIdx.x; d < HEAD; d += blockDim.x) {
    float sum = 0.f;
    for (int i = 0; i < used; i++)
      sum += out[(first + i) * HEAD + d] * expf(peaks[first + i] - peak);
    y[(size_t)m * pitch + n * HEAD + d] = used ? sum / total : 0.f;
  }
}
