// Tokens on the device: those the host orders, and those chosen from logits: the largest, the
// lowest id that has it, and the sum of powers, of which the host makes its log-probability. Where
// the host draws, `weigh` and `sift` leave of all logits those among which the draw is.

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

// ---- drawing: BINS is registry.BINS --------------------------------------------------------------

#define WISHES 4  // of a row: temperature, top-k (0: all), top-p (1: all), a random number
#define FACTS 5   // of a row, for the host: candidates, largest logit, and three sums: see sift

// Bins are 1/32 wide, from the largest logit down; the last takes the rest, and what is no number.
// Whatever is rounded, a larger logit is in no later bin, and equal ones are in the same.
__device__ __forceinline__ int bin_of(float peak, float logit) {
  return (int)fminf((peak - logit) * 32.f, (float)(BINS - 1));
}

__device__ __forceinline__ float row_peak(const float* peaks, int parts) {
  float peak = MINUS_INFINITY;
  for (int i = 0; i < parts; i++) peak = fmaxf(peak, peaks[i]);
  return peak;
}

// Of each part of a row, as pick has them: powers, the sum of e^((logit - row's largest) / T), and
// counts of the logits in each bin. Blocks: (part, row).
extern "C" __global__ void __launch_bounds__(THREADS)
    weigh(const float* __restrict__ logits, int V, const float* __restrict__ peaks,
          const double* __restrict__ wishes, double* __restrict__ powers,
          int* __restrict__ counts) {
  __shared__ int bins[BINS];
  __shared__ double own_sums[THREADS / 32];
  int m = blockIdx.y, parts = gridDim.x, size = (V + parts - 1) / parts;
  int start = blockIdx.x * size, stop = min(V, start + size), part = m * parts + blockIdx.x;
  const float* row = logits + (size_t)m * V;
  float peak = row_peak(peaks + m * parts, parts);
  double temperature = wishes[m * WISHES], sum = 0.0;
  for (int b = threadIdx.x; b < BINS; b += THREADS) bins[b] = 0;
  __syncthreads();
  for (int i = start + threadIdx.x; i < stop; i += THREADS) {
    sum += exp(((double)row[i] - (double)peak) / temperature);
    atomicAdd(bins + bin_of(peak, row[i]), 1);  // integers: the order is all the same
  }
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, o);
  if (threadIdx.x % 32 == 0) own_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  for (int b = threadIdx.x; b < BINS; b += THREADS) counts[part * BINS + b] = bins[b];
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (int i = 0; i < THREADS / 32; i++) total += own_sums[i];
  powers[part] = total;
}

// Where a row's candidates are: ids from start to stop, in bins up to the last.
struct Cut {
  float peak;
  int start, stop, last;
  double spare;  // what may be left out: ids of top-k; of top-p, powers
};

// Tells the host what it needs of the others: `facts` are the largest logit, the sum of all powers,
// the sum of e^(logit - largest), and that of the powers of ids before start. One thread.
__device__ __forceinline__ Cut cut_of(const float* peaks, const double* sums, const double* powers,
                                      const double* wish, int parts, int V, double* facts) {
  double k = wish[1], p = wish[2], total = 0.0, sum = 0.0, upto = 0.0, before = 0.0;
  Cut cut = {row_peak(peaks, parts), 0, V, BINS - 1, -1.0};  // -1: nothing may be left out
  for (int i = 0; i < parts; i++) {
    total += powers[i];
    sum += sums[i] * (double)expf(peaks[i] - cut.peak);
  }
  if (k > 0.0) {
    cut.spare = (double)V - k;
  } else if (p < 1.0) {
    cut.spare = (1.0 - p - 0x1p-36) * total;  // sums of V powers are rounded, here and on the host
  } else {  // the random number is in one part
    int size = (V + parts - 1) / parts, part = 0;
    for (int i = 0; i < parts && upto <= wish[3] * total; i++) {
      part = i, before = upto;
      upto += powers[i];  // where it exceeds the number, it has grown
    }
    cut.start = min(V, part * size);
    cut.stop = min(V, cut.start + size);
  }
  facts[1] = (double)cut.peak, facts[2] = total, facts[3] = sum, facts[4] = before;
  return cut;
}

