/* Write arrays for `llama3np compare`: a directory of raw .f32 files and a manifest.json.
 *     capture_open("candidate", "\"ids\": [1, 403]");      the directory exists; JSON, or ""
 *     capture("layers.0.q", q, 3, (long[]){T, N, H});      floats, the last index fastest
 *     capture_close();                                     0, or how many writes went wrong
 * One call an array; a name holds no '/', '"' or '\'. Numbers are written as they lie in memory,
 * little-endian on most machines. Until capture_close there is no manifest, so nobody reads. */
#include <stdio.h>
static FILE *capture_list;
static int capture_count, capture_errors;
static char capture_folder[1000], capture_path[2][2000];
static FILE *capture_new(const char *name, const char *ending) {
    snprintf(capture_path[0], 2000, "%s/%s%s", capture_folder, name, ending);
    return fopen(capture_path[0], "wb");
}
static void capture_open(const char *folder, const char *metadata) {
    snprintf(capture_folder, sizeof capture_folder, "%s", folder);
    capture_count = capture_errors = 0;
    if ((capture_list = capture_new("manifest", ".part")))
        fprintf(capture_list, "{\"metadata\": {%s}, \"arrays\": [", metadata);
}
static void capture(const char *name, const float *numbers, int ndim, const long *shape) {
    size_t size = 1;
    FILE *file = capture_list ? capture_new(name, ".f32") : NULL;
    if (!file && ++capture_errors) return;
    fprintf(capture_list, "%s\n{\"name\": \"%s\", \"file\": \"%s.f32\", \"dtype\": \"f32\", "
            "\"shape\": [", capture_count++ ? "," : "", name, name);
    for (int i = 0; i < ndim; size *= shape[i++])
        fprintf(capture_list, "%s%ld", i ? ", " : "", shape[i]);
    fprintf(capture_list, "]}");
    capture_errors += fwrite(numbers, sizeof *numbers, size, file) != size;
    capture_errors += fclose(file) != 0;
}
static int capture_close(void) {
    if (!capture_list) return capture_errors + 1;
    capture_errors += fprintf(capture_list, "\n]}\n") < 0;
    capture_errors += fclose(capture_list) != 0;
    snprintf(capture_path[0], 2000, "%s/manifest.part", capture_folder);
    snprintf(capture_path[1], 2000, "%s/manifest.json", capture_folder);
    return capture_errors + (!capture_errors && rename(capture_path[0], capture_path[1]));
}
