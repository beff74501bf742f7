/* cc capture_example.c -o capture_example && mkdir candidate && ./capture_example candidate
 * writes two positions of a model that has only an embedding, to show the calls of capture.h. */
#include "capture.h"

int main(int argc, char **argv) {
    float embed_TD[2][3] = {{0.5f, -1.0f, 2.0f}, {0.25f, 0.0f, -3.5f}};
    float logits_TV[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
    capture_open(argc > 1 ? argv[1] : "candidate", "\"ids\": [1, 0], \"implementation\": \"C\"");
    capture("embed", &embed_TD[0][0], 2, (long[]){2, 3});
    capture("logits", &logits_TV[0][0], 2, (long[]){2, 4});
    return capture_close() != 0;
}
