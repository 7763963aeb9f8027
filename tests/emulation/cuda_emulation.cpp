#include "cuda_emulation.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <ucontext.h>

EmulatedIndex threadIdx, blockIdx;

namespace emulation {

bool scalars_on_host = true;

namespace {

bool backwards = false; // the order of blocks and threads, which must not matter
int64_t launches = 0;

[[noreturn]] void give_up(const char* message) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

// A coroutine that lives for the whole process and runs one thread after the other: `_setjmp` and `_longjmp` switch
// stacks without the system calls of swapcontext.
struct Coroutine {
  static constexpr size_t kStack = 128 * 1024;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf own;
  bool started = false, finished = true;
};

std::vector<std::unique_ptr<Coroutine>> coroutines;
Coroutine* current = nullptr;
jmp_buf scheduler;
void (*body)(void*) = nullptr;
void* body_data = nullptr;

void to_scheduler() {
  if (_setjmp(current->own) == 0) _longjmp(scheduler, 1);
}

void coroutine_main() {
  for (;;) {
    body(body_data);
    current->finished = true;
    to_scheduler();
  }
}

void resume(Coroutine& coroutine) {
  current = &coroutine;
  if (_setjmp(scheduler) != 0) return;
  if (coroutine.started) _longjmp(coroutine.own, 1);
  coroutine.started = true;
  getcontext(&coroutine.context);
  coroutine.context.uc_stack.ss_sp = coroutine.stack.get();
  coroutine.context.uc_stack.ss_size = Coroutine::kStack;
  coroutine.context.uc_link = nullptr;
  makecontext(&coroutine.context, coroutine_main, 0);
  setcontext(&coroutine.context);
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) coroutines[i]->finished = false;
  for (int finished = 0; finished < threads;) { // from one barrier to the next
    finished = 0;
    for (int i = 0; i < threads; ++i) {
      const int thread = backwards ? threads - 1 - i : i;
      if (coroutines[thread]->finished) give_up("some threads wait at a barrier that others have not come to");
      threadIdx.x = unsigned(thread);
      resume(*coroutines[thread]);
      finished += coroutines[thread]->finished;
    }
    if (finished > 0 && finished < threads) give_up("some threads wait at a barrier that others have not come to");
  }
}

} // namespace

void barrier() {
  const unsigned own = threadIdx.x;
  to_scheduler();
  if (threadIdx.x != own) give_up("a coroutine was resumed as another thread");
}

void require_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) give_up("a 16-byte access to an address that is not aligned");
}

void run(int64_t blocks, int threads, void (*thread_body)(void*), void* data) {
  ++launches;
  if (blocks <= 0 || blocks > 0x7fffffff) give_up("the number of blocks is not one that a GPU would launch");
  while (coroutines.size() < size_t(threads)) coroutines.push_back(std::make_unique<Coroutine>());
  body = thread_body;
  body_data = data;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = unsigned(backwards ? blocks - 1 - i : i);
    run_block(threads);
  }
}

} // namespace emulation

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulation_put_scalars_on_host(bool on_host) { emulation::scalars_on_host = on_host; }
EXPORTED void emulation_run_backwards(bool backwards) { emulation::backwards = backwards; }
EXPORTED int64_t emulation_launches() { return emulation::launches; }
