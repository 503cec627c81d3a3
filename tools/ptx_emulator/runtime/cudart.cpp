// A CUDA runtime for nvcc's own host objects. Launches run translated kernels on the CPU at once, and every call is
// recorded. What would synchronize, allocate or copy with the host is refused, since none of it may happen in a captured
// graph.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>

#include "scheduler.h"

namespace emu {
namespace {

// Defaults of an sm_80; the Python driver sets what the architecture under test has.
std::map<std::string, s64> device = {
    {"cc_major", 8},
    {"cc_minor", 0},
    {"sm_count", 108},
    {"shared_per_block", 48 << 10},
    {"shared_per_block_optin", 163 << 10},
    {"shared_per_sm", 164 << 10},
    {"l2_bytes", 40 << 20},
    {"threads_per_sm", 2048},
    {"blocks_per_sm", 32},
    {"registers_per_sm", 65536},
    {"clock_khz", 1410000},
    {"memory_khz", 1593000},
    {"memory_bits", 5120},
    {"is_capturing", 0},
    {"capture", 0},
    {"no_graph_keeps_objects", 0},
    {"current_stream", 0},
};

struct Call {
    std::string kind;
    const Kernel* kernel = nullptr;
    Extent grid{}, block{};
    u32 dynamic_shared_bytes = 0;
    cudaStream_t stream = nullptr;
    int device = 0;
    bool overlaps = false;
    std::vector<unsigned char> parameters;
    u64 to = 0, from = 0, bytes = 0;
    int value = 0;
};

std::map<std::string, const Kernel*>& kernels() {
    static std::map<std::string, const Kernel*> all;
    return all;
}
std::map<std::string, ModuleVariable>& variables() {
    static std::map<std::string, ModuleVariable> all;
    return all;
}
// What they are when a context begins, and the names of their host variables.
std::map<std::string, std::vector<unsigned char>> initial_values;
std::map<const void*, std::string> name_of_variable;
// What a graph that is being captured keeps until it is destroyed.
struct UserObject {
    cudaHostFn_t destroy;
    void* pointer;
};
std::map<s64, std::vector<UserObject*>> kept_by_graph;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
// Handles of host functions and of __cudaGetKernel: a kernel is loaded when it is first asked for.
std::map<const void*, std::string> name_of_function;
int (*loader)(const char* name) = nullptr;
std::map<const Kernel*, s64> dynamic_shared_allowed;
std::vector<std::vector<Call>> recordings;
bool is_recording = false;
std::string registration_fault;  // found while the library was loaded: no launch can be trusted
std::string returned_text;
std::mutex one_at_a_time;

// All are alike: which one is current is all that tells them apart.
constexpr int kDevices = 2;
int current_device = 0;
// The devices that the process has made a context on, which takes memory there.
std::set<int> contexts;
// torch's current device, where it has put off making it the runtime's: that would make a context. Else -1.
int postponed_device = -1;

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
std::vector<Configuration> configurations;

cudaError_t refuse(const std::string& text) {
    if (fault_text.empty()) fault_text = text;
    return cudaErrorLaunchFailure;
}
cudaError_t status() { return fault_text.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

void refuse_library(const std::string& text) {
    registration_fault = text;
    refuse(text);
}

const Kernel* kernel_named(const std::string& name) {
    auto found = kernels().find(name);
    if (found == kernels().end() && loader && loader(name.c_str())) found = kernels().find(name);
    if (found != kernels().end()) return found->second;
    refuse("the kernel " + name + " could not be loaded");
    return nullptr;
}
const Kernel* kernel_at(const void* function) {
    const auto found = name_of_function.find(function);
    if (found != name_of_function.end()) return kernel_named(found->second);
    refuse("a function that is no kernel of this library");
    return nullptr;
}

cudaError_t check_launch(const Call& call) {
    const Extent& g = call.grid;
    const Extent& b = call.block;
    const Kernel& kernel = *call.kernel;
    std::ostringstream problem;
    const u64 threads = u64(b.x) * b.y * b.z;
    const auto allowed = dynamic_shared_allowed.find(&kernel);
    const s64 dynamic_limit = allowed != dynamic_shared_allowed.end()
                                  ? allowed->second
                                  : device["shared_per_block"] - kernel.static_shared_bytes;
    if (threads == 0 || threads > 1024 || b.x > 1024 || b.y > 1024 || b.z > 64)
        problem << "a block of " << b.x << " x " << b.y << " x " << b.z << " threads";
    else if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
        problem << "a grid of " << g.x << " x " << g.y << " x " << g.z << " blocks";
    else if (kernel.max_threads && threads > kernel.max_threads)
        problem << threads << " threads, where __launch_bounds__ allow " << kernel.max_threads;
    else if (s64(call.dynamic_shared_bytes) > dynamic_limit)
        problem << call.dynamic_shared_bytes << " dynamic shared bytes, where " << dynamic_limit << " are allowed";
    else if (kernel.static_shared_bytes > device["shared_per_block"])
        problem << kernel.static_shared_bytes << " static shared bytes";
    else return cudaSuccess;
    return refuse("launch of " + std::string(kernel.name) + " with " + problem.str());
}

cudaError_t perform(const Call& call) {
    if (!fault_text.empty()) return cudaErrorLaunchFailure;
    if (call.kind == "launch") {
        if (check_launch(call) != cudaSuccess) return cudaErrorLaunchFailure;
        run_grid(*call.kernel, call.grid, call.block, call.kernel->static_shared_bytes + call.dynamic_shared_bytes,
                 call.parameters.data(), call.overlaps);
    } else if (call.kind == "memset") {
        memset(reinterpret_cast<void*>(call.to), call.value, call.bytes);
    } else {
        memmove(reinterpret_cast<void*>(call.to), reinterpret_cast<const void*>(call.from), call.bytes);
    }
    return status();
}
cudaError_t enqueue(Call call) {
    call.device = current_device;
    const std::lock_guard lock(one_at_a_time);
    contexts.insert(current_device);
    if (is_recording) recordings.back().push_back(call);
    return perform(call);
}

cudaError_t launch(const Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream,
                   bool overlaps = false) {
    if (!kernel) return cudaErrorLaunchFailure;
    Call call;
    call.kind = "launch";
    call.kernel = kernel;
    call.grid = {grid.x, grid.y, grid.z};
    call.block = {block.x, block.y, block.z};
    call.dynamic_shared_bytes = static_cast<u32>(shared);
    call.stream = stream;
    call.overlaps = overlaps;
    for (u32 i = 0; i < kernel->parameter_count; ++i) {
        const Parameter& parameter = kernel->parameters[i];
        call.parameters.resize(parameter.offset + parameter.bytes);
        memcpy(call.parameters.data() + parameter.offset, arguments[i], parameter.bytes);
    }
    return enqueue(std::move(call));
}

std::string as_json(const std::vector<Call>& calls) {
    std::ostringstream out;
    out << "[";
    for (size_t i = 0; i < calls.size(); ++i) {
        const Call& c = calls[i];
        out << (i ? ", " : "") << "{\"call\": \"" << c.kind << "\", \"stream\": " << reinterpret_cast<u64>(c.stream)
            << ", \"device\": " << c.device;
        if (c.kind == "launch") {
            out << ", \"kernel\": \"" << c.kernel->name << "\", \"grid\": [" << c.grid.x << ", " << c.grid.y << ", "
                << c.grid.z << "], \"block\": [" << c.block.x << ", " << c.block.y << ", " << c.block.z
                << "], \"shared_bytes\": " << c.kernel->static_shared_bytes + c.dynamic_shared_bytes
                << ", \"overlaps\": " << (c.overlaps ? "true" : "false");
        } else {
            out << ", \"to\": " << c.to << ", \"bytes\": " << c.bytes;
            if (c.kind == "memset") out << ", \"value\": " << c.value;
            else out << ", \"from\": " << c.from;
        }
        out << "}";
    }
    return out.str() + "]";
}

}  // namespace

void add_kernel(const Kernel* kernel) {
    if (!kernels().emplace(kernel->name, kernel).second)
        refuse_library("two kernels are named " + std::string(kernel->name));
}
void add_variable(const ModuleVariable& variable) {
    if (!variables().emplace(variable.name, variable).second)
        refuse_library("two variables are named " + std::string(variable.name));
    initial_values[variable.name].assign(variable.address, variable.address + variable.bytes);
    const u64 begin = reinterpret_cast<u64>(variable.address);
    variable_ranges.push_back({begin, begin + variable.bytes});
}

}  // namespace emu

using namespace emu;

// --- what nvcc's stubs call
extern "C" {
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    name_of_function[host] = name;
}
void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t, int, int) {
    name_of_variable[host] = name;
    if (!variables().count(name)) refuse_library("the variable " + std::string(name) + " was not translated");
}
void __cudaRegisterManagedVar(void**, void**, char*, const char* name, int, size_t, int, int) {
    refuse_library("managed variable " + std::string(name));
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    const Configuration last = configurations.back();
    configurations.pop_back();
    *grid = last.grid;
    *block = last.block;
    *shared = last.shared;
    *static_cast<cudaStream_t*>(stream) = last.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
    return launch(kernel_at(kernel), grid, block, arguments, shared, stream);
}

