// The GPU that is not there: what it is, what it was asked to do, and the one lock over all of it.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Properties {
    const char *name = "NVIDIA H100 that is not there";
    int count, major, minor, driver, runtime = 13000;
    size_t bytes;
    bool late;  // whether what was asked is done only when somebody waits for it

    static long said(const char *variable, long otherwise) {
        const char *value = getenv(variable);
        return value && *value ? atol(value) : otherwise;
    }
    Properties()
        : count(said("NULL_GPU_COUNT", 1)), major(said("NULL_GPU_CAPABILITY", 90) / 10),
          minor(said("NULL_GPU_CAPABILITY", 90) % 10), driver(said("NULL_GPU_DRIVER", 13000)),
          bytes(size_t(said("NULL_GPU_MEMORY_MIB", 81559)) << 20), late(said("NULL_GPU_LATE", 0)) {}
};

inline const Properties &properties() {
    static const Properties found;
    return found;
}

int attribute(int number);

// What was asked of the device since the process began. `launches` are the host's; `kernels` also those in graphs.
struct Counts {
    long launches = 0, graph_launches = 0, kernels = 0;
    long to_device = 0, to_host = 0, on_device = 0, fills = 0;
    long bytes_to_device = 0, bytes_to_host = 0;
    long events = 0, stream_waits = 0;
    long waits_for_stream = 0, waits_for_event = 0, waits_for_device = 0, waits_for_copy = 0;
    long host_allocations = 0, device_allocations = 0;
    std::map<std::string, long> by_kernel;
};

extern Counts counts;
extern std::recursive_mutex everything;

using Locked = std::lock_guard<std::recursive_mutex>;

enum class Memory { unknown, pinned, device };
Memory kind_of(const void *pointer);
int device_of(const void *pointer);
int current_device();
bool capture_forbids();
