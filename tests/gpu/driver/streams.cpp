// Streams, events and graphs. Each stream is a queue: copies and fills are made in its order, at once or, where
// NULL_GPU_LATE says so, only when somebody waits for them. That is as late as a real device may be: a copy that nobody
// waited for then reads what the host has written to its source meanwhile. Kernels are counted, and do nothing.
#include "device.hpp"

#include <cstring>
#include <deque>
#include <memory>
#include <set>
#include <vector>

namespace {
struct Stream;
struct Event;

struct Act {
    enum Kind { copy, fill, reach, wait, kernel } kind;
    void *to = nullptr;
    const void *from = nullptr;
    size_t size = 0;
    int value = 0;
    std::shared_ptr<std::vector<char>> staged = nullptr;  // of pageable memory, which is read when the copy is asked for
    Event *event = nullptr;
    long time = 0;
};

struct Graph {
    std::vector<Act> acts;
    std::vector<const char *> kernels;
    cudaStreamCaptureMode mode;
    unsigned long long number;
};

struct Event {
    Stream *stream = nullptr;
    long recorded = 0, reached = 0;
    Graph *captured = nullptr;
};

struct Stream {
    std::deque<Act> todo;
    Graph *capture = nullptr;
};

Stream main_stream;
std::set<Stream *> streams{&main_stream};
std::set<Graph *> capturing;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local Graph *mine = nullptr;
unsigned long long captures = 0;
long looks = 0;  // at events that are not reached, one after the other

Stream &of(cudaStream_t stream) {  // 0, 1 and 2 are names of the default stream
    return uintptr_t(stream) < 4096 ? main_stream : *(Stream *)stream;
}

void zeroed(void *to, int value, size_t size) { memset(to, value, size); }

void work(Stream &stream, Event *until = nullptr, long time = 0);

void done(const Act &act) {
    switch (act.kind) {
    case Act::copy:
        memmove(act.to, act.staged ? act.staged->data() : act.from, act.size);
        break;
    case Act::fill:
        zeroed(act.to, act.value, act.size);
        break;
    case Act::reach:
        act.event->reached = act.time;
        break;
    case Act::wait:
        if (act.event->reached < act.time && act.event->stream) work(*act.event->stream, act.event, act.time);
        break;
    case Act::kernel:
        break;
    }
}

void work(Stream &stream, Event *until, long time) {
    while (!stream.todo.empty() && !(until && until->reached >= time)) {
        Act act = stream.todo.front();
        stream.todo.pop_front();
        done(act);
    }
}

void asked(Stream &stream, Act act) {
    if (stream.capture) {
        stream.capture->acts.push_back(act);
        return;
    }
    stream.todo.push_back(act);
    if (!properties().late) work(stream);
}

void work_everywhere() {
    for (Stream *stream : streams) work(*stream);
}

cudaError_t copied(void *to, const void *from, size_t size, Stream &stream, bool waits) {
    Locked lock(everything);
    Memory source = kind_of(from), target = kind_of(to);
    bool to_host = target != Memory::device && source == Memory::device, to_device = target == Memory::device && source != Memory::device;
    (to_host ? counts.to_host : to_device ? counts.to_device : counts.on_device)++;
    if (to_device) counts.bytes_to_device += size;
    if (to_host) counts.bytes_to_host += size;
    waits = waits || (to_host && target == Memory::unknown);
    if (waits && stream.capture) return cudaErrorStreamCaptureUnsupported;
    Act act{Act::copy, to, from, size};
    if (to_device && source == Memory::unknown)
        act.staged = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + size);
    asked(stream, act);
    if (waits) {
        counts.waits_for_copy++;
        work(stream);
    }
    return cudaSuccess;
}

cudaError_t filled(void *to, int value, size_t size, Stream &stream) {
    Locked lock(everything);
    counts.fills++;
    asked(stream, {Act::fill, to, nullptr, size, value});
    return cudaSuccess;
}
}  // namespace

bool capture_forbids() {
    Locked lock(everything);
    if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
    if (mine && mine->mode != cudaStreamCaptureModeRelaxed) return true;
    if (thread_mode == cudaStreamCaptureModeThreadLocal) return false;
    for (Graph *graph : capturing)
        if (graph->mode == cudaStreamCaptureModeGlobal) return true;
    return false;
}

void kernel_launched(cudaStream_t stream, const char *name) {
    Locked lock(everything);
    Stream &on = of(stream);
    if (on.capture) {
        on.capture->kernels.push_back(name);
        return;
    }
    counts.launches++;
    counts.kernels++;
    counts.by_kernel[name]++;
}

