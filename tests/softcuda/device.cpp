// The software device: replacements for the C functions of cupy_backends.cuda.api.{runtime,driver}.
//
// CuPy's Cython modules copy C function pointers out of those two modules' __pyx_capi__ tables when
// they are imported. install() exchanges the pointers before that, so that the unmodified wheel (its
// ufuncs, dtypes, indexing, code generation, memory pool) works on host memory, with kernels that
// are host shared objects. Functions that are not replaced reach the real cudart, and raise.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

typedef intptr_t Address; // also the handles of streams, events, graphs, modules and functions

// ---- errors -------------------------------------------------------------------------------------
// A CUDA error is CuPy's own exception, so that CuPy reacts as it does on a GPU: its memory pool,
// for one, frees its blocks and tries again when it is told cudaErrorMemoryAllocation.
enum Status { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_HANDLE = 400,
              NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_IMPLICIT = 906 };
static PyObject* error_class = nullptr; // cupy_backends.cuda.api.runtime.CUDARuntimeError

static PyObject* fail(Status status) {
  PyObject* error = PyObject_CallFunction(error_class, "i", (int)status);
  if (error) PyErr_SetObject(error_class, error);
  Py_XDECREF(error);
  return nullptr;
}
// What a GPU would not notice, or not name, is said in words.
static PyObject* complain(const char* what) {
  return PyErr_Format(PyExc_RuntimeError, "softcuda: %s", what);
}
static PyObject* none() { Py_RETURN_NONE; }
static PyObject* none_if(bool fine) { return fine ? none() : nullptr; }

// ---- options and counters -----------------------------------------------------------------------
static struct Options {
  int guard = 0;        // an inaccessible page on both sides of every allocation
  int deferred = 0;     // work of a stream runs when something waits for it, not before
  int trace = 0;        // keep the names of all launches, copies and waits in order
  int sched = 0;        // order of blocks and threads: 0 as numbered, 1 reversed, 2 random
  int poison = 1;       // new memory is full of 0xFF, which is NaN
  int strict = 1;       // a barrier after a thread of the block has returned is an error
  int touch = 0;        // count the distinct 32-byte sectors that each launch touches (ptx only)
  Py_ssize_t memory = (Py_ssize_t)80 << 30; // bytes of the device
} options;
static int cc_major = 8, cc_minor = 0;

static struct Counters {
  long launches = 0, h2d = 0, d2h = 0, d2d = 0, memsets = 0, syncs = 0, mallocs = 0, frees = 0;
  long graph_launches = 0;
  long long h2d_bytes = 0, d2h_bytes = 0, d2d_bytes = 0;
  long long read_bytes = 0, written_bytes = 0; // asked for by kernels (ptx only)
} count;
static long long live_bytes = 0, peak_bytes = 0;
static std::map<std::string, long> launches_of, unchecked_of;
static std::map<std::string, long long> touched_by;
static std::vector<std::string> traced;

static void note(const std::string& what) {
  if (options.trace) traced.push_back(what);
}
static void note_launch(const std::string& name) {
  count.launches++;
  launches_of[name]++;
  note(name);
}

// ---- memory -------------------------------------------------------------------------------------
static const size_t PAGE = 4096, SECTOR = 32;
struct Allocation {
  size_t size;
  void* base;
  size_t mapped; // bytes of its own mapping, 0 for the heap
  bool host;     // pinned host memory, which a device may read and write too
  std::vector<uint32_t> touched_in; // by sector: the last launch that touched it
};
typedef std::map<Address, Allocation> Allocations;
static Allocations allocations;
static Allocations::iterator last_hit = allocations.end();
static uint32_t launch_number = 0;
static long long* touched_bytes = nullptr; // of the kernel that runs

// The allocation that holds all of [start, start + size), or end().
static Allocations::iterator holder(Address start, size_t size) {
  auto after = allocations.upper_bound(start);
  if (after == allocations.begin()) return allocations.end();
  auto found = std::prev(after);
  return (size_t)(start - found->first) + size <= found->second.size ? found : allocations.end();
}
static bool on_device(Address start, size_t size) { return holder(start, size) != allocations.end(); }

static void mark_touched(Address first, Allocation& allocation, Address start, int size) {
  auto& touched_in = allocation.touched_in;
  if (touched_in.empty()) touched_in.resize(allocation.size / SECTOR + 2);
  size_t origin = first / SECTOR, end = (start + size - 1) / SECTOR - origin;
  for (size_t sector = start / SECTOR - origin; sector <= end; sector++)
    if (touched_in[sector] != launch_number) {
      touched_in[sector] = launch_number;
      *touched_bytes += SECTOR;
    }
}
// Called by translated PTX for every access; 0 if the address is not the kernel's to use.
static int check_access(uint64_t address, int size, int write) {
  Address start = (Address)address;
  auto found = last_hit;
  if (found == allocations.end() || start < found->first ||
      (size_t)(start - found->first) + size > found->second.size) {
    found = holder(start, size);
    if (found == allocations.end()) return 0;
    last_hit = found;
  }
  (write ? count.written_bytes : count.read_bytes) += size;
  if (options.touch && !found->second.host) mark_touched(found->first, found->second, start, size);
  return 1;
}

