// What is asked about the device, and the libraries that stand between torch and it: driver entry points, cuBLAS, NCCL, NVML.
#include "device.hpp"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

void kernel_launched(cudaStream_t stream, const char *name);

int attribute(int number) {
    switch (number) {  // by cudaDeviceAttr, whose numbers are the driver's too
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrTotalConstantMemory: case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrConcurrentKernels: case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrComputeCapabilityMajor: return properties().major;
    case cudaDevAttrComputeCapabilityMinor: return properties().minor;
    case cudaDevAttrStreamPrioritiesSupported: case cudaDevAttrManagedMemory: return 1;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrConcurrentManagedAccess: case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMemoryPoolsSupported: return 1;
    case 120: return 1;  // clusters of blocks
    default: return 0;
    }
}

// -- the runtime and the driver ---------------------------------------------------------------------------------------

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    *value = attribute(which);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp *found, int) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, properties().name);
    found->totalGlobalMem = properties().bytes;
    found->major = properties().major, found->minor = properties().minor;
    found->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    found->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    found->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    found->regsPerBlock = found->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
    found->warpSize = attribute(cudaDevAttrWarpSize);
    found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    found->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    found->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    found->concurrentKernels = found->unifiedAddressing = 1;
    found->asyncEngineCount = attribute(cudaDevAttrAsyncEngineCount);
    found->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    found->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { *version = properties().runtime; return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int *version) { *version = properties().driver; return cudaSuccess; }
EXPORT const char *cudaGetErrorString(cudaError_t error) {
    static thread_local char text[128];
    const char *known = error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
                        : error == cudaErrorMemoryAllocation       ? "out of memory"
                        : error == cudaErrorInsufficientDriver
                            ? "CUDA driver version is insufficient for CUDA runtime version"
                            : "an error";
    snprintf(text, sizeof text, "%s (%d, of the driver that computes nothing)", known, int(error));
    return text;
}
EXPORT const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:0%d:00.0", device + 1);
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { *can = 0; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) {
    *pool = (cudaMemPool_t)0x30;
    return cudaSuccess;
}

