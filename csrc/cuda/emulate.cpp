// The scheduler of emulate.h.

#include "emulate.h"

#include <sys/mman.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

// Switching stacks. ucontext is the portable way; on x86-64 twelve instructions do without its two system
// calls.
#if defined(__x86_64__)
extern "C" void fg_switch_stacks(void** save, void* load);
asm(R"(
.text
.local fg_switch_stacks
.type fg_switch_stacks, @function
fg_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fg_switch_stacks, .-fg_switch_stacks
)");
#endif

namespace fg::emulation {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

#if defined(__x86_64__)
using Context = void*;
void switch_context(Context& from, Context& to) { fg_switch_stacks(&from, to); }

void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto* top =
      reinterpret_cast<void**>(stack + kStackBytes) - 1;  // entry starts as if called: rsp = 8 modulo 16
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;  // six registers, whatever they hold
}
#else
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { kReady, kInWarp, kInBlock, kDone };

struct Fiber {
  Context context{};
  unsigned char* stack = nullptr;
  State state = State::kDone;
  const char* file = nullptr;  // where it waits
  int line = 0, source = 0;
  uint64_t value = 0;
};

// Each operating-system thread has a machine of its own; fibers and their stacks are used again.
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  Context scheduler{};
  int current = 0, started = 0;  // fibers [0, started) wait at the end of enter's loop or within a kernel
  void (*call)(void*) = nullptr;
  void* kernel = nullptr;
  std::string error;

  ~Machine() {
    for (Fiber& fiber : fibers) munmap(fiber.stack, kStackBytes);
  }
};

thread_local Machine machine;

void leave(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  switch_context(fiber.context, machine.scheduler);
}

// A fiber's whole life: one kernel after the other.
void enter() {
  for (;;) {
    machine.call(machine.kernel);
    leave(State::kDone);
  }
}

std::string place(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
}

std::string describe(int thread) {
  const Fiber& fiber = machine.fibers[thread];
  const char* where =
      fiber.state == State::kInWarp ? " at a warp's operation in " : " at a block's barrier in ";
  return "thread " + std::to_string(thread) + " waits" + where + place(fiber.file, fiber.line);
}

void diverged(int a, int b) { machine.error = "divergent threads: " + describe(a) + ", " + describe(b); }

bool same_place(int a, int b) {
  const Fiber &x = machine.fibers[a], &y = machine.fibers[b];
  return x.state == y.state && x.line == y.line && std::strcmp(x.file, y.file) == 0;
}

void resume(int thread) {
  threadIdx.x = static_cast<unsigned>(thread);
  machine.current = thread;
  switch_context(machine.scheduler, machine.fibers[thread].context);
}

// Runs a warp until all its threads have returned or wait for the block; a thread that waits, or -1.
int run_warp(int begin, int end) {
  auto& fibers = machine.fibers;
  for (;;) {
    for (int i = begin; i < end; ++i) {
      if (fibers[i].state == State::kReady) resume(i);
      if (!machine.error.empty()) return -1;
    }
    int first = -1;
    for (int i = begin; i < end; ++i) {
      if (fibers[i].state == State::kDone) continue;
      if (first < 0) first = i;
      if (!same_place(first, i)) {
        diverged(first, i);
        return -1;
      }
    }
    if (first < 0 || fibers[first].state == State::kInBlock) return first;
    uint64_t values[kWarp];
    for (int i = begin; i < end; ++i) values[i - begin] = fibers[i].value;
    for (int i = begin; i < end; ++i) {
      if (fibers[i].state == State::kDone) continue;
      const int source = fibers[i].source;
      if (source >= end - begin || fibers[begin + source].state == State::kDone) {
        machine.error = "thread " + std::to_string(i) + " reads from a lane that is not there, at " +
                        place(fibers[i].file, fibers[i].line);
        return -1;
      }
      fibers[i].value = values[source];
    }
    for (int i = begin; i < end; ++i)
      if (fibers[i].state == State::kInWarp) fibers[i].state = State::kReady;
  }
}

void run_block(int threads) {
  auto& fibers = machine.fibers;
  for (int i = 0; i < threads; ++i) fibers[i].state = State::kReady;
  for (;;) {
    int waiting = -1;
    for (int begin = 0; begin < threads; begin += kWarp) {
      const int found = run_warp(begin, begin + kWarp < threads ? begin + kWarp : threads);
      if (found >= 0 && waiting >= 0 && !same_place(waiting, found)) diverged(waiting, found);
      if (!machine.error.empty()) return;
      if (found >= 0) waiting = found;
    }
    if (waiting < 0) return;
    for (int i = 0; i < threads; ++i)
      if (fibers[i].state == State::kInBlock) fibers[i].state = State::kReady;
  }
}

void need_fibers(int threads) {
  machine.fibers.reserve(1024);  // a fiber that waits is never moved
  while (static_cast<int>(machine.fibers.size()) < threads) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the emulator's stacks");
    machine.fibers.emplace_back();
    machine.fibers.back().stack = static_cast<unsigned char*>(stack);
  }
  for (; machine.started < threads; ++machine.started) {
    Fiber& fiber = machine.fibers[machine.started];
    prepare(fiber.context, fiber.stack, enter);
  }
}

}  // namespace

int lane() { return machine.current % kWarp; }

unsigned char* dynamic_shared_memory() { return machine.shared.data(); }

void fail(const char* what, const char* file, int line) {
  machine.error = "thread " + std::to_string(machine.current) + ": " + what + " at " + place(file, line);
  leave(State::kDone);
  std::abort();  // never resumed: run_grid drops the fibers after an error
}

uint64_t exchange(uint64_t value, int source, unsigned mask, const char* file, int line) {
  if (mask != 0xffffffffu) fail("the emulator knows full warp masks only", file, line);
  Fiber& fiber = machine.fibers[machine.current];
  fiber.value = value, fiber.source = source, fiber.file = file, fiber.line = line;
  leave(State::kInWarp);
  return fiber.value;
}

void wait_for_block(const char* file, int line) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.file = file, fiber.line = line;
  leave(State::kInBlock);
}

void run_grid(int64_t grid, int block, size_t shared_bytes, void (*call)(void*), void* kernel) {
  machine.error.clear();
  machine.call = call;
  machine.kernel = kernel;
  need_fibers(block);
  blockDim.x = static_cast<unsigned>(block);
  gridDim.x = static_cast<unsigned>(grid);
  for (int64_t b = 0; b < grid; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    machine.shared.assign(shared_bytes, 0xff);  // NaN: nobody may count on zeros
    run_block(block);
    if (machine.error.empty()) continue;
    machine.started = 0;  // the threads that are left within the kernel start afresh next time
    throw std::runtime_error(machine.error);
  }
}

}  // namespace fg::emulation
