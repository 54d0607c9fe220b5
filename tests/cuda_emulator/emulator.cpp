// Runs kernels: blocks in OS threads, their threads as fibers; see cuda_runtime.h.
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

__thread Index threadIdx, blockIdx, blockDim, gridDim;

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// Of this OS thread and of all kernels: in files of their own, which are linked before and behind
// those of the kernels. Weak: a module linked without them has no poisoned memory.
__attribute__((weak)) unsigned char* begin_of_shared_memory();
__attribute__((weak)) unsigned char* end_of_shared_memory();

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

// What a block reads before it has written it are NaNs and huge numbers.
void poison_shared_memory() {
  if (!begin_of_shared_memory || !end_of_shared_memory) return;
  unsigned char *begin = begin_of_shared_memory(), *end = end_of_shared_memory();
  if (end < begin) fail("the kernels are not linked between the marks of shared memory");
  std::memset(begin, 0xff, end - begin);
}

// Tells AddressSanitizer which stack is in use.
struct Stack {
  void* fake = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;

  void switch_to(const Stack& other, bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, other.bottom, other.size);
#else
    (void)other, (void)for_good;
#endif
  }

  // `before`: where this came from.
  void entered(Stack* before) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, before ? &before->bottom : nullptr,
                                    before ? &before->size : nullptr);
#else
    (void)before;
#endif
  }
};

constexpr size_t kStack = 64 << 10;
constexpr unsigned kMaxThreads = 1024, kWarp = 32;

enum class State { kReady, kAtBlock, kAtGrid, kAtWarp, kEnded };

struct Fiber {
  Index index;
  State state;
  bool begun;
  unsigned id;                                // in the block
  unsigned mask;                              // of the exchange it waits for
  alignas(16) unsigned char values[32 * 16];  // what that exchange brought, 16 bytes a lane
  ucontext_t first;
  jmp_buf here;
  std::unique_ptr<unsigned char[]> memory;
  Stack stack;
};

// Of all blocks of a cooperative launch.
struct Grid {
  std::mutex mutex;
  std::condition_variable changed;
  unsigned blocks, arrived = 0, generation = 0;

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = generation;
    if (++arrived == blocks) {
      arrived = 0;
      ++generation;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return generation != mine; });
    }
  }
};

// What an OS thread keeps from block to block: stacks are not made anew for each.
struct Worker {
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned count = 0;
  Grid* grid = nullptr;
  const std::function<void()>* kernel = nullptr;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  Stack stack;  // the scheduler's

  static void enter();

  void begin_or_go_on(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    // Switching by setjmp takes no system call; a context only begins a fiber.
    if (_setjmp(scheduler) != 0) {
      stack.entered(nullptr);
      return;
    }
    stack.switch_to(fiber.stack);
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.memory.get();
    fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, &Worker::enter, 0);
    setcontext(&fiber.first);
  }

  void leave(State state) {
    Fiber& mine = *current;
    mine.state = state;
    if (_setjmp(mine.here) == 0) {
      mine.stack.switch_to(stack, state == State::kEnded);
      _longjmp(scheduler, 1);
    }
    mine.stack.entered(nullptr);
  }

  // Lets the lanes of a warp whose exchanges are complete go on. Lanes that have ended are not
  // waited for.
  bool release_warp(unsigned first, unsigned lanes) {
    bool any = false;
    unsigned waiting = 0, alive = 0;
    for (unsigned i = 0; i < lanes; ++i) {
      waiting |= unsigned{fibers[first + i]->state == State::kAtWarp} << i;
      alive |= unsigned{fibers[first + i]->state != State::kEnded} << i;
    }
    while (waiting != 0) {
      const unsigned mask = fibers[first + __builtin_ctz(waiting)]->mask, needed = mask & alive;
      if ((needed & ~waiting) == 0) {
        unsigned char values[kWarp * 16] = {};
        for (unsigned i = 0; i < lanes; ++i)
          if (needed >> i & 1u) {
            if (fibers[first + i]->mask != mask) fail("lanes of an exchange name different masks");
            std::memcpy(values + 16 * i, fibers[first + i]->values + 16 * i, 16);
          }
        for (unsigned i = 0; i < lanes; ++i)
          if (needed >> i & 1u) {
            std::memcpy(fibers[first + i]->values, values, sizeof values);
            fibers[first + i]->state = State::kReady;
          }
        any = true;
      }
      waiting &= ~mask;
    }
    return any;
  }

  // Releases those whose barrier is complete; false where nobody could go on.
  bool release() {
    bool any = false;
    for (unsigned first = 0; first < count; first += kWarp)
      any |= release_warp(first, std::min(kWarp, count - first));
    unsigned ended = 0, at_block = 0, at_grid = 0;
    for (unsigned i = 0; i < count; ++i) {
      ended += fibers[i]->state == State::kEnded;
      at_block += fibers[i]->state == State::kAtBlock;
      at_grid += fibers[i]->state == State::kAtGrid;
    }
    if (at_block != 0 && at_block + ended == count) {
      for (unsigned i = 0; i < count; ++i)
        if (fibers[i]->state == State::kAtBlock) fibers[i]->state = State::kReady;
      any = true;
    }
    if (at_grid != 0 && at_grid == count) {
      grid->wait();
      for (unsigned i = 0; i < count; ++i) fibers[i]->state = State::kReady;
      any = true;
    }
    return any;
  }

  void run_block(uint64_t block, const Shape& shape, bool descending) {
    const dim3 grid = shape.grid, threads = shape.block;
    poison_shared_memory();
    gridDim = {grid.x, grid.y, grid.z};
    blockDim = {threads.x, threads.y, threads.z};
    blockIdx = {static_cast<unsigned>(block % grid.x),
                static_cast<unsigned>(block / grid.x % grid.y),
                static_cast<unsigned>(block / grid.x / grid.y)};
    count = threads.x * threads.y * threads.z;
    while (fibers.size() < count) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& made = *fibers.back();
      made.memory = std::make_unique<unsigned char[]>(kStack);
      made.stack.bottom = made.memory.get();
      made.stack.size = kStack;
    }
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = *fibers[i];
      fiber.index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
      fiber.state = State::kReady;
      fiber.begun = false;
      fiber.stack.fake = nullptr;
      fiber.id = i;
    }
    for (;;) {
      bool all_ended = true;
      for (unsigned k = 0; k < count; ++k) {
        Fiber& fiber = *fibers[descending ? count - 1 - k : k];
        if (fiber.state == State::kReady) begin_or_go_on(fiber);
        all_ended &= fiber.state == State::kEnded;
      }
      if (all_ended) return;
      bool ready = false;
      for (unsigned i = 0; i < count; ++i) ready |= fibers[i]->state == State::kReady;
      if (!ready && !release()) fail("a barrier that some threads of the block never reach");
    }
  }
};

