// What the loader asks a library before it calls a kernel: the sources it was compiled from, and its variant.
#include "common.h"

EXPORT const char *qwenq_sources(void) { return QWENQ_SOURCES; }
EXPORT const char *qwenq_variant(void) { return QWENQ_VARIANT; }

#define KERNEL(name) void name(Args args);
#include "kernels.def"
#undef KERNEL

typedef struct {
    const char *name;
    void (*run)(Args);
} Kernel;

static const Kernel kernels[] = {
#define KERNEL(name) {#name, name},
#include "kernels.def"
#undef KERNEL
    {NULL, NULL},
};

// The address of a kernel; NULL if there is none of that name.
EXPORT void *qwenq_kernel(const char *name) {
    for (const Kernel *kernel = kernels; kernel->name; kernel++)
        if (!strcmp(kernel->name, name)) return (void *)kernel->run;
    return NULL;
}
