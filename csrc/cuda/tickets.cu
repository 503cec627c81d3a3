// Whose tickets are whose: see splits.h.
#include <array>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"
#include "splits.h"

namespace exllama::cuda {
namespace {

// Graphs of a model may be thousands, if it is captured by layers for many sizes. Streams have a quarter of the sets, so
// that streams which come and go leave some to graphs.
constexpr int kSets = 1024, kSetsOfStreams = kSets / 4;
constexpr int kMaxDevices = 64;

__device__ uint32_t all_tickets[kSets][kTickets];

// The ids of a capture, 0 if there is none, and of a stream.
using User = std::pair<unsigned long long, unsigned long long>;

// The sets of one device.
struct Sets {
  std::mutex mutex;
  std::map<User, int> of_user;
  std::array<bool, kSets> taken{};
  int of_streams = 0;
  uint32_t* first = nullptr;
};

// They are never destroyed: graphs may be, after the destructors of this library.
Sets& sets_of(int device) {
  static Sets* const sets = new Sets[kMaxDevices];
  return sets[device];
}

// What a graph has until it is destroyed.
struct Lease {
  Sets* sets;
  User user;
};

void end_lease(Lease* lease) {
  {
    const std::lock_guard lock(lease->sets->mutex);
    const auto found = lease->sets->of_user.find(lease->user);
    lease->sets->taken[found->second] = false;
    lease->sets->of_user.erase(found);
  }
  delete lease;
}

// Has a graph end a lease when it is destroyed. CUDA calls this on a thread of its own, where no call of CUDA is allowed.
bool give_to(cudaGraph_t graph, Lease* lease) {
  cudaUserObject_t object = nullptr;
  const cudaHostFn_t end = [](void* of_graph) { end_lease(static_cast<Lease*>(of_graph)); };
  if (cudaUserObjectCreate(&object, lease, end, 1, cudaUserObjectNoDestructorSync) != cudaSuccess) {
    end_lease(lease);
    return false;
  }
  if (cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove) == cudaSuccess) return true;
  cudaUserObjectRelease(object, 1);
  return false;
}

// The tickets of a user; null if there are none. A new user is `joined` to them.
uint32_t* tickets_of(Sets& sets, const User& user, bool& joined) {
  const std::lock_guard lock(sets.mutex);
  if (!sets.first) {
    // This may load the module. While a stream is captured that is allowed in this mode alone.
    void* address = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) return nullptr;
    const cudaError_t error = cudaGetSymbolAddress(&address, all_tickets);
    if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess || error != cudaSuccess) return nullptr;
    sets.first = static_cast<uint32_t*>(address);
  }
  auto found = sets.of_user.find(user);
  if (found == sets.of_user.end()) {
    const bool of_stream = user.first == 0;
    if (of_stream && sets.of_streams == kSetsOfStreams) return nullptr;
    int set = 0;
    while (set < kSets && sets.taken[set]) ++set;
    if (set == kSets) return nullptr;
    sets.taken[set] = joined = true;
    sets.of_streams += of_stream;
    found = sets.of_user.emplace(user, set).first;
  }
  return sets.first + found->second * kTickets;
}

uint32_t* try_tickets(cudaStream_t stream) {
  int device = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  User user{0, 0};
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices ||
      cudaStreamGetCaptureInfo(stream, &status, &user.first, &graph) != cudaSuccess ||
      cudaStreamGetId(stream, &user.second) != cudaSuccess) {
    return nullptr;
  }
  if (status == cudaStreamCaptureStatusNone) user.first = 0;
  bool joined = false;
  uint32_t* const tickets = tickets_of(sets_of(device), user, joined);
  if (!joined || status == cudaStreamCaptureStatusNone) return tickets;
  return give_to(graph, new Lease{&sets_of(device), user}) ? tickets : nullptr;
}

}  // namespace

uint32_t* tickets_for(Stream stream) {
  uint32_t* const tickets = try_tickets(to_cuda(stream));
  if (!tickets) cudaGetLastError();  // or the next launch would seem to have failed
  return tickets;
}

}  // namespace exllama::cuda
