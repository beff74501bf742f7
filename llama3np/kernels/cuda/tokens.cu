// Tokens on the device: those the host orders, and those chosen from logits: the largest, the
// lowest id that has it, and the sum of powers, of which the host makes its log-probability.

#define THREADS 256

struct Best {
  float peak;
  int id;
};

// The larger; of equal ones, the lower id. Not a number loses, so damage shows as no id at all.
__device__ __forceinline__ Best better(Best a, Best b) {
  return b.peak > a.peak || (b.peak == a.peak && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best own) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    Best other = {__shfl_xor_sync(ALL_LANES, own.peak, o), __shfl_xor_sync(ALL_LANES, own.id, o)};
    own = better(own, other);
  }
  return own;
}

// The first kernel of a step that the host orders: orders are in its memory, tokens, then
// positions. An idle row has position -1. One block, a thread a row.
extern "C" __global__ void __launch_bounds__(32)
    obey(const int* __restrict__ orders, int* __restrict__ tokens, int* __restrict__ positions,
         int* __restrict__ count) {
  int m = threadIdx.x;
  tokens[m] = orders[m];
  positions[m] = orders[blockDim.x + m];
  if (m == 0) *count = 0;
}

// peaks, ids, sums of each part of a row: sum of e^(logit - peak). Blocks: (part, row).
extern "C" __global__ void __launch_bounds__(THREADS)
    pick(const float* __restrict__ logits, int V, float* __restrict__ peaks, int* __restrict__ ids,
         double* __restrict__ sums) {
  __shared__ Best bests[THREADS / 32];
  __shared__ float own_sums[THREADS / 32];
  int m = blockIdx.y, parts = gridDim.x, size = (V + parts - 1) / parts;
  int start = blockIdx.x * size, stop = min(V, start + size), warp = threadIdx.x / 32;
  const float* row = logits + (size_t)m * V;
  Best own = {MINUS_INFINITY, V};
  for (int i = start + threadIdx.x; i < stop; i += THREADS) {
    Best found = {row[i], i};
    own = better(own, found);
  }
  own = warp_best(own);
  if (threadIdx.x % 32 == 0) bests[warp] = own;
  __syncthreads();
  Best best = bests[0];
  for (int i = 1; i < THREADS / 32; i++) best = better(best, bests[i]);
  float sum = 0.f;
  for (int i = start + threadIdx.x; i < stop; i += THREADS) sum += expf(row[i] - best.peak);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) own_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (int i = 0; i < THREADS / 32; i++) total += (double)own_sums[i];
  peaks[m * parts + blockIdx.x] = best.peak;
  ids[m * parts + blockIdx.x] = best.id;
  sums[m * parts + blockIdx.x] = total;
}

// The last kernel of a greedy step: the token of every row that is not idle goes in again, one
// position on. A record is (id, sum of e^(logit - largest)) of each row; `count` tells how many
// there are. One block of M warps.
extern "C" __global__ void __launch_bounds__(256)
    settle(const float* __restrict__ peaks, const int* __restrict__ ids,
           const double* __restrict__ sums, int parts, int V, int* __restrict__ tokens,
           int* __restrict__ positions, double* __restrict__ records, int room,
           int* __restrict__ count) {
  int m = threadIdx.x / 32, lane = threadIdx.x % 32, rows = blockDim.x / 32, done = *count;
  Best own = {MINUS_INFINITY, 0x7fffffff};
  for (int i = lane; i < parts; i += 32) {
    Best found = {peaks[m * parts + i], ids[m * parts + i]};
    own = better(own, found);
  }
  own = warp_best(own);
  __syncthreads();  // every warp has read count
  if (lane != 0) return;
  double total = 0.0;
  for (int i = 0; i < parts; i++)
    total += sums[m * parts + i] * (double)expf(peaks[m * parts + i] - own.peak);
  if (done < room) {
    records[((size_t)done * rows + m) * 2] = (double)own.id;
    records[((size_t)done * rows + m) * 2 + 1] = total;
  }
  if (positions[m] >= 0) {
    tokens[m] = min(own.id, V - 1);  // of damaged logits there is no id; the host will say so
    positions[m] += 1;
  }
  if (m == 0) *count = done + 1;
}
