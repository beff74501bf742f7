// y = W x for BATCH <= 8 vectors at once: every weight is read once, whatever BATCH is.
//
// A warp has ROWS rows of W, a block eight warps. The block goes through K by tiles: it brings the
// vectors' part into shared memory, normed if they are to be, while the weights of this tile are
// already in registers and those of the next are on their way. Sums are by lanes, then by a
// tree over them: the same bits for every BATCH, and whichever other weights share the launch.

#define WARPS 8
#define BLOCK_ROWS (WARPS * ROWS)
#define BLOCKS (BATCH == 1 ? 2 : 1)  // of a multiprocessor, which bounds a thread's registers
#define FOURS (SLOTS * 32)           // groups of four numbers in a tile

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// The BATCH vectors a launch multiplies by, and how they are normed on the way: see stage.
struct Vectors {
  const float* x;
  const float* norm;  // weights of RMSNorm, or null: x as it is
  int pitch, rounded;
};

// scale[m] = 1 / sqrt(mean(x^2) + eps), from sums of squares of `parts` parts of each vector.
__device__ __forceinline__ void root_mean(float* scale, const float* squares, int parts, int K,
                                          float eps) {
  int m = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (m < BATCH) {
    float own = 0.f;
    for (int i = lane; i < parts; i += 32) own += squares[m * parts + i];
    float sum = warp_sum(own);
    if (lane == 0) scale[m] = 1.f / sqrtf(sum / (float)K + eps);
  }
  __syncthreads();
}

// Bring a tile of every vector into shared memory. Pitches are multiples of 4, filled with zeros.
__device__ __forceinline__ void stage(float4* staged, const Vectors& v, const float* scale,
                                      int tile) {
  int f = threadIdx.x, at = tile * FOURS + f;
  if (f >= FOURS) return;
  float4 w = make_float4(1.f, 1.f, 1.f, 1.f);
  if (v.norm && at * 4 < v.pitch) w = ((const float4*)v.norm)[at];
#pragma unroll
  for (int m = 0; m < BATCH; m++) {
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (at * 4 < v.pitch) x = *(const float4*)(v.x + (size_t)m * v.pitch + at * 4);
    if (v.norm) {
      float s = scale[m];
      x = make_float4(x.x * s * w.x, x.y * s * w.y, x.z * s * w.z, x.w * s * w.w);
    }
    if (v.rounded)
      x = make_float4(rounded_bf16(x.x), rounded_bf16(x.y), rounded_bf16(x.z), rounded_bf16(x.w));
    staged[m * SLOTS * PITCH + slot(f)] = x;
  }
}

// The ROWS rows of a warp: those from `first` on, of a; or, paired, of a and of b by turns.
struct Rows {
  const Stored *a, *b;
  int first, N;
};

template <bool paired>
__device__ __forceinline__ void load_rows(Piece* pieces, const Rows& rows, int K, int tile,
                                          int lane) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    int n = rows.first + (paired ? r / 2 : r);
    load(pieces[r], paired && r % 2 ? rows.b : rows.a, rows.N, n < rows.N ? K : 0, n, tile, lane);
  }
}

// sums[r][m], in every lane, of this warp's rows.
template <bool paired>
__device__ __forceinline__ void multiply(float (&sums)[ROWS][BATCH], const Rows& rows, int K,
                                         const Vectors& v, float4* staged, const float* scale) {
  int lane = threadIdx.x % 32, tiles = (K + 4 * FOURS - 1) / (4 * FOURS);
  Piece now[ROWS], next[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int m = 0; m < BATCH; m++) sums[r][m] = 0.f;
  load_rows<paired>(now, rows, K, 0, lane);
  for (int tile = 0; tile < tiles; tile++) {
    stage(staged, v, scale, tile);
    __syncthreads();
    load_rows<paired>(next, rows, K, tile + 1, lane);  // beyond the last: nothing is read
#pragma unroll
    for (int j = 0; j < SLOTS; j++) {
      float4 w[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) w[r] = decode(now[r], j, lane);
#pragma unroll
      for (int m = 0; m < BATCH; m++) {
        float4 x = staged[(m * SLOTS + j) * PITCH + lane];
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[r][m] = dot(w[r], x, sums[r][m]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) now[r] = next[r];
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int m = 0; m < BATCH; m++) sums[r][m] = warp_sum(sums[r][m]);
}

// Lane r * BATCH + m takes sums[r][m]; a loop, because registers cannot be chosen by number.
__device__ __forceinline__ float own_sum(const float (&sums)[ROWS][BATCH], int lane) {
  float own = 0.f;
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int m = 0; m < BATCH; m++)
      if (lane == r * BATCH + m) own = sums[r][m];
  return own;
}

// silu(gate) * up. Where e^-gate overflows the quotient is 0, as silu is but for 1e-36.
__device__ __forceinline__ float gated(float gate, float up) {
  return gate / (1.f + expf(-gate)) * up;
}

// y = W (norm of x) for up to three weights of one format, such as wq, wk and wv, one after the
// other in y. Blocks: those of each weight, rounded up.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    project(const Stored* __restrict__ w0, const Stored* __restrict__ w1,
            const Stored* __restrict__ w2, int N0, int N1, int N2, int y0, int y1, int y2, int K,
            const float* __restrict__ x, int x_pitch, const float* __restrict__ norm,
            const float* __restrict__ squares, int parts, float eps, int rounded,
            float* __restrict__ y, int y_pitch) {
  __shared__ float4 staged[BATCH * SLOTS * PITCH];
  __shared__ float scale[BATCH];
  int lane = threadIdx.x % 32, block = blockIdx.x, start = y0;
  Rows rows = {w0, w0, 0, N0};
  int blocks0 = (N0 + BLOCK_ROWS - 1) / BLOCK_ROWS, blocks1 = (N1 + BLOCK_ROWS - 1) / BLOCK_ROWS;
  if (block >= blocks0 + blocks1) {
    rows.a = w2, rows.N = N2, start = y2, block -= blocks0 + blocks1;
  } else if (block >= blocks0) {
    rows.a = w1, rows.N = N1, start = y1, block -= blocks0;
  }
  rows.first = block * BLOCK_ROWS + threadIdx.x / 32 * ROWS;
  float sums[ROWS][BATCH];
  Vectors v = {x, norm, x_pitch, rounded};
  root_mean(scale, squares, parts, K, eps);
  multiply<false>(sums, rows, K, v, staged, scale);
  int n = rows.first + lane / BATCH, m = lane % BATCH;
  float own = own_sum(sums, lane);
  if (lane < ROWS * BATCH && n < rows.N) y[(size_t)m * y_pitch + start + n] = own;
}