// --- what may be called while a graph is captured
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
    return launch(kernel_at(function), grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    bool overlaps = false;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config->attrs[i];
        if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            overlaps = attribute.val.programmaticStreamSerializationAllowed != 0;
        else if (attribute.id != cudaLaunchAttributeIgnore)
            return refuse("cudaLaunchKernelEx with launch attribute " + std::to_string(attribute.id));
    }
    return launch(kernel_at(function), config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                  config->stream, overlaps);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    Call call;
    call.kind = "memset";
    call.to = reinterpret_cast<u64>(to);
    call.value = value;
    call.bytes = bytes;
    call.stream = stream;
    return enqueue(std::move(call));
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind != cudaMemcpyDeviceToDevice) return refuse("cudaMemcpyAsync to or from the host");
    Call call;
    call.kind = "memcpy";
    call.to = reinterpret_cast<u64>(to);
    call.from = reinterpret_cast<u64>(from);
    call.bytes = bytes;
    call.stream = stream;
    return enqueue(std::move(call));
}
cudaError_t cudaGetLastError() { return status(); }
cudaError_t cudaPeekAtLastError() { return status(); }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : fault_text.c_str(); }
const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorLaunchFailure";
}
cudaError_t cudaGetDevice(int* index) {
    *index = current_device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = kDevices;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index >= kDevices) return refuse("cudaSetDevice of a device that is not there");
    current_device = index;
    contexts.insert(index);
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* capturing) {
    *capturing = device["is_capturing"] ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
// A capture is a graph, which has the number of the capture.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* capturing, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
    *capturing = device["is_capturing"] ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    *id = static_cast<unsigned long long>(device["capture"]);
    *graph = device["is_capturing"] ? reinterpret_cast<cudaGraph_t>(device["capture"]) : nullptr;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, capture_mode);
    return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
    *id = reinterpret_cast<u64>(stream);
    return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy, unsigned, unsigned) {
    *object = reinterpret_cast<cudaUserObject_t>(new UserObject{destroy, pointer});
    return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
    auto* released = reinterpret_cast<UserObject*>(object);
    released->destroy(released->pointer);
    delete released;
    return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned flags) {
    if (flags != cudaGraphUserObjectMove) return refuse("cudaGraphRetainUserObject of an object that is not moved");
    if (device["no_graph_keeps_objects"]) return cudaErrorNotSupported;
    kept_by_graph[reinterpret_cast<s64>(graph)].push_back(reinterpret_cast<UserObject*>(object));
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
    if (device["is_capturing"] && capture_mode != cudaStreamCaptureModeRelaxed)
        return refuse("cudaGetSymbolAddress: not allowed while a graph is captured, but in relaxed mode");
    const auto found = name_of_variable.find(symbol);
    if (found == name_of_variable.end()) return cudaErrorInvalidSymbol;
    *address = variables().at(found->second).address;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    const Kernel* kernel = kernel_at(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
        return refuse("cudaFuncSetAttribute of attribute " + std::to_string(attribute));
    if (value < 0 || value + s64(kernel->static_shared_bytes) > device["shared_per_block_optin"]) {
        return refuse(std::to_string(value) + " dynamic shared bytes for " + kernel->name + ", where the device has " +
                      std::to_string(device["shared_per_block_optin"]));
    }
    dynamic_shared_allowed[kernel] = value;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
    const Kernel* kernel = kernel_at(function);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    *attributes = {};
    attributes->sharedSizeBytes = kernel->static_shared_bytes;
    attributes->maxThreadsPerBlock = kernel->max_threads ? kernel->max_threads : 1024;
    attributes->ptxVersion = kernel->ptx_version;
    attributes->binaryVersion = static_cast<int>(10 * device["cc_major"] + device["cc_minor"]);
    const auto allowed = dynamic_shared_allowed.find(kernel);
    attributes->maxDynamicSharedSizeBytes = static_cast<int>(
        allowed != dynamic_shared_allowed.end() ? allowed->second
                                                : device["shared_per_block"] - kernel->static_shared_bytes);
    return cudaSuccess;
}
// By threads and shared memory alone: how many registers a kernel takes is known to ptxas only.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
    const Kernel* kernel = kernel_at(function);
    if (!kernel || threads <= 0) return cudaErrorInvalidValue;
    const s64 by_shared = shared + kernel->static_shared_bytes
                              ? device["shared_per_sm"] / s64(shared + kernel->static_shared_bytes)
                              : device["blocks_per_sm"];
    *blocks = static_cast<int>(std::min({device["threads_per_sm"] / threads, by_shared, device["blocks_per_sm"]}));
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    static const std::map<int, const char*> names = {
        {cudaDevAttrComputeCapabilityMajor, "cc_major"},
        {cudaDevAttrComputeCapabilityMinor, "cc_minor"},
        {cudaDevAttrMultiProcessorCount, "sm_count"},
        {cudaDevAttrMaxSharedMemoryPerBlock, "shared_per_block"},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared_per_block_optin"},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, "shared_per_sm"},
        {cudaDevAttrL2CacheSize, "l2_bytes"},
        {cudaDevAttrMaxThreadsPerMultiProcessor, "threads_per_sm"},
        {cudaDevAttrMaxBlocksPerMultiprocessor, "blocks_per_sm"},
        {cudaDevAttrMaxRegistersPerMultiprocessor, "registers_per_sm"},
        {cudaDevAttrClockRate, "clock_khz"},
        {cudaDevAttrMemoryClockRate, "memory_khz"},
        {cudaDevAttrGlobalMemoryBusWidth, "memory_bits"},
    };
    if (attribute == cudaDevAttrWarpSize) *value = kWarp;
    else if (attribute == cudaDevAttrMaxThreadsPerBlock) *value = 1024;
    else if (const auto found = names.find(attribute); found != names.end())
        *value = static_cast<int>(device[found->second]);
    else return refuse("cudaDeviceGetAttribute of attribute " + std::to_string(attribute));
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {};
    snprintf(properties->name, sizeof properties->name, "emulated sm_%lld%lld",
             static_cast<long long>(device["cc_major"]), static_cast<long long>(device["cc_minor"]));
    properties->major = static_cast<int>(device["cc_major"]);
    properties->minor = static_cast<int>(device["cc_minor"]);
    properties->multiProcessorCount = static_cast<int>(device["sm_count"]);
    properties->sharedMemPerBlock = device["shared_per_block"];
    properties->sharedMemPerBlockOptin = device["shared_per_block_optin"];
    properties->sharedMemPerMultiprocessor = device["shared_per_sm"];
    properties->l2CacheSize = static_cast<int>(device["l2_bytes"]);
    properties->maxThreadsPerMultiProcessor = static_cast<int>(device["threads_per_sm"]);
    properties->maxBlocksPerMultiProcessor = static_cast<int>(device["blocks_per_sm"]);
    properties->regsPerMultiprocessor = static_cast<int>(device["registers_per_sm"]);
    properties->maxThreadsPerBlock = 1024;
    properties->warpSize = kWarp;
    return cudaSuccess;
}
// Torch's accessor of its current stream, which exists in CUDA builds of torch only.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = reinterpret_cast<void*>(device["current_stream"]);
    return 0;
}
// Torch's guard of the current device. It goes back to a device that has a context, and puts off the others.
int32_t aoti_torch_create_device_guard(int32_t index, void** guard) {
    const int before = postponed_device >= 0 ? postponed_device : current_device;
    postponed_device = -1;
    *guard = new int(before);
    return index == current_device || cudaSetDevice(index) == cudaSuccess ? 0 : 1;
}
int32_t aoti_torch_delete_device_guard(void* guard) {
    const std::unique_ptr<int> before(static_cast<int*>(guard));
    if (contexts.count(*before)) cudaSetDevice(*before);
    else if (*before != current_device) postponed_device = *before;
    return 0;
}