int recorded_for = 0;
std::string recorded;

thread_local Worker worker;

void Worker::enter() {
  worker.current->stack.entered(&worker.stack);
  (*worker.kernel)();
  worker.leave(State::kEnded);
}

bool is_descending() {
  static std::atomic<unsigned> launches{0};
  static const char* order = std::getenv("EMULATOR_ORDER");
  if (order && std::strcmp(order, "ascending") == 0) return false;
  if (order && std::strcmp(order, "descending") == 0) return true;
  return launches++ % 2 == 1;
}

}  // namespace

int recorded_multiprocessors() { return recorded_for; }

void record(const void* kernel, dim3 grid, dim3 block, bool cooperative,
            const std::string& parameters) {
  Dl_info module{};
  if (dladdr(kernel, &module) == 0) fail("a kernel that is in no module");
  const auto offset = static_cast<const char*>(kernel) - static_cast<char*>(module.dli_fbase);
  char text[160];
  std::snprintf(text, sizeof text, "%llx %u %u %u %u %u %u %d ",
                static_cast<unsigned long long>(offset), grid.x, grid.y, grid.z, block.x, block.y,
                block.z, cooperative ? 1 : 0);
  recorded += text;
  for (const unsigned char byte : parameters) {
    std::snprintf(text, sizeof text, "%02x", byte);
    recorded += text;
  }
  recorded += '\n';
}

unsigned lane() { return worker.current->id % kWarp; }

void wait_for_block() { worker.leave(State::kAtBlock); }

void wait_for_grid() {
  if (!worker.grid) fail("grid.sync() in a launch that is not cooperative");
  worker.leave(State::kAtGrid);
}

const unsigned char* exchange(unsigned mask, const void* mine, size_t bytes) {
  Fiber& fiber = *worker.current;
  const unsigned id = fiber.id % kWarp;
  if (!(mask >> id & 1u)) fail("a lane takes part in an exchange whose mask leaves it out");
  std::memcpy(fiber.values + 16 * id, mine, bytes);
  fiber.mask = mask;
  worker.leave(State::kAtWarp);
  return fiber.values;
}

cudaError_t run(const Shape& launched, bool cooperative, const std::function<void()>& kernel) {
  const uint64_t blocks = uint64_t{launched.grid.x} * launched.grid.y * launched.grid.z;
  const uint64_t threads = uint64_t{launched.block.x} * launched.block.y * launched.block.z;
  if (blocks == 0 || threads == 0 || threads > kMaxThreads || launched.grid.x > INT32_MAX ||
      launched.grid.y > 65535 || launched.grid.z > 65535)
    return cudaErrorInvalidValue;
  const bool descending = is_descending();
  if (!cooperative) {
    worker.grid = nullptr;
    worker.kernel = &kernel;
    for (uint64_t i = 0; i < blocks; ++i)
      worker.run_block(descending ? blocks - 1 - i : i, launched, descending);
    return cudaSuccess;
  }
  if (blocks > 2 * kMultiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  Grid grid;
  grid.blocks = blocks;
  std::vector<std::thread> team;
  for (uint64_t i = 0; i < blocks; ++i)
    team.emplace_back([&, i] {
      worker.grid = &grid;
      worker.kernel = &kernel;
      worker.run_block(i, launched, descending);
    });
  for (std::thread& member : team) member.join();
  return cudaSuccess;
}

}  // namespace emulator

// From here on launches are recorded, as those of a GPU of so many multiprocessors, and nothing
// runs; 0: they run again. Forgets what was recorded.
extern "C" __attribute__((visibility("default"))) void emulator_record(int multiprocessors) {
  emulator::recorded_for = multiprocessors;
  emulator::recorded.clear();
}

// A line a launch: the kernel's offset in this module (hexadecimal), the grid's and the block's
// sizes, 1 where the launch is cooperative, and the parameters' bytes (hexadecimal). Until the next
// launch.
extern "C" __attribute__((visibility("default"))) const char* emulator_recorded() {
  return emulator::recorded.c_str();
}
