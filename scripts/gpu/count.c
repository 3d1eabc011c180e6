/* Counts the kernels and the copies of the process that it is injected into (CUDA_INJECTION64_PATH), the copies by what made
 * them: copy engines (ASYNC_MEMCPY) or multiprocessors (COMPUTE). Writes JSON to COUNT_FILE when the process ends. */
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>

static unsigned long kernels, copies[8], bytes[8];

static void CUPTIAPI give(uint8_t **buffer, size_t *size, size_t *most) {
    *size = 8 << 20;
    *buffer = aligned_alloc(8, *size);
    *most = 0;
}

static void CUPTIAPI take(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) kernels++;
        if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            CUpti_ActivityMemcpy6 *copy = (void *)record;
            copies[copy->channelType & 7]++;
            bytes[copy->channelType & 7] += copy->bytes;
        }
    }
    free(buffer);
}

static void end(void) {
    cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    const char *path = getenv("COUNT_FILE");
    FILE *file = path ? fopen(path, "w") : stderr;
    if (!file) return;
    unsigned long by_compute = copies[CUPTI_CHANNEL_TYPE_COMPUTE], by_engine = copies[CUPTI_CHANNEL_TYPE_ASYNC_MEMCPY];
    fprintf(file, "{\"kernels\":%lu,\"copies_by_multiprocessors\":%lu,\"copies_by_copy_engines\":%lu,\"bytes_by_copy_engines\":%lu}\n",
            kernels, by_compute, by_engine, bytes[CUPTI_CHANNEL_TYPE_ASYNC_MEMCPY]);
    fclose(file);
}

int InitializeInjection(void) {
    cuptiActivityRegisterCallbacks(give, take);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
    cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    atexit(end);
    return 1;
}
