// Run recorded kernel calls: read them from a file, write what memory holds after each of them to another.
//
//     arm_main CALLS RESULTS
//
// A call (record_calls.py writes them; all numbers are little-endian int64) is the kernel's name in
// 64 bytes, the number of objects, and the objects: pieces of memory with places in them that hold addresses of earlier
// ones. An object is its size, its bytes, the number of such places, and for each its offset, the object that it points
// into, and the offset there. The last object is the kernel's `args`. The results are all objects' bytes, in order.
//
// Behind every object lies a page that nobody may touch: a kernel that reads or writes past the end of a piece of memory
// whose size is a multiple of 64 bytes ends with SIGSEGV, others if it is past the next multiple.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    const char *name;
    void (*run)(const int64_t *);
} Kernel;
#define KERNEL(name) void name(const int64_t *args);
#include "kernels.def"
#undef KERNEL
static const Kernel kernels[] = {
#define KERNEL(name) {#name, name},
#include "kernels.def"
#undef KERNEL
    {NULL, NULL},
};

enum { MOST_OBJECTS = 4096, ALIGNMENT = 64 };

typedef struct {
    char *bytes, *mapped;
    size_t size, mapped_size;
} Object;

static void fail(const char *message) {
    fprintf(stderr, "error: %s\n", message);
    exit(1);
}

static void read_bytes(FILE *file, void *to, size_t size) {
    if (fread(to, 1, size, file) != size) fail("the file of calls ends within a call");
}

static int64_t read_number(FILE *file) {
    int64_t number;
    read_bytes(file, &number, sizeof number);
    return number;
}

static Object allocate(size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), held = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t before_guard = (held + page - 1) / page * page;
    Object made = {.size = size, .mapped_size = before_guard + page};
    made.mapped = mmap(NULL, made.mapped_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made.mapped == MAP_FAILED || mprotect(made.mapped + before_guard, page, PROT_NONE)) fail("no memory");
    made.bytes = made.mapped + before_guard - held;
    return made;
}

static Object read_object(FILE *calls, const Object *earlier, int64_t count) {
    Object made = allocate((size_t)read_number(calls));
    read_bytes(calls, made.bytes, made.size);
    for (int64_t places = read_number(calls); places > 0; places--) {
        int64_t at = read_number(calls), target = read_number(calls), offset = read_number(calls);
        if (at < 0 || at + 8 > (int64_t)made.size || target < 0 || target >= count) fail("a place lies outside");
        int64_t address = (int64_t)(intptr_t)earlier[target].bytes + offset;
        memcpy(made.bytes + at, &address, sizeof address);
    }
    return made;
}

int main(int argc, char **argv) {
    if (argc != 3) fail("usage: arm_main CALLS RESULTS");
    FILE *calls = fopen(argv[1], "rb"), *results = fopen(argv[2], "wb");
    if (!calls || !results) fail("a file cannot be opened");
    static Object objects[MOST_OBJECTS];
    char name[64];
    while (fread(name, 1, sizeof name, calls) == sizeof name) {
        if (memchr(name, 0, sizeof name) == NULL) fail("a kernel's name has no end");
        const Kernel *kernel = kernels;
        while (kernel->name && strcmp(kernel->name, name)) kernel++;
        if (!kernel->name) fail("there is no such kernel");
        int64_t count = read_number(calls);
        if (count < 1 || count > MOST_OBJECTS) fail("a call has too many objects");
        for (int64_t i = 0; i < count; i++) objects[i] = read_object(calls, objects, i);
        kernel->run((const int64_t *)objects[count - 1].bytes);
        for (int64_t i = 0; i < count; i++) {
            if (fwrite(objects[i].bytes, 1, objects[i].size, results) != objects[i].size) fail("results are not written");
            munmap(objects[i].mapped, objects[i].mapped_size);
        }
        fflush(results);  // how long the file is tells which call ended the program
    }
    if (fclose(results)) fail("results are not written");
    return 0;
}
