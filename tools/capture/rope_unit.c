/* A unit under test, fed with the reference's own numbers: RoPE of layer 0 in C. See
 * docs/crosscheck.md. cc -O2 rope_unit.c -o rope_unit -lm && mkdir candidate
 *     ./rope_unit raw T N H theta candidate
 * reads raw/layers.0.q.f32, shape (T, N, H), pairs (2i, 2i + 1); writes layers.0.q_rope. */
#include <math.h>
#include <stdlib.h>
#include "capture.h"

static void rope(float *q_TNH, long T, long N, long H, float theta) {
    for (long t = 0; t < T; t++)
        for (long n = 0; n < N; n++)
            for (long i = 0; i < H; i += 2) {
                float *pair = q_TNH + (t * N + n) * H + i, a = pair[0], b = pair[1];
                float angle = t * powf(theta, -(float)i / H);
                pair[0] = a * cosf(angle) - b * sinf(angle);
                pair[1] = a * sinf(angle) + b * cosf(angle);
            }
}

int main(int argc, char **argv) {
    if (argc != 7) return fprintf(stderr, "usage: rope_unit RAW T N H THETA OUT\n"), 2;
    char path[2000];
    long T = atol(argv[2]), N = atol(argv[3]), H = atol(argv[4]);
    size_t size = (size_t)(T * N * H);
    float *q_TNH = malloc(size * sizeof *q_TNH);
    snprintf(path, sizeof path, "%s/layers.0.q.f32", argv[1]);
    FILE *file = fopen(path, "rb");
    if (!file || !q_TNH || fread(q_TNH, sizeof *q_TNH, size, file) != size)
        return fprintf(stderr, "%s: cannot be read\n", path), 1;
    rope(q_TNH, T, N, H, strtof(argv[5], NULL));
    capture_open(argv[6], "\"implementation\": \"rope_unit.c\", \"dtype\": \"float32\"");
    capture("layers.0.q_rope", q_TNH, 3, (long[]){T, N, H});
    return capture_close() != 0;
}