// -- streams ----------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    Locked lock(everything);
    Stream *made = new Stream;
    streams.insert(made);
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return cudaStreamCreate(stream); }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
    return cudaStreamCreate(stream);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    Locked lock(everything);
    work(of(stream));  // what was asked of it is still done; events may point to it, so it stays
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) {
    *priority = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Locked lock(everything);
    if (of(stream).capture) return cudaErrorStreamCaptureUnsupported;
    return of(stream).todo.empty() ? cudaSuccess : cudaErrorNotReady;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    Locked lock(everything);
    if (of(stream).capture || capture_forbids()) return cudaErrorStreamCaptureUnsupported;
    counts.waits_for_stream++;
    work(of(stream));
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
    Locked lock(everything);
    if (capture_forbids()) return cudaErrorStreamCaptureUnsupported;
    counts.waits_for_device++;
    work_everywhere();
    return cudaSuccess;
}
EXPORT CUresult cuCtxSynchronize() { return (CUresult)cudaDeviceSynchronize(); }
EXPORT CUresult cuStreamSynchronize(CUstream stream) { return (CUresult)cudaStreamSynchronize((cudaStream_t)stream); }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t which, unsigned) {
    Locked lock(everything);
    Event *event = (Event *)which;
    counts.stream_waits++;
    if (event->captured && !of(stream).capture) of(stream).capture = event->captured;  // joins what is captured
    if (of(stream).capture) return cudaSuccess;
    asked(of(stream), {Act::wait, nullptr, nullptr, 0, 0, nullptr, event, event->recorded});
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
    Locked lock(everything);
    work(of(stream));
    call(data);
    return cudaSuccess;
}

// -- events -----------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = (cudaEvent_t) new Event;
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return cudaEventCreate(event); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // an act may still point to it
EXPORT cudaError_t cudaEventRecord(cudaEvent_t which, cudaStream_t stream) {
    Locked lock(everything);
    Event *event = (Event *)which;
    counts.events++;
    event->captured = of(stream).capture;
    if (event->captured) return cudaSuccess;
    event->stream = &of(stream);
    asked(of(stream), {Act::reach, nullptr, nullptr, 0, 0, nullptr, event, ++event->recorded});
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t which) {
    Locked lock(everything);
    Event *event = (Event *)which;
    if (event->captured || capture_forbids()) return cudaErrorStreamCaptureUnsupported;
    if (event->reached < event->recorded && ++looks > 1000) work(*event->stream, event, event->recorded);  // somebody polls
    if (event->reached < event->recorded) return cudaErrorNotReady;
    looks = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t which) {
    Locked lock(everything);
    Event *event = (Event *)which;
    if (event->captured || capture_forbids()) return cudaErrorStreamCaptureUnsupported;
    counts.waits_for_event++;
    if (event->reached < event->recorded) work(*event->stream, event, event->recorded);
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 0.05f;
    return cudaSuccess;
}

// -- copies and fills -------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    return copied(to, from, size, main_stream, true);
}
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    return copied(to, from, size, of(stream), false);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        copied((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, of(stream), false);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t stream) {
    return copied(to, from, size, of(stream), false);
}
EXPORT cudaError_t cudaMemset(void *to, int value, size_t size) { return filled(to, value, size, main_stream); }
EXPORT cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    return filled(to, value, size, of(stream));
}
EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    return (CUresult)copied((void *)to, from, size, of((cudaStream_t)stream), false);
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    return (CUresult)copied(to, (void *)from, size, of((cudaStream_t)stream), false);
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
    return (CUresult)filled((void *)to, value, size, of((cudaStream_t)stream));
}
EXPORT CUresult cuMemsetD32Async(CUdeviceptr to, unsigned, size_t count, CUstream stream) {
    return (CUresult)filled((void *)to, 0, 4 * count, of((cudaStream_t)stream));
}

// -- graphs -----------------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    Locked lock(everything);
    if (of(stream).capture) return cudaErrorIllegalState;
    mine = new Graph{{}, {}, mode, ++captures};
    of(stream).capture = mine;
    capturing.insert(mine);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    Locked lock(everything);
    Graph *made = of(stream).capture;
    if (!made) return cudaErrorIllegalState;
    for (Stream *each : streams)
        if (each->capture == made) each->capture = nullptr;
    capturing.erase(made);
    mine = nullptr;
    *graph = (cudaGraph_t)made;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    Locked lock(everything);
    *status = of(stream).capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                            unsigned long long *number, cudaGraph_t *graph,
                                            const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                            size_t *count) {
    Locked lock(everything);
    Graph *captured = of(stream).capture;
    *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (number) *number = captured ? captured->number : 0;
    if (graph) *graph = (cudaGraph_t)captured;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}
EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus *status, cuuint64_t *number, CUgraph *,
                                          const CUgraphNode **, size_t *) {
    Locked lock(everything);
    Graph *captured = of((cudaStream_t)stream).capture;
    *status = captured ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    if (number) *number = captured ? captured->number : 0;
    return CUDA_SUCCESS;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long) {
    *made = (cudaGraphExec_t) new Graph(*(Graph *)graph);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long) {
    return cudaGraphInstantiateWithFlags(made, graph, 0);
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (!nodes) *count = ((Graph *)graph)->kernels.size() + ((Graph *)graph)->acts.size();
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t which, cudaStream_t stream) {
    Locked lock(everything);
    Graph *graph = (Graph *)which;
    counts.graph_launches++;
    counts.kernels += graph->kernels.size();
    for (const char *name : graph->kernels) counts.by_kernel[name]++;
    for (const Act &act : graph->acts) asked(of(stream), act);
    return cudaSuccess;
}