static int nothing() { return 0; }
static void *entry(const char *name) {
    void *found = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
    if (!found) found = dlsym(RTLD_DEFAULT, name);
    if (!found && getenv("NULL_GPU_VERBOSE")) fprintf(stderr, "null GPU: no %s\n", name);
    return found ? found : (void *)nothing;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult *result) {
    *function = entry(name);
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                           cudaDriverEntryPointQueryResult *result) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}
EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int, cuuint64_t,
                                    CUdriverProcAddressQueryResult *result) {
    *function = entry(name);
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) { *version = properties().driver; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int *count) { *count = properties().count; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice) {
    *value = attribute((int)which);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetName(char *text, int size, CUdevice) {
    snprintf(text, size, "%s", properties().name);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { *context = (CUcontext)0x40; return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)0x40; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice *device) { *device = current_device(); return CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult, const char **text) { *text = "an error of the driver that computes nothing"; return CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorName(CUresult, const char **text) { return cuGetErrorString(CUDA_SUCCESS, text); }

// -- products ---------------------------------------------------------------------------------------------------------

static cudaStream_t blas_stream = nullptr;
EXPORT int cublasCreate_v2(void **handle) { *handle = calloc(1, 64); return 0; }
EXPORT int cublasSetStream_v2(void *, cudaStream_t stream) { blas_stream = stream; return 0; }
EXPORT int cublasGetMathMode(void *, int *mode) { *mode = 0; return 0; }
EXPORT int cublasGetPointerMode_v2(void *, int *mode) { *mode = 0; return 0; }
EXPORT size_t cublasLtGetVersion() { return 130101; }
EXPORT int cublasLtMatmulDescCreate(void **made, int, int) { *made = calloc(1, 256); return 0; }
EXPORT int cublasLtMatrixLayoutCreate(void **made, int, unsigned long, unsigned long, long) { *made = calloc(1, 256); return 0; }
EXPORT int cublasLtMatmulPreferenceCreate(void **made) { *made = calloc(1, 256); return 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *found, int *count) {
    *count = 1;
    memset(found, 0, 96);
    return 0;
}
static int product() { kernel_launched(blas_stream, "a product of cuBLAS"); return 0; }
EXPORT int cublasLtMatmul(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                          void *, void *, size_t, cudaStream_t stream) {
    kernel_launched(stream, "a product of cuBLAS");
    return 0;
}
EXPORT int cublasGemmEx() { return product(); }
EXPORT int cublasSgemm_v2() { return product(); }
EXPORT int cublasGemmStridedBatchedEx() { return product(); }
EXPORT int cublasSgemmStridedBatched() { return product(); }

// -- NCCL -------------------------------------------------------------------------------------------------------------

struct UniqueId { char bytes[128]; };
EXPORT int ncclGetVersion(int *version) { *version = 22907; return 0; }
EXPORT int ncclGetUniqueId(void *id) { memset(id, 1, sizeof(UniqueId)); return 0; }
static int communicator(void **made) { *made = calloc(1, 64); return 0; }
EXPORT int ncclCommInitRank(void **made, int, UniqueId, int) { return communicator(made); }
EXPORT int ncclCommInitRankConfig(void **made, int, UniqueId, int, void *) { return communicator(made); }
EXPORT int ncclCommInitRankScalable(void **made, int, int, int, void *, void *) { return communicator(made); }
EXPORT int ncclCommSplit(void *, int, int, void **made, void *) { return communicator(made); }
EXPORT int ncclCommGetAsyncError(void *, int *error) { *error = 0; return 0; }
EXPORT int ncclCommCount(void *, int *count) { *count = properties().count; return 0; }
EXPORT int ncclCommUserRank(void *, int *rank) { *rank = current_device(); return 0; }
EXPORT const char *ncclGetErrorString(int) { return "an error of the NCCL that does nothing"; }
EXPORT const char *ncclGetLastError(void *) { return ""; }
EXPORT int ncclAllReduce(const void *, void *, size_t, int, int, void *, cudaStream_t stream) {
    kernel_launched(stream, "a sum of NCCL");
    return 0;
}
EXPORT int ncclAllGather(const void *, void *, size_t, int, void *, cudaStream_t stream) {
    kernel_launched(stream, "a gathering of NCCL");
    return 0;
}

// -- NVML -------------------------------------------------------------------------------------------------------------

EXPORT int nvmlInit_v2() { return 0; }
EXPORT int nvmlInitWithFlags(unsigned) { return 0; }
EXPORT int nvmlShutdown() { return 0; }
EXPORT const char *nvmlErrorString(int) { return "an error of the NVML that is not there"; }
EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.0"); return 0; }
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = properties().driver; return 0; }
EXPORT int nvmlSystemGetCudaDriverVersion(int *version) { *version = properties().driver; return 0; }
EXPORT int nvmlDeviceGetCount_v2(unsigned *count) { *count = properties().count; return 0; }
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned number, void **handle) { *handle = (void *)(0x70 + uintptr_t(number)); return 0; }
EXPORT int nvmlDeviceGetHandleByUUID(const char *, void **handle) { *handle = (void *)0x70; return 0; }
EXPORT int nvmlDeviceGetIndex(void *handle, unsigned *number) { *number = uintptr_t(handle) - 0x70; return 0; }
EXPORT int nvmlDeviceGetName(void *, char *text, unsigned size) { snprintf(text, size, "%s", properties().name); return 0; }
EXPORT int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    snprintf(text, size, "GPU-00000000-0000-0000-0000-%012lu", (unsigned long)handle - 0x70);
    return 0;
}
EXPORT int nvmlDeviceGetMemoryInfo(void *, unsigned long long *found) {
    size_t free, total;
    cudaMemGetInfo(&free, &total);
    found[0] = total, found[1] = free, found[2] = total - free;
    return 0;
}
EXPORT int nvmlDeviceGetCudaComputeCapability(void *, int *major, int *minor) {
    *major = properties().major, *minor = properties().minor;
    return 0;
}
EXPORT int nvmlDeviceGetP2PStatus(void *, void *, int, int *status) { *status = 1; return 0; }
