// Attention of many queries, block by block: scores of T x S positions are never in memory.
//
// A block has QUERIES rows of one key/value head: row t * G + g is token t, query head g of its
// group. It goes over the keys KEYS at a time, keeps for each row the largest score so far and
// the sum of powers below it, and scales what it has when a larger one comes (Milakov and
// Gimelshein 2018; by blocks: Dao et al. 2022). Keys and values take turns in shared memory.
// Eight threads share two rows, so that every number read from shared memory is used more than
// once.

#define THREADS (QUERIES * 4)  // QUERIES / 2 pairs of rows, 8 threads each
#define HALF (QUERIES / 2)
#define OWN_KEYS (KEYS / 8)
#define OWN ((HEAD + 7) / 8)  // numbers of a head to each of the eight
#define WIDTH (OWN * 8 + 1)   // odd: a column lies in as many banks as it has rows

#if CACHED == 0
typedef float Cached;
#define WIDE(x) (x)
#elif CACHED == 1
typedef u16 Cached;
#define WIDE(x) from_f16(x)
#else
typedef u16 Cached;
#define WIDE(x) from_bf16(x)
#endif

__device__ __forceinline__ float eight_sum(float own) {
#pragma unroll
  for (int o = 4; o; o >>= 1) own += __shfl_xor_sync(ALL_LANES, own, o);
  return own;
}

__device__ __forceinline__ float eight_max(float own) {
#pragma unroll
  for (int o = 4; o; o >>= 1) own = fmaxf(own, __shfl_xor_sync(ALL_LANES, own, o));
  return own;
}

// What the eight threads of two rows know of them: the largest score so far, the sum of powers
// below it, and each thread its own numbers of the sum of values.
struct Rows {
  int row[2];   // in the block
  int sees[2];  // the last position that is visible
  float peak[2], total[2], sums[2][OWN];
};

// Bring KEYS rows of keys or values into shared memory; zeros from `stop` on, which are never read.
__device__ __forceinline__ void bring(float (*rows)[WIDTH], const Cached* from, int start,
                                      int stop) {
  for (int i = threadIdx.x; i < KEYS * (WIDTH - 1); i += THREADS) {
    int s = i / (WIDTH - 1), d = i % (WIDTH - 1);
    rows[s][d] = start + s < stop && d < HEAD ? WIDE(from[(size_t)(start + s) * HEAD + d]) : 0.f;
  }
}

// scores[i][j] = q_i . key (8 j + eighth), and -inf where the key is not to be seen.
__device__ __forceinline__ void score(float (&scores)[2][OWN_KEYS], const Rows& own,
                                      float (*queries)[WIDTH], float (*keys)[WIDTH], int start,
                                      int eighth) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < OWN_KEYS; j++) scores[i][j] = 0.f;
  for (int d = 0; d < HEAD; d++) {
    float q0 = queries[own.row[0]][d], q1 = queries[own.row[1]][d];
#pragma unroll
    for (int j = 0; j < OWN_KEYS; j++) {
      float k = keys[j * 8 + eighth][d];
      scores[0][j] = fmaf(q0, k, scores[0][j]);
      scores[1][j] = fmaf(q1, k, scores[1][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < OWN_KEYS; j++)
      if (start + j * 8 + eighth > own.sees[i]) scores[i][j] = MINUS_INFINITY;
}

// Powers relative to the largest score so far, to shared memory; what was summed before shrinks to
// fit.
__device__ __forceinline__ void soften(Rows& own, const float (&scores)[2][OWN_KEYS],
                                       float (*powers)[KEYS + 1], int eighth) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float largest = MINUS_INFINITY, sum = 0.f;
#pragma unroll
    for (int j = 0; j < OWN_KEYS; j++) largest = fmaxf(largest, scores[i][j]);
    float peak = fmaxf(own.peak[i], eight_max(largest));  // finite: every query sees position 0
    float shrink = expf(own.peak[i] - peak);
#pragma unroll
    for (int j = 0; j < OWN_KEYS; j++) {
      float power = expf(scores[i][j] - peak);
      powers[own.row[i]][j * 8 + eighth] = power;
      sum += power;
    }
    own.total[i] = own.total[i] * shrink + eight_sum(sum);
    own.peak[i] = peak;
#pragma unroll
    for (int e = 0; e < OWN; e++) own.sums[i][e] *= shrink;
  }
}

// Add the values, each by its power.
__device__ __forceinline__ void weigh(Rows& own, float (*powers)[KEYS + 1], float (*values)[WIDTH],
                                      int eighth) {
  for (int s = 0; s < KEYS; s++) {
    float p0 = powers[own.row[0]][s], p1 = powers[own.row[1]][s];
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      float v = values[s][e * 8 + eighth];
      own.sums[0][e] = fmaf(p0, v, own.sums[0][e]);
      own.sums[1][e] = fmaf(p1, v, own.sums[1][e]);
    }
  }
}

// y_BTNH = attention of q_BTNH over keys and values, of which one head has `slots` positions and is
// `step` numbers from the next. positions: that of query t of row b. Blocks: (queries, head, row).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_block(const float* __restrict__ q, const Cached* __restrict__ keys,
                 const Cached* __restrict__ values, const long long* __restrict__ positions, int T,
                 int K, int G, int slots, int step, float scale, float* __restrict__ y) {
  __shared__ float queries[QUERIES][WIDTH], rows[KEYS][WIDTH], powers[QUERIES][KEYS + 1];
  int kv = blockIdx.y, b = blockIdx.z, eighth = threadIdx.x % 8, first = blockIdx.x * QUERIES;
  const long long* own_positions = positions + (size_t)b * T;
  int last_t = min(first + QUERIES - 1, T * G - 1) / G;  // positions of a row rise with t
  int stop = (int)min((long long)slots, own_positions[last_t] + 1);
  size_t cached = (size_t)(b * K + kv) * step;
  for (int i = threadIdx.x; i < QUERIES * (WIDTH - 1); i += THREADS) {
    int r = first + i / (WIDTH - 1), d = i % (WIDTH - 1);
    size_t at = ((size_t)(b * T + r / G) * K + kv) * G + r % G;
    queries[i / (WIDTH - 1)][d] = r < T * G && d < HEAD ? q[at * HEAD + d] * scale : 0.f;
  }
  Rows own;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    own.row[i] = threadIdx.x / 8 + i * HALF;
    int t = min(first + own.row[i], T * G - 1) / G;
    own.sees[i] = (int)min((long long)slots - 1, own_positions[t]);
    own.peak[i] = MINUS_INFINITY, own.total[i] = 0.f;
#pragma unroll
    for (int e = 0; e < OWN; e++) own.sums[i][e] = 0.f;
  }
  for (int start = 0; start < stop; start += KEYS) {
    float scores[2][OWN_KEYS];
    bring(rows, keys + cached, start, stop);
    __syncthreads();
    score(scores, own, queries, rows, start, eighth);
    soften(own, scores, powers, eighth);
    __syncthreads();  // keys are done with, powers are there
    bring(rows, values + cached, start, stop);
    __syncthreads();
    weigh(own, powers, rows, eighth);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int r = first + own.row[i];
    size_t at = ((size_t)(b * T + r / G) * K + kv) * G + r % G;
#pragma unroll
    for (int e = 0; e < OWN; e++)
      if (r < T * G && e * 8 + eighth < HEAD)
        y[at * HEAD + e * 8 + eighth] = own.sums[i][e] / own.total[i];
  }
}