// y = silu(G (norm of x)) * (U (norm of x)): both rows of a pair are in one warp.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    gate_up(const Stored* __restrict__ gate, const Stored* __restrict__ up, int N, int K,
            const float* __restrict__ x, int x_pitch, const float* __restrict__ norm,
            const float* __restrict__ squares, int parts, float eps, int rounded,
            float* __restrict__ y, int y_pitch) {
  __shared__ float4 staged[BATCH * SLOTS * PITCH];
  __shared__ float scale[BATCH];
  int lane = threadIdx.x % 32;
  Rows rows = {gate, up, ((int)blockIdx.x * WARPS + (int)threadIdx.x / 32) * (ROWS / 2), N};
  float sums[ROWS][BATCH];
  Vectors v = {x, norm, x_pitch, rounded};
  root_mean(scale, squares, parts, K, eps);
  multiply<true>(sums, rows, K, v, staged, scale);
  float own = own_sum(sums, lane);
  float other = __shfl_sync(ALL_LANES, own, (lane + BATCH) % 32);  // the up beside a gate
  int pair = lane / BATCH, n = rows.first + pair / 2, m = lane % BATCH;
  if (lane < ROWS * BATCH && pair % 2 == 0 && n < N) y[(size_t)m * y_pitch + n] = gated(own, other);
}

// y += W x, the residual stream, and the sums of squares of every 16 numbers of the new y: pair by
// pair and then one by one, so that they have the same bits whatever ROWS and BATCH are.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    add(const Stored* __restrict__ w, int N, int K, const float* __restrict__ x, int x_pitch,
        int rounded, float* __restrict__ y, int y_pitch, float* __restrict__ squares) {
  __shared__ float4 staged[BATCH * SLOTS * PITCH];
  __shared__ float own_squares[WARPS * ROWS / 2][BATCH];  // of pairs of rows
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Rows rows = {w, w, (int)blockIdx.x * BLOCK_ROWS + warp * ROWS, N};
  float sums[ROWS][BATCH];
  Vectors v = {x, nullptr, x_pitch, rounded};
  multiply<false>(sums, rows, K, v, staged, nullptr);
  int n = rows.first + lane / BATCH, m = lane % BATCH;
  float sum = own_sum(sums, lane);
  if (lane < ROWS * BATCH && n < N) {
    sum += y[(size_t)m * y_pitch + n];
    y[(size_t)m * y_pitch + n] = sum;
  }
  float square = sum * sum;                             // 0 of rows that there are not
  square += __shfl_xor_sync(ALL_LANES, square, BATCH);  // the other row of the pair
  int pair = lane / BATCH / 2;
  if (lane < ROWS * BATCH && lane / BATCH % 2 == 0)
    own_squares[warp * (ROWS / 2) + pair][m] = square;
  __syncthreads();
  if (threadIdx.x < ROWS / 2 * BATCH) {
    int group = threadIdx.x / BATCH;
    float total = 0.f;
    for (int i = 0; i < WARPS; i++) total += own_squares[group * WARPS + i][threadIdx.x % BATCH];
    int parts = gridDim.x * (ROWS / 2);
    squares[threadIdx.x % BATCH * parts + blockIdx.x * (ROWS / 2) + group] = total;
  }
}

// y = silu(y) * other, where gate and up are stored in different formats. Blocks: (256 numbers,
// row).
extern "C" __global__ void __launch_bounds__(256)
    swiglu(float* __restrict__ y, const float* __restrict__ other, int N, int pitch) {
  int n = blockIdx.x * 256 + threadIdx.x;
  size_t at = (size_t)blockIdx.y * pitch + n;
  if (n < N) y[at] = gated(y[at], other[at]);
}