// With guard, an array ends where an inaccessible page begins (but for 16-byte alignment).
static Address map_guarded(size_t size, Allocation& allocation) {
  size_t whole = (size + PAGE - 1) / PAGE * PAGE;
  allocation.mapped = whole + 2 * PAGE;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* base = (char*)mmap(nullptr, allocation.mapped, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (base == MAP_FAILED) return 0;
  mprotect(base, PAGE, PROT_NONE);
  mprotect(base + PAGE + whole, PAGE, PROT_NONE);
  allocation.base = base;
  return (Address)base + PAGE + ((whole - size) & ~(size_t)15);
}
static Address allocate(size_t size, bool host) {
  if (!size) return 0;
  Allocation allocation{size, nullptr, 0, host, {}};
  bool room = host || live_bytes + (long long)size <= options.memory;
  Address start = 0;
  if (room && options.guard && !host) {
    start = map_guarded(size, allocation);
  } else if (room) {
    allocation.base = aligned_alloc(512, (size + 511) / 512 * 512);
    start = (Address)allocation.base;
  }
  if (!start) {
    fail(OUT_OF_MEMORY);
    return 0;
  }
  if (options.poison && !host) memset((void*)start, 0xFF, size);
  allocations[start] = allocation;
  if (!host) {
    count.mallocs++;
    live_bytes += size;
    if (live_bytes > peak_bytes) peak_bytes = live_bytes;
  }
  return start;
}
static bool run_everything();
static PyObject* release(Address start) {
  if (!start) return none();
  auto found = allocations.find(start);
  if (found == allocations.end()) return complain("free of a pointer that is not allocated");
  Allocation& allocation = found->second;
  if (!allocation.host) {
    count.frees++;
    live_bytes -= allocation.size;
    if (!run_everything()) return nullptr; // cudaFree waits for the device
  }
  if (allocation.mapped) munmap(allocation.base, allocation.mapped);
  else free(allocation.base);
  allocations.erase(found);
  last_hit = allocations.end();
  return none();
}

// ---- kernels ------------------------------------------------------------------------------------
// The layout of Grid is emu::Cfg's; see EMU_EXPORT in emulator/cudaemu.h for the entry points.
struct Grid { unsigned gx, gy, gz, bx, by, bz; size_t shared; };
struct Kernel {
  std::string name;
  int (*run)(const Grid*, void**);
  const char* (*error)();
  void (*set_options)(int, unsigned long long, int);
  std::vector<int> parameter_sizes;
  bool checked; // it was translated from PTX
};
struct Module {
  void* library;
  bool checked;
  std::map<std::string, Kernel*> kernels;
};
static const unsigned long long SEED = 88172645463325252ull; // of the random schedule

static bool run_kernel(Kernel& kernel, Grid& grid, std::vector<std::string>& arguments) {
  std::vector<void*> pointers;
  for (auto& bytes : arguments) pointers.push_back(&bytes[0]);
  pointers.push_back(nullptr);
  // CuPy's own reductions return threads before their barriers, which is well defined for them.
  bool strict = options.strict && kernel.name.compare(0, 5, "cupy_") != 0;
  kernel.set_options(options.sched, SEED, strict);
  launch_number++;
  if (!kernel.checked) unchecked_of[kernel.name]++;
  touched_bytes = &touched_by[kernel.name];
  if (!kernel.run(&grid, pointers.data())) return true;
  PyErr_Format(PyExc_RuntimeError, "softcuda: kernel %s: %s", kernel.name.c_str(), kernel.error());
  return false;
}

// ---- streams and graphs -------------------------------------------------------------------------
enum Kind { KERNEL, COPY, SET, CALL, RECORD, WAIT };
struct Stream;
struct Event { // "all that was in this stream when I was recorded"
  Stream* stream = nullptr;
  size_t ticket = 0;
};
struct Work {
  Kind kind;
  Kernel* kernel = nullptr;
  Grid grid{};
  std::vector<std::string> arguments;
  Address to = 0, from = 0;
  size_t size = 0;
  int value = 0;
  PyObject* call = nullptr;
  Event until{};
};
struct Stream {
  bool capturing = false;
  bool blocking = true; // waits for the default stream, and that for it
  std::vector<Work> captured;
  std::deque<Work> queue;
  size_t pushed = 0, done = 0;
};
struct Graph { std::vector<Work> works; };
static Stream default_stream;
static std::map<Address, Stream*> streams;

static Stream* stream_of(Address handle) {
  if (handle <= 2 && handle >= 0) return &default_stream; // null, legacy and per-thread default
  auto found = streams.find(handle);
  if (found != streams.end()) return found->second;
  fail(INVALID_HANDLE);
  return nullptr;
}
static bool run_until(Stream* stream, size_t ticket);
static bool run(Work& work) {
  switch (work.kind) {
  case KERNEL: return run_kernel(*work.kernel, work.grid, work.arguments);
  case COPY: memmove((void*)work.to, (void*)work.from, work.size); return true;
  case SET: memset((void*)work.to, work.value, work.size); return true;
  case CALL: {
    PyObject* result = PyObject_CallNoArgs(work.call);
    Py_DECREF(work.call);
    Py_XDECREF(result);
    return result != nullptr;
  }
  case RECORD: return true;
  case WAIT: return !work.until.stream || run_until(work.until.stream, work.until.ticket);
  }
  return true;
}
static bool run_until(Stream* stream, size_t ticket) {
  while (stream->done < ticket && !stream->queue.empty()) {
    Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->done++;
    if (!run(work)) return false;
  }
  return true;
}
static bool run_all(Stream* stream) { return run_until(stream, (size_t)-1); }
static bool run_everything() {
  for (auto& entry : streams)
    if (!run_all(entry.second)) return false;
  return run_all(&default_stream);
}
// What the default stream waits for: itself, and every stream that is not created non-blocking.
static bool run_blocking_streams() {
  for (auto& entry : streams)
    if (entry.second->blocking && !run_all(entry.second)) return false;
  return run_all(&default_stream);
}
static void push(Stream* stream, Work&& work) {
  stream->queue.push_back(std::move(work));
  stream->pushed++;
}
static void push_wait(Stream* stream, Stream* other) {
  if (other->queue.empty()) return;
  Work wait{WAIT};
  wait.until = Event{other, other->pushed};
  push(stream, std::move(wait));
}
// The implicit waits between the default stream and the blocking ones.
static void push_implicit_waits(Stream* stream) {
  if (stream == &default_stream) {
    for (auto& entry : streams)
      if (entry.second->blocking) push_wait(stream, entry.second);
  } else if (stream->blocking) {
    push_wait(stream, &default_stream);
  }
}
static bool submit(Address handle, Work&& work) {
  Stream* stream = stream_of(handle);
  if (!stream) return false;
  if (stream->capturing) {
    stream->captured.push_back(std::move(work));
    return true;
  }
  if (!options.deferred) return run(work);
  push_implicit_waits(stream);
  push(stream, std::move(work));
  return true;
}

// ---- runtime: device ----------------------------------------------------------------------------
// The last parameter of these functions is Cython's __pyx_skip_dispatch.
static PyObject* device_properties = nullptr; // a Python function of the device's number

static PyObject* r_ensure_context() { return none(); }
static int r_getDevice(int) { return 0; }
static int r_getDeviceCount(int) { return 1; }
static PyObject* r_setDevice(int device, int) { return device ? fail(INVALID_DEVICE) : none(); }
static int r_deviceGetAttribute(int attribute, int, int) { // numbered as cudaDeviceAttr is
  switch (attribute) {
  case 1: case 2: case 3: return 1024;  // threads of a block: all, x, y
  case 4: return 64;                    // z
  case 5: return 2147483647;            // blocks of a grid: x
  case 6: case 7: return 65535;         // y, z
  case 8: return 49152;                 // shared memory of a block
  case 10: return 32;                   // warp
  case 16: return 108;                  // multiprocessors
  case 38: return 41943040;             // L2 cache
  case 39: return 2048;                 // threads of a multiprocessor
  case 41: case 83: case 95: case 115: return 1; // unified addressing, managed, cooperative, pools
  case 75: return cc_major;
  case 76: return cc_minor;
  case 81: return 167936;               // shared memory of a multiprocessor
  case 97: return 166912;               // shared memory of a block that opts in
  default: return 0;
  }
}
static PyObject* r_getDeviceProperties(int device, int) {
  return PyObject_CallFunction(device_properties, "i", device);
}
static int r_driverGetVersion(int) { return 13020; }
static PyObject* r_deviceSynchronize(int) {
  count.syncs++;
  note("deviceSynchronize");
  return none_if(run_everything());
}
static int r_deviceCanAccessPeer(int, int, int) { return 0; }

// ---- runtime: memory ----------------------------------------------------------------------------
static Address r_malloc(size_t size, int) { return allocate(size, false); }
static Address r_mallocAsync(size_t size, Address, int) { return allocate(size, false); }
static PyObject* r_free(Address start, int) { return release(start); }
static PyObject* r_freeAsync(Address start, Address, int) { return release(start); }
static Address r_hostAlloc(size_t size, unsigned, int) { return allocate(size, true); }
static PyObject* r_freeHost(Address start, int) { return release(start); }
static PyObject* r_memGetInfo(int) {
  Py_ssize_t free_bytes = options.memory - (Py_ssize_t)live_bytes;
  return Py_BuildValue("(nn)", free_bytes > 0 ? free_bytes : 0, options.memory);
}

enum Direction { H2H = 0, H2D = 1, D2H = 2, D2D = 3, BY_ADDRESS = 4 }; // as cudaMemcpyKind
static bool check_copy(Address to, Address from, size_t size, int& direction) {
  if (direction == BY_ADDRESS) direction = (on_device(from, 1) ? 2 : 0) + (on_device(to, 1) ? 1 : 0);
  bool to_device = on_device(to, size), from_device = on_device(from, size);
  if ((direction == H2D || direction == D2D) && !to_device) {
    complain("memcpy destination is not (fully) inside a device allocation");
    return false;
  }
  if ((direction == D2H || direction == D2D) && !from_device) {
    complain("memcpy source is not (fully) inside a device allocation");
    return false;
  }
  return true;
}
static void count_copy(int direction, size_t size) {
  if (direction == H2D) count.h2d++, count.h2d_bytes += size;
  if (direction == D2H) count.d2h++, count.d2h_bytes += size;
  if (direction == D2D) count.d2d++, count.d2d_bytes += size;
  static const char* const names[] = {"memcpyH2H", "memcpyH2D", "memcpyD2H", "memcpyD2D"};
  note(names[direction]);
}
static PyObject* r_memcpy(Address to, Address from, size_t size, int direction, int) {
  if (!check_copy(to, from, size, direction)) return nullptr;
  count_copy(direction, size);
  count.syncs++;
  if (!run_blocking_streams()) return nullptr;
  memmove((void*)to, (void*)from, size);
  return none();
}
static PyObject* r_memcpyAsync(Address to, Address from, size_t size, int direction,
                               Address handle, int) {
  if (!check_copy(to, from, size, direction)) return nullptr;
  Stream* stream = stream_of(handle);
  if (!stream) return nullptr;
  count_copy(direction, size);
  // Ordinary (pageable) host memory is copied to a staging buffer before the call returns.
  bool staged = direction == H2D && !on_device(from, size) && !stream->capturing;
  if (staged && options.deferred && !run_all(stream)) return nullptr;
  Work copy{COPY};
  copy.to = to, copy.from = from, copy.size = size;
  return none_if(staged ? run(copy) : submit(handle, std::move(copy)));
}
static PyObject* r_memsetAsync(Address to, int value, size_t size, Address handle, int) {
  if (!on_device(to, size)) return complain("memset is not (fully) inside a device allocation");
  count.memsets++;
  note("memset");
  Work set{SET};
  set.to = to, set.value = value, set.size = size;
  return none_if(submit(handle, std::move(set)));
}
static PyObject* r_memset(Address to, int value, size_t size, int) {
  return r_memsetAsync(to, value, size, 0, 0);
}
static PyObject* pointer_attributes = nullptr; // the class PointerAttributes of the runtime module
static int r_pointerGetMemoryType(Address, int) { return 2; }
static PyObject* r_pointerGetAttributes(Address pointer, int) {
  auto found = holder(pointer, 1);
  int type = found == allocations.end() ? 0 : found->second.host ? 1 : 2;
  Py_ssize_t host_pointer = type == 2 ? 0 : pointer;
  return PyObject_CallFunction(pointer_attributes, "nnni", (Py_ssize_t)0, (Py_ssize_t)pointer,
                               host_pointer, type);
}

// ---- runtime: streams, events, graphs -----------------------------------------------------------
static Address r_streamCreateWithFlags(unsigned flags, int) {
  Stream* stream = new Stream;
  stream->blocking = !(flags & 1);
  streams[(Address)stream] = stream;
  return (Address)stream;
}
static Address r_streamCreate(int) { return r_streamCreateWithFlags(0, 0); }
static Address r_streamCreateWithPriority(unsigned flags, int, int) {
  return r_streamCreateWithFlags(flags, 0);
}
static PyObject* r_streamDestroy(Address handle, int) {
  auto found = streams.find(handle);
  if (found == streams.end()) return fail(INVALID_HANDLE);
  if (!run_everything()) return nullptr; // events may wait for it
  delete found->second;
  streams.erase(found);
  return none();
}
static PyObject* r_streamSynchronize(Address handle, int) {
  Stream* stream = stream_of(handle);
  if (!stream) return nullptr;
  if (stream->capturing) return fail(CAPTURE_UNSUPPORTED);
  count.syncs++;
  note("streamSynchronize");
  return none_if(stream == &default_stream ? run_blocking_streams() : run_all(stream));
}
static PyObject* r_streamQuery(Address, int) { return none(); }
static int r_streamIsCapturing(Address handle, int) {
  Stream* stream = stream_of(handle);
  return stream ? stream->capturing : 0;
}
static PyObject* r_streamBeginCapture(Address handle, int, void*) {
  Stream* stream = stream_of(handle);
  if (!stream) return nullptr;
  if (stream == &default_stream) return fail(CAPTURE_IMPLICIT);
  if (stream->capturing) return fail(INVALID_VALUE);
  if (!run_all(stream)) return nullptr;
  stream->capturing = true;
  stream->captured.clear();
  return none();
}
static Address r_streamEndCapture(Address handle, int) {
  Stream* stream = stream_of(handle);
  if (!stream) return 0;
  if (!stream->capturing) {
    fail(INVALID_VALUE);
    return 0;
  }
  stream->capturing = false;
  Graph* graph = new Graph;
  graph->works.swap(stream->captured);
  return (Address)graph;
}
static PyObject* r_streamWaitEvent(Address handle, Address event, int, void*) {
  Work wait{WAIT};
  if (event) wait.until = *(Event*)event;
  return none_if(submit(handle, std::move(wait)));
}
static unsigned r_streamGetFlags(Address handle, int) {
  Stream* stream = stream_of(handle);
  return stream && !stream->blocking;
}
static int r_streamGetPriority(Address, int) { return 0; }
static Address r_eventCreate(int) { return (Address) new Event; }
static Address r_eventCreateWithFlags(unsigned, int) { return (Address) new Event; }
static PyObject* r_eventDestroy(Address event, int) {
  delete (Event*)event;
  return none();
}
static PyObject* r_eventRecord(Address event, Address handle, int) {
  Stream* stream = stream_of(handle);
  if (!stream || !submit(handle, Work{RECORD})) return nullptr;
  *(Event*)event = Event{stream, stream->pushed};
  return none();
}
static PyObject* r_eventSynchronize(Address handle, int) {
  count.syncs++;
  note("eventSynchronize");
  Event* event = (Event*)handle;
  return none_if(!event->stream || run_until(event->stream, event->ticket));
}
static PyObject* r_eventQuery(Address, int) { return none(); }
static float r_eventElapsedTime(Address, Address, int) { return 0.001f; } // no clock is modelled
static Address r_graphInstantiate(Address graph, int) { return (Address) new Graph(*(Graph*)graph); }
static PyObject* r_graphLaunch(Address handle, Address stream, int) {
  Graph* graph = (Graph*)handle;
  count.graph_launches++;
  note("graphLaunch(" + std::to_string(graph->works.size()) + ")");
  for (Work work : graph->works)
    if (!submit(stream, std::move(work))) return nullptr;
  return none();
}
static PyObject* r_graphUpload(Address, Address, int) { return none(); }
static PyObject* r_graphDestroy(Address graph, int) {
  delete (Graph*)graph;
  return none();
}

// ---- driver -------------------------------------------------------------------------------------
static Address d_ctxGetCurrent(int) { return 1; }

// A "cubin" is the bytes of a shared object. Written to a path of its own, since the loader would
// otherwise hand out the library that it has already under that name.
static void* load_library(const char* bytes, Py_ssize_t size) {
  const char* folder = getenv("TMPDIR");
  std::string path = std::string(folder && *folder ? folder : "/tmp") + "/softcudaXXXXXX";
  int file = mkstemp(&path[0]);
  if (file < 0) return complain("no temporary file for a kernel");
  for (Py_ssize_t written = 0, now; written < size; written += now)
    if ((now = write(file, bytes + written, size - written)) <= 0) break;
  close(file);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  unlink(path.c_str());
  if (!library) PyErr_Format(PyExc_RuntimeError, "softcuda: a kernel cannot be loaded: %s", dlerror());
  return library;
}
static Address d_moduleLoadData(PyObject* cubin, int) {
  char* bytes;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(cubin, &bytes, &size)) return 0;
  void* library = load_library(bytes, size);
  if (!library) return 0;
  typedef int (*Check)(uint64_t, int, int);
  auto set_check = (void (*)(Check))dlsym(library, "emu_set_check");
  if (set_check) set_check(check_access);
  // One set of stacks for all modules: a mapping each would exhaust vm.max_map_count.
  static char* stacks = (char*)mmap(nullptr, (size_t)1024 * 256 * 1024, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ((void (*)(char*))dlsym(library, "emu_set_stacks"))(stacks);
  return (Address) new Module{library, set_check != nullptr, {}};
}
static Address d_moduleGetFunction(Address handle, PyObject* name_object, int) {
  Module* module = (Module*)handle;
  const char* name = PyUnicode_AsUTF8(name_object);
  if (!name) return 0;
  Kernel*& kernel = module->kernels[name];
  if (kernel) return (Address)kernel;
  auto symbol = [&](const char* prefix) {
    return dlsym(module->library, (std::string(prefix) + name).c_str());
  };
  auto entry = (int (*)(const Grid*, void**))symbol("emu_launch__");
  if (!entry) {
    PyErr_Format(PyExc_RuntimeError, "softcuda: CUDA_ERROR_NOT_FOUND: no kernel named %s", name);
    return 0;
  }
  kernel = new Kernel{name, entry, nullptr, nullptr, {}, module->checked};
  kernel->error = (const char* (*)())dlsym(module->library, "emu_error");
  kernel->set_options = (void (*)(int, unsigned long long, int))dlsym(module->library, "emu_options");
  int parameters = ((int (*)())symbol("emu_nparams__"))();
  kernel->parameter_sizes.resize(parameters + 1); // never empty: the callee writes through data()
  ((void (*)(int*))symbol("emu_psizes__"))(kernel->parameter_sizes.data());
  kernel->parameter_sizes.resize(parameters);
  return (Address)kernel;
}
static PyObject* d_moduleUnload(Address, int) { return none(); } // kernels in queues may need it

// Argument bytes are copied now, as the driver does; the kernel runs when its stream runs.
static PyObject* d_launchKernel(Address handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                unsigned by, unsigned bz, unsigned shared, Address stream,
                                Address parameters, Address, int) {
  Work launch{KERNEL};
  launch.kernel = (Kernel*)handle;
  launch.grid = Grid{gx, gy, gz, bx, by, bz, shared};
  const auto& sizes = launch.kernel->parameter_sizes;
  for (size_t i = 0; i < sizes.size(); i++)
    launch.arguments.emplace_back(((char**)parameters)[i], sizes[i]);
  note_launch(launch.kernel->name);
  return none_if(submit(stream, std::move(launch)));
}
static PyObject* d_launchCooperativeKernel(Address, unsigned, unsigned, unsigned, unsigned, unsigned,
                                           unsigned, unsigned, Address, Address, int) {
  return complain("cooperative launches are not emulated");
}
static int d_funcGetAttribute(int attribute, Address, int) {
  return attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; // threads of a block, registers
}
static PyObject* d_funcSetAttribute(Address, int, int, int) { return none(); }
static int d_occupancyMaxActiveBlocks(Address, int, size_t, int) { return 2; }
static PyObject* d_occupancyMaxPotentialBlockSize(Address, size_t, int, int) {
  return Py_BuildValue("(ii)", 216, 512);
}

// ---- what is replaced, with the C signatures that CuPy 14's capsules carry ----------------------
struct Replacement {
  char module; // 'r' runtime, 'd' driver
  const char* name;
  const char* signature;
  void* function;
};
#define RUNTIME "cupy_backends_4cuda_3api_7runtime_"
#define SKIP "int __pyx_skip_dispatch"
#define OPTIONAL(NAME) ", struct __pyx_opt_args_13" RUNTIME NAME " *__pyx_optional_args"
#define U7 "unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, "
#define R(NAME, SIGNATURE) {'r', #NAME, SIGNATURE, (void*)r_##NAME}
#define D(NAME, SIGNATURE) {'d', #NAME, SIGNATURE, (void*)d_##NAME}
static const Replacement replacements[] = {
    {'r', "_ensure_context", "PyObject *(void)", (void*)r_ensure_context},
    R(getDevice, "int (" SKIP ")"),
    R(getDeviceCount, "int (" SKIP ")"),
    R(setDevice, "PyObject *(int, " SKIP ")"),
    R(deviceGetAttribute, "int (int, int, " SKIP ")"),
    R(getDeviceProperties, "PyObject *(int, " SKIP ")"),
    R(driverGetVersion, "int (" SKIP ")"),
    R(deviceSynchronize, "PyObject *(" SKIP ")"),
    R(deviceCanAccessPeer, "int (int, int, " SKIP ")"),
    R(malloc, "intptr_t (size_t, " SKIP ")"),
    R(mallocAsync, "intptr_t (size_t, intptr_t, " SKIP ")"),
    R(free, "PyObject *(intptr_t, " SKIP ")"),
    R(freeAsync, "PyObject *(intptr_t, intptr_t, " SKIP ")"),
    R(hostAlloc, "intptr_t (size_t, unsigned int, " SKIP ")"),
    R(freeHost, "PyObject *(intptr_t, " SKIP ")"),
    R(memGetInfo, "PyObject *(" SKIP ")"),
    R(memcpy, "PyObject *(intptr_t, intptr_t, size_t, int, " SKIP ")"),
    R(memcpyAsync, "PyObject *(intptr_t, intptr_t, size_t, int, intptr_t, " SKIP ")"),
    R(memset, "PyObject *(intptr_t, int, size_t, " SKIP ")"),
    R(memsetAsync, "PyObject *(intptr_t, int, size_t, intptr_t, " SKIP ")"),
    R(pointerGetMemoryType, "int (intptr_t, " SKIP ")"),
    R(pointerGetAttributes, "struct __pyx_obj_13" RUNTIME "PointerAttributes *(intptr_t, " SKIP ")"),
    R(streamCreate, "intptr_t (" SKIP ")"),
    R(streamCreateWithFlags, "intptr_t (unsigned int, " SKIP ")"),
    R(streamCreateWithPriority, "intptr_t (unsigned int, int, " SKIP ")"),
    R(streamDestroy, "PyObject *(intptr_t, " SKIP ")"),
    R(streamSynchronize, "PyObject *(intptr_t, " SKIP ")"),
    R(streamQuery, "PyObject *(intptr_t, " SKIP ")"),
    R(streamIsCapturing, "int (intptr_t, " SKIP ")"),
    R(streamBeginCapture, "PyObject *(intptr_t, " SKIP OPTIONAL("streamBeginCapture") ")"),
    R(streamEndCapture, "intptr_t (intptr_t, " SKIP ")"),
    R(streamWaitEvent, "PyObject *(intptr_t, intptr_t, " SKIP OPTIONAL("streamWaitEvent") ")"),
    R(streamGetFlags, "unsigned int (intptr_t, " SKIP ")"),
    R(streamGetPriority, "int (intptr_t, " SKIP ")"),
    R(eventCreate, "intptr_t (" SKIP ")"),
    R(eventCreateWithFlags, "intptr_t (unsigned int, " SKIP ")"),
    R(eventDestroy, "PyObject *(intptr_t, " SKIP ")"),
    R(eventRecord, "PyObject *(intptr_t, intptr_t, " SKIP ")"),
    R(eventSynchronize, "PyObject *(intptr_t, " SKIP ")"),
    R(eventQuery, "PyObject *(intptr_t, " SKIP ")"),
    R(eventElapsedTime, "float (intptr_t, intptr_t, " SKIP ")"),
    R(graphInstantiate, "intptr_t (intptr_t, " SKIP ")"),
    R(graphLaunch, "PyObject *(intptr_t, intptr_t, " SKIP ")"),
    R(graphUpload, "PyObject *(intptr_t, intptr_t, " SKIP ")"),
    R(graphDestroy, "PyObject *(intptr_t, " SKIP ")"),
    {'r', "graphExecDestroy", "PyObject *(intptr_t, " SKIP ")", (void*)r_graphDestroy},
    D(ctxGetCurrent, "intptr_t (" SKIP ")"),
    D(moduleLoadData, "intptr_t (PyObject *, " SKIP ")"),
    D(moduleGetFunction, "intptr_t (intptr_t, PyObject *, " SKIP ")"),
    D(moduleUnload, "PyObject *(intptr_t, " SKIP ")"),
    D(launchKernel, "PyObject *(intptr_t, " U7 "intptr_t, intptr_t, intptr_t, " SKIP ")"),
    D(launchCooperativeKernel, "PyObject *(intptr_t, " U7 "intptr_t, intptr_t, " SKIP ")"),
    D(funcGetAttribute, "int (int, intptr_t, " SKIP ")"),
    D(funcSetAttribute, "PyObject *(intptr_t, int, int, " SKIP ")"),
    {'d', "occupancyMaxActiveBlocksPerMultiprocessor", "int (intptr_t, int, size_t, " SKIP ")",
     (void*)d_occupancyMaxActiveBlocks},
    D(occupancyMaxPotentialBlockSize, "PyObject *(intptr_t, size_t, int, " SKIP ")"),
};

// ---- the Python module --------------------------------------------------------------------------
// A changed prototype must be an ImportError, not a crash in the middle of a test.
static bool check_signature(const Replacement& entry, PyObject* table) {
  PyObject* capsule = PyDict_GetItemString(table, entry.name);
  if (!capsule) return true; // this version of CuPy does not have the function, nor call it
  const char* found = PyCapsule_GetName(capsule);
  if (found && !strcmp(found, entry.signature)) return true;
  PyErr_Format(PyExc_ImportError,
               "softcuda: %s has another C signature in this version of CuPy: expected %s, found %s",
               entry.name, entry.signature, found ? found : "none");
  return false;
}
static bool replace(const Replacement& entry, PyObject* table, PyObject* replaced) {
  PyObject* before = PyDict_GetItemString(table, entry.name);
  if (!before) return true;
  PyObject* capsule = PyCapsule_New(entry.function, PyCapsule_GetName(before), nullptr);
  Py_INCREF(before); // its name lives on in the new capsule
  bool fine = capsule && !PyDict_SetItemString(table, entry.name, capsule);
  Py_XDECREF(capsule);
  PyObject* row = Py_BuildValue("(Cssn)", entry.module, entry.name, entry.signature,
                                (Py_ssize_t)entry.function);
  fine = fine && row && !PyList_Append(replaced, row);
  Py_XDECREF(row);
  return fine;
}
// install(runtime table, driver table, properties, PointerAttributes, CUDARuntimeError)
// -> [(module letter, name, signature, address)]. Nothing is replaced unless all signatures fit.
static PyObject* m_install(PyObject*, PyObject* arguments) {
  PyObject *runtime, *driver, *properties, *attributes, *error;
  if (!PyArg_ParseTuple(arguments, "O!O!OOO", &PyDict_Type, &runtime, &PyDict_Type, &driver,
                        &properties, &attributes, &error))
    return nullptr;
  auto table = [&](const Replacement& entry) { return entry.module == 'r' ? runtime : driver; };
  for (const auto& entry : replacements)
    if (!check_signature(entry, table(entry))) return nullptr;
  Py_INCREF(device_properties = properties);
  Py_INCREF(pointer_attributes = attributes);
  Py_INCREF(error_class = error);
  PyObject* replaced = PyList_New(0);
  for (const auto& entry : replacements)
    if (!replace(entry, table(entry), replaced)) return nullptr;
  return replaced;
}
// config(...): sets the options that are given, keeps the others.
static PyObject* m_config(PyObject*, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"guard", "deferred", "trace", "sched", "poison", "strict", "touch",
                                "memory", "cc_major", "cc_minor", nullptr};
  Options wanted = options;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|$pppipppnii", (char**)names,
                                   &wanted.guard, &wanted.deferred, &wanted.trace, &wanted.sched,
                                   &wanted.poison, &wanted.strict, &wanted.touch, &wanted.memory,
                                   &cc_major, &cc_minor))
    return nullptr;
  if (options.deferred && !wanted.deferred && !run_everything()) return nullptr;
  options = wanted;
  return none();
}
template <class Map> static PyObject* dict_of(const Map& map) {
  PyObject* dict = PyDict_New();
  for (const auto& entry : map) {
    PyObject* value = PyLong_FromLongLong(entry.second);
    PyDict_SetItemString(dict, entry.first.c_str(), value);
    Py_DECREF(value);
  }
  return dict;
}
static PyObject* trace_list() {
  PyObject* list = PyList_New(0);
  for (const auto& name : traced) {
    PyObject* text = PyUnicode_FromString(name.c_str());
    PyList_Append(list, text);
    Py_DECREF(text);
  }
  return list;
}
// stats(): what was counted since reset().
static PyObject* m_stats(PyObject*, PyObject*) {
  long long touched = 0;
  for (const auto& entry : touched_by) touched += entry.second;
  std::map<std::string, long long> numbers = {
      {"launches", count.launches}, {"graph_launches", count.graph_launches},
      {"mallocs", count.mallocs}, {"frees", count.frees}, {"memsets", count.memsets},
      {"syncs", count.syncs}, {"h2d", count.h2d}, {"d2h", count.d2h}, {"d2d", count.d2d},
      {"h2d_bytes", count.h2d_bytes}, {"d2h_bytes", count.d2h_bytes}, {"d2d_bytes", count.d2d_bytes},
      {"live_bytes", live_bytes}, {"peak_bytes", peak_bytes}, {"read_bytes", count.read_bytes},
      {"written_bytes", count.written_bytes}, {"touched_bytes", touched}};
  PyObject* stats = dict_of(numbers);
  PyObject *kernels = dict_of(launches_of), *by_kernel = dict_of(touched_by), *trace = trace_list();
  PyObject* unchecked = dict_of(unchecked_of);
  PyDict_SetItemString(stats, "kernels", kernels);
  PyDict_SetItemString(stats, "unchecked", unchecked);
  PyDict_SetItemString(stats, "touched", by_kernel);
  PyDict_SetItemString(stats, "trace", trace);
  Py_DECREF(kernels);
  Py_DECREF(unchecked);
  Py_DECREF(by_kernel);
  Py_DECREF(trace);
  return stats;
}
static PyObject* m_reset(PyObject*, PyObject*) {
  count = Counters{};
  peak_bytes = live_bytes;
  launches_of.clear();
  unchecked_of.clear();
  touched_by.clear();
  traced.clear();
  return none();
}
// call(stream, name, function): a library's work on a stream, counted as one launch.
static PyObject* m_call(PyObject*, PyObject* arguments) {
  Py_ssize_t stream;
  const char* name;
  Work work{CALL};
  if (!PyArg_ParseTuple(arguments, "nsO", &stream, &name, &work.call)) return nullptr;
  Stream* on = stream_of(stream);
  if (!on) return nullptr;
  if (on->capturing) return fail(CAPTURE_UNSUPPORTED); // a replay of NumPy would prove nothing
  note_launch(name);
  Py_INCREF(work.call);
  return none_if(submit(stream, std::move(work)));
}
// holds(address, size): whether all these bytes are inside one allocation.
static PyObject* m_holds(PyObject*, PyObject* arguments) {
  Py_ssize_t start, size;
  if (!PyArg_ParseTuple(arguments, "nn", &start, &size)) return nullptr;
  return PyBool_FromLong(on_device(start, size));
}
static PyObject* m_memory(PyObject*, PyObject*) { return PyLong_FromSsize_t(options.memory); }
static PyObject* m_flush(PyObject*, PyObject*) { return none_if(run_everything()); }

static PyMethodDef methods[] = {{"install", m_install, METH_VARARGS, nullptr},
                                {"config", (PyCFunction)m_config, METH_VARARGS | METH_KEYWORDS, nullptr},
                                {"stats", m_stats, METH_NOARGS, nullptr},
                                {"reset", m_reset, METH_NOARGS, nullptr},
                                {"call", m_call, METH_VARARGS, nullptr},
                                {"holds", m_holds, METH_VARARGS, nullptr},
                                {"flush", m_flush, METH_NOARGS, nullptr},
                                {"memory", m_memory, METH_NOARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_softcuda", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__softcuda() { return PyModule_Create(&definition); }
