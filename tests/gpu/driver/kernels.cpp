// Kernels by their names, from whichever side they are launched: none of them runs.
#include "device.hpp"

#include <cstdio>
#include <cstring>

void kernel_launched(cudaStream_t stream, const char *name);

namespace {
std::map<const void *, const char *> registered;

const char *named(const void *function) {
    Locked lock(everything);
    auto found = registered.find(function);
    return found == registered.end() ? "a kernel" : found->second;
}

thread_local struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configuration;
}  // namespace

EXPORT void **__cudaRegisterFatBinary(void *) { return (void **)calloc(1, 64); }
EXPORT void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, void *, void *, void *,
                                   void *, int *) {
    Locked lock(everything);
    registered[host] = name;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(void **kernel, const void *host) {
    *kernel = const_cast<void *>(host);
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t stream) {
    kernel_launched(stream, named(function));
    return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(void *kernel, dim3, dim3, void **, size_t, cudaStream_t stream) {
    kernel_launched(stream, named(kernel));
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *function, void **) {
    kernel_launched(how->stream, named(function));
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t stream) {
    kernel_launched(stream, named(function));
    return cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, const void *) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 10 * properties().major + properties().minor;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
    *blocks = 2;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t,
                                                                          unsigned) {
    *blocks = 2;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void **pointer, const void *) { return cudaMalloc(pointer, 1 << 16); }

// Triton's: a function is its name.
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *) {
    *module = (CUmodule)0x50;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *, unsigned, CUjit_option *, void **) {
    return cuModuleLoadData(module, nullptr);
}
EXPORT CUresult cuModuleLoad(CUmodule *module, const char *) { return cuModuleLoadData(module, nullptr); }
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction, const CUlaunchConfig *) {
    *clusters = 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **, void **) {
    kernel_launched((cudaStream_t)how->hStream, (const char *)function);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                               CUstream stream, void **, void **) {
    kernel_launched((cudaStream_t)stream, (const char *)function);
    return CUDA_SUCCESS;
}

// -- what was counted -------------------------------------------------------------------------------------------------

// Writes the counts as JSON, with those by kernel where `kernels`; returns how many bytes that takes.
EXPORT size_t null_gpu_counts(char *text, size_t size, int kernels) {
    Locked lock(everything);
    std::string said = "{";
    auto say = [&](const char *name, long count) {
        said += (said.size() > 1 ? ", \"" : "\"") + std::string(name) + "\": " + std::to_string(count);
    };
    say("launches", counts.launches), say("graph launches", counts.graph_launches), say("kernels", counts.kernels);
    say("copies to the device", counts.to_device), say("copies to the host", counts.to_host);
    say("copies on the device", counts.on_device), say("fills", counts.fills);
    say("bytes to the device", counts.bytes_to_device), say("bytes to the host", counts.bytes_to_host);
    say("events", counts.events), say("waits of streams", counts.stream_waits);
    say("waits for a stream", counts.waits_for_stream), say("waits for an event", counts.waits_for_event);
    say("waits for the device", counts.waits_for_device), say("waits for a copy", counts.waits_for_copy);
    say("allocations on the device", counts.device_allocations), say("pinned allocations", counts.host_allocations);
    if (kernels) {
        said += ", \"by kernel\": {";
        bool first = true;
        for (auto &[name, count] : counts.by_kernel) {
            said += (first ? "\"" : ", \"") + name + "\": " + std::to_string(count);
            first = false;
        }
        said += "}";
    }
    said += "}";
    if (said.size() < size) memcpy(text, said.c_str(), said.size() + 1);
    return said.size() + 1;
}
