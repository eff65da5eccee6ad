// Memory of the device and pinned memory of the host: both are the host's, and only a page that is touched takes room.
#include "device.hpp"

#include <sys/mman.h>

#include <cstring>

Counts counts;
std::recursive_mutex everything;

namespace {
struct Block {
    size_t size;
    Memory kind;
    int device;
    bool ours;
};
std::map<uintptr_t, Block> blocks;
std::map<int, size_t> used;
thread_local int device = 0;
constexpr size_t page = 4096, context = size_t(500) << 20;  // what a process's context takes on a real one

void *taken(size_t size, Memory kind) {
    size = ((size ? size : 1) + page - 1) & ~(page - 1);
    Locked lock(everything);
    if (kind == Memory::device && used[device] + size + context > properties().bytes) return nullptr;
    void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    blocks[uintptr_t(memory)] = {size, kind, device, true};
    if (kind == Memory::device) used[device] += size;
    (kind == Memory::device ? counts.device_allocations : counts.host_allocations)++;
    return memory;
}

void given_back(void *memory) {
    Locked lock(everything);
    auto found = blocks.find(uintptr_t(memory));
    if (found == blocks.end()) return;
    if (found->second.kind == Memory::device) used[found->second.device] -= found->second.size;
    if (found->second.ours) munmap(memory, found->second.size);
    blocks.erase(found);
}

const Block *block_of(const void *pointer) {
    auto found = blocks.upper_bound(uintptr_t(pointer));
    if (found == blocks.begin()) return nullptr;
    --found;
    return uintptr_t(pointer) < found->first + found->second.size ? &found->second : nullptr;
}

cudaError_t allocated(void **pointer, size_t size, Memory kind) {
    if (capture_forbids()) return cudaErrorStreamCaptureUnsupported;
    *pointer = taken(size, kind);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
}  // namespace

Memory kind_of(const void *pointer) {
    Locked lock(everything);
    const Block *block = block_of(pointer);
    return block ? block->kind : Memory::unknown;
}

int device_of(const void *pointer) {
    Locked lock(everything);
    const Block *block = block_of(pointer);
    return block ? block->device : 0;
}

int current_device() { return device; }

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
    *count = properties().count;
    return properties().driver < properties().runtime / 1000 * 1000 ? cudaErrorInsufficientDriver : cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int *number) {
    *number = device;
    return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int number) {
    if (number < 0 || number >= properties().count) return cudaErrorInvalidDevice;
    device = number;
    return cudaSuccess;
}
EXPORT cudaError_t cudaMalloc(void **pointer, size_t size) { return allocated(pointer, size, Memory::device); }
EXPORT cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t) {
    return allocated(pointer, size, Memory::device);
}
EXPORT cudaError_t cudaMallocHost(void **pointer, size_t size) { return allocated(pointer, size, Memory::pinned); }
EXPORT cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned) {
    return allocated(pointer, size, Memory::pinned);
}
EXPORT cudaError_t cudaDeviceSynchronize();
static cudaError_t freed(void *pointer) {
    if (capture_forbids()) return cudaErrorStreamCaptureUnsupported;
    cudaDeviceSynchronize();  // what still uses it ends first
    given_back(pointer);
    return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void *pointer) { return pointer ? freed(pointer) : cudaSuccess; }
EXPORT cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return freed(pointer); }
EXPORT cudaError_t cudaFreeHost(void *pointer) { return freed(pointer); }
EXPORT cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned) {
    Locked lock(everything);
    blocks[uintptr_t(pointer)] = {size, Memory::pinned, device, false};
    return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void *pointer) { return freed(pointer); }
EXPORT cudaError_t cudaHostGetDevicePointer(void **pointer, void *host, unsigned) {
    *pointer = host;
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    Locked lock(everything);
    *total = properties().bytes;
    *free = *total - context - used[device];
    return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *found, const void *pointer) {
    memset(found, 0, sizeof *found);
    Memory kind = kind_of(pointer);
    found->type = kind == Memory::device   ? cudaMemoryTypeDevice
                  : kind == Memory::pinned ? cudaMemoryTypeHost
                                           : cudaMemoryTypeUnregistered;
    found->device = device_of(pointer);
    found->devicePointer = kind == Memory::unknown ? nullptr : const_cast<void *>(pointer);
    found->hostPointer = kind == Memory::pinned ? const_cast<void *>(pointer) : nullptr;
    return cudaSuccess;
}
EXPORT CUresult cuPointerGetAttribute(void *found, CUpointer_attribute which, CUdeviceptr pointer) {
    Memory kind = kind_of((void *)pointer);
    if (which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(unsigned *)found = kind == Memory::device ? 2 : 1;
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int *)found = device_of((void *)pointer);
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER || which == CU_POINTER_ATTRIBUTE_HOST_POINTER)
        *(CUdeviceptr *)found = pointer;
    if (which == CU_POINTER_ATTRIBUTE_CONTEXT) *(void **)found = (void *)0x40;
    return kind == Memory::unknown ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
#undef cuMemGetInfo
EXPORT CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    cudaMemGetInfo(free, total);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *,
                                              CUmemAllocationGranularity_flags) {
    *size = size_t(2) << 20;
    return CUDA_SUCCESS;
}