// --- what may not
#define EMU_REFUSE(function, ...) \
    cudaError_t function(__VA_ARGS__) { return refuse(#function ": not allowed while a graph is captured"); }
EMU_REFUSE(cudaMalloc, void**, size_t)
EMU_REFUSE(cudaMallocAsync, void**, size_t, cudaStream_t)
EMU_REFUSE(cudaMallocHost, void**, size_t)
EMU_REFUSE(cudaMallocManaged, void**, size_t, unsigned)
EMU_REFUSE(cudaFree, void*)
EMU_REFUSE(cudaFreeAsync, void*, cudaStream_t)
EMU_REFUSE(cudaFreeHost, void*)
EMU_REFUSE(cudaMemcpy, void*, const void*, size_t, cudaMemcpyKind)
EMU_REFUSE(cudaMemcpyToSymbol, const void*, const void*, size_t, size_t, cudaMemcpyKind)
EMU_REFUSE(cudaMemcpyFromSymbol, void*, const void*, size_t, size_t, cudaMemcpyKind)
EMU_REFUSE(cudaMemset, void*, int, size_t)
EMU_REFUSE(cudaDeviceSynchronize)
EMU_REFUSE(cudaStreamSynchronize, cudaStream_t)
EMU_REFUSE(cudaStreamQuery, cudaStream_t)
EMU_REFUSE(cudaStreamCreate, cudaStream_t*)
EMU_REFUSE(cudaStreamCreateWithFlags, cudaStream_t*, unsigned)
EMU_REFUSE(cudaStreamDestroy, cudaStream_t)
EMU_REFUSE(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
EMU_REFUSE(cudaEventCreate, cudaEvent_t*)
EMU_REFUSE(cudaEventCreateWithFlags, cudaEvent_t*, unsigned)
EMU_REFUSE(cudaEventRecord, cudaEvent_t, cudaStream_t)
EMU_REFUSE(cudaEventSynchronize, cudaEvent_t)
EMU_REFUSE(cudaEventQuery, cudaEvent_t)
EMU_REFUSE(cudaEventDestroy, cudaEvent_t)
#undef EMU_REFUSE
}

// --- what the Python driver calls
extern "C" {
int emu_set(const char* name, long long value) {
    const std::string what = name;
    if (what == "order") settings.order = static_cast<Order>(value);
    else if (what == "seed") settings.seed = static_cast<u64>(value);
    else if (what == "only_last_block") settings.only_last_block = value != 0;
    else if (what == "mma_truncates") settings.mma_truncates = value != 0;
    else if (what == "mma_flushes_subnormals") settings.mma_flushes_subnormals = value != 0;
    else if (what == "check_ranges") check_ranges = value != 0;
    else if (device.count(what)) device[what] = value;
    else return 0;
    return 1;
}
// Back to what a freshly loaded library has, but for the recordings; device properties are the caller's.
void emu_reset() {
    settings = {};
    check_ranges = false;
    dynamic_shared_allowed.clear();
    current_device = 0;
    postponed_device = -1;
    contexts.clear();
    fault_text = registration_fault;
}
// As a host thread that has not touched its current device yet.
void emu_begin_on(int index) {
    current_device = index;
    postponed_device = -1;
    contexts.clear();
}
int emu_torch_device() { return postponed_device >= 0 ? postponed_device : current_device; }
int emu_has_context(int index) { return contexts.count(index) != 0; }
void emu_set_ranges(const u64* begin_and_end, u64 count) {
    ranges.clear();
    for (u64 i = 0; i < count; ++i) ranges.push_back({begin_and_end[2 * i], begin_and_end[2 * i + 1]});
}
const char* emu_fault() { return fault_text.c_str(); }
// A fault ends a context. In the next one the variables of a module are as they were in the beginning.
void emu_clear_fault() {
    if (!fault_text.empty()) {
        for (const auto& [name, bytes] : initial_values)
            memcpy(variables().at(name).address, bytes.data(), bytes.size());
    }
    fault_text.clear();
}
// What a graph has kept is destroyed with it.
void emu_destroy_graph(long long capture) {
    for (UserObject* object : kept_by_graph[capture])
        cudaUserObjectRelease(reinterpret_cast<cudaUserObject_t>(object), 1);
    kept_by_graph.erase(capture);
}
void emu_set_loader(int (*load)(const char* name)) { loader = load; }
void emu_record_begin() {
    recordings.emplace_back();
    is_recording = true;
}
const char* emu_record_end() {
    is_recording = false;
    returned_text = as_json(recordings.back());
    return returned_text.c_str();
}
long long emu_record_count() { return static_cast<long long>(recordings.size()); }
void emu_replay(long long recording) {
    const std::lock_guard lock(one_at_a_time);
    for (const Call& call : recordings.at(static_cast<size_t>(recording))) perform(call);
}
void emu_launch(const char* name, const u32* grid, const u32* block, void** arguments, u32 argument_count, u64 shared,
                u64 stream) {
    const Kernel* kernel = kernel_named(name);
    if (!kernel) return;
    if (kernel->parameter_count != argument_count) {
        refuse(std::string(name) + " takes " + std::to_string(kernel->parameter_count) + " arguments, got " +
               std::to_string(argument_count));
        return;
    }
    launch(kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, arguments, shared,
           reinterpret_cast<cudaStream_t>(stream));
}
}