// The last bin that candidates are in, of a block that has a thread for each bin: those after it
// weigh no more than may be left out. All threads come here together; the result is in cut.last.
//
// Top-p drops an id if those before it add up to more than p: so all from some bin on, if together
// they have less than 1 - p of all powers.
__device__ __forceinline__ void narrow(Cut* cut, double* weights, double weight) {
  int bin = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int o = 1; o < 32; o *= 2) {  // of this bin and those after it, in this warp
    double other = __shfl_down_sync(ALL_LANES, weight, o);
    if (lane + o < 32) weight += other;
  }
  if (lane == 0) weights[warp] = weight;
  __syncthreads();
  double beyond = __shfl_down_sync(ALL_LANES, weight, 1);
  if (lane == 31) beyond = 0.0;
  for (int i = warp + 1; i < BINS / 32; i++) beyond += weights[i];
  if (beyond <= cut->spare) atomicMin(&cut->last, bin);
  __syncthreads();
}

// The candidates of a draw, ids ascending, with their logits, and how many there are: those that
// top-k or top-p may keep, or a part. If there are more than room, none are written. One block a
// row, a thread a bin; each warp has a run of ids, of which it counts the candidates, then writes
// them after those of the warps before.
extern "C" __global__ void __launch_bounds__(BINS, 1)
    sift(const float* __restrict__ logits, int V, const float* __restrict__ peaks,
         const double* __restrict__ sums, const double* __restrict__ powers,
         const int* __restrict__ counts, const double* __restrict__ wishes, int parts,
         double* __restrict__ facts, int* __restrict__ ids, float* __restrict__ kept, int room) {
  __shared__ Cut cut;
  __shared__ double weights[BINS / 32];
  __shared__ int taken[BINS / 32];
  int m = blockIdx.x, first = m * parts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const double* wish = wishes + m * WISHES;
  double* fact = facts + m * FACTS;
  if (threadIdx.x == 0)
    cut = cut_of(peaks + first, sums + first, powers + first, wish, parts, V, fact);
  int count = 0;
  for (int i = 0; i < parts; i++) count += counts[(first + i) * BINS + threadIdx.x];
  // The most that each may have; what is rounded may have brought it across the edge of its bin.
  double below = fmax((double)threadIdx.x - 0x1p-10, 0.0) / 32.0;
  narrow(&cut, weights, (double)count * (wish[1] > 0.0 ? 1.0 : exp(-below / wish[0])));

  const float* row = logits + (size_t)m * V;
  int size = (cut.stop - cut.start + BINS / 32 - 1) / (BINS / 32), own = 0;
  int start = cut.start + warp * size, stop = min(cut.stop, start + size);
  for (int i = start + lane; i < stop; i += 32) own += bin_of(cut.peak, row[i]) <= cut.last;
  for (int o = 16; o; o >>= 1) own += __shfl_xor_sync(ALL_LANES, own, o);
  if (lane == 0) taken[warp] = own;
  __syncthreads();
  int place = 0, found = 0;
  for (int i = 0; i < BINS / 32; found += taken[i++])
    if (i == warp) place = found;
  if (threadIdx.x == 0) fact[0] = (double)found;
  if (found > room) return;
  for (int base = start; base < stop; base += 32) {
    int i = base + lane;
    bool takes = i < stop && bin_of(cut.peak, row[i]) <= cut.last;
    u32 lanes = __ballot_sync(ALL_LANES, takes);
    size_t at = (size_t)m * room + place + __popc(lanes & ((1u << lane) - 1));
    if (takes) ids[at] = i, kept[at] = row[i];
    place += __popc(lanes);
  }
}
