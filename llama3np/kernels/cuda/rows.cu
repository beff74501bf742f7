// Rows of a weight as float32: the embedding of tokens, and a stretch of rows for the products of
// prefill.

// out[i] = row start + i. Blocks: rows of them; threads go along the row.
extern "C" __global__ void __launch_bounds__(256)
    widen(const Stored* __restrict__ w, int N, int K, int start, float* __restrict__ out,
          int pitch) {
  int row = blockIdx.x;
  for (int k = threadIdx.x; k < K; k += blockDim.x)
    out[(size_t)row * pitch + k] = weight_at(w, N, K, start + row, k);
}

// out[i] = row ids[i], for ids on the device that were checked on the host.
extern "C" __global__ void __launch_bounds__(256)
    take(const Stored* __restrict__ w, int N, int K, const int* __restrict__ ids,
         float* __restrict__ out, int pitch) {
  int row = blockIdx.x;
  for (int k = threadIdx.x; k < K; k += blockDim.x)
    out[(size_t)row * pitch + k] = weight_at(w, N, K, ids[row], k);
}

// Block m puts token m's embedding where the residual stream begins, and beside it, for the first
// norm, the sum of its squares.
extern "C" __global__ void __launch_bounds__(256)
    embed(const Stored* __restrict__ w, int N, int K, const int* __restrict__ tokens,
          float* __restrict__ h, int pitch, float* __restrict__ squares) {
  __shared__ float own_squares[8];
  int m = blockIdx.x;
  float own = 0.f;
  for (int k = threadIdx.x; k < K; k += blockDim.x) {
    float x = weight_at(w, N, K, tokens[m], k);
    h[(size_t)m * pitch + k] = x;
    own += x * x;
  }
  float sum = warp_sum(own);
  if (threadIdx.x % 32 == 0) own_squares[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
  for (int i = 0; i < 8; i++) total += own_squares[i];
  squares[m] = total;
}
