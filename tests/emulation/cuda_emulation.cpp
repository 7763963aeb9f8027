#include "cuda_emulation.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <vector>

#include <ucontext.h>

EmulatedIndex threadIdx, blockIdx;

namespace emulation {

bool scalars_on_host = true;

namespace {

bool backwards = false; // the order of blocks and threads, which must not matter
int64_t launches = 0;
constexpr int kThreads = sama::kThreads, kWarp = sama::kWarp;
bool counting = false;
int64_t store_bytes = 0, store_sectors = 0;
std::vector<uintptr_t> stores[kThreads]; // addresses, in the order of the thread's 16-byte stores

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
  bool exchanging = false; // waits for the other lanes of its warp, else for a barrier or for nothing
  uint4 exchanged[2]; // what it gave last and before: a lane may be one exchange ahead of its neighbour
  unsigned exchanges = 0;
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

// The lanes of a warp, up to the next barrier or to their end; returns how many have come to their end.
int run_warp(int first) {
  for (;;) { // from one exchange to the next
    int finished = 0, exchanging = 0;
    for (int i = 0; i < kWarp; ++i) {
      const int thread = first + (backwards ? kWarp - 1 - i : i);
      if (coroutines[thread]->finished) give_up("some threads wait at a barrier that others have not come to");
      threadIdx.x = unsigned(thread);
      coroutines[thread]->exchanging = false;
      resume(*coroutines[thread]);
      finished += coroutines[thread]->finished;
      exchanging += coroutines[thread]->exchanging;
    }
    if (exchanging == 0) return finished;
    if (exchanging < kWarp) give_up("some lanes exchange words with others that do not");
  }
}

void count_sectors(int first) {
  size_t most = 0;
  for (int lane = first; lane < first + kWarp; ++lane) most = std::max(most, stores[lane].size());
  for (size_t i = 0; i < most; ++i) {
    std::set<uintptr_t> sectors;
    for (int lane = first; lane < first + kWarp; ++lane)
      if (i < stores[lane].size()) {
        sectors.insert(stores[lane][i] / 32);
        store_bytes += 16;
      }
    store_sectors += int64_t(sectors.size());
  }
  for (int lane = first; lane < first + kWarp; ++lane) stores[lane].clear();
}

void run_block() {
  for (int i = 0; i < kThreads; ++i) {
    coroutines[i]->finished = false;
    coroutines[i]->exchanges = 0;
  }
  for (int finished = 0; finished < kThreads;) { // from one barrier to the next
    finished = 0;
    for (int i = 0; i < kThreads; i += kWarp) finished += run_warp(backwards ? kThreads - kWarp - i : i);
    if (finished > 0 && finished < kThreads) give_up("some threads wait at a barrier that others have not come to");
  }
  for (int i = 0; counting && i < kThreads; i += kWarp) count_sectors(i);
}

} // namespace

void barrier() {
  const unsigned own = threadIdx.x;
  to_scheduler();
  if (threadIdx.x != own) give_up("a coroutine was resumed as another thread");
}

uint4 swap_with_neighbour(uint4 own) {
  const unsigned turn = current->exchanges++ % 2;
  current->exchanged[turn] = own;
  current->exchanging = true;
  barrier();
  return coroutines[threadIdx.x ^ 1]->exchanged[turn];
}

void count_store(const void* address) {
  if (counting) stores[threadIdx.x].push_back(reinterpret_cast<uintptr_t>(address));
}

void require_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) give_up("a 16-byte access to an address that is not aligned");
}

void run(int64_t blocks, void (*thread_body)(void*), void* data) {
  ++launches;
  if (blocks <= 0 || blocks > 0x7fffffff) give_up("the number of blocks is not one that a GPU would launch");
  while (coroutines.size() < size_t(kThreads)) coroutines.push_back(std::make_unique<Coroutine>());
  body = thread_body;
  body_data = data;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = unsigned(backwards ? blocks - 1 - i : i);
    run_block();
  }
}

} // namespace emulation

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulation_put_scalars_on_host(bool on_host) { emulation::scalars_on_host = on_host; }
EXPORTED void emulation_run_backwards(bool backwards) { emulation::backwards = backwards; }
EXPORTED int64_t emulation_launches() { return emulation::launches; }
EXPORTED void emulation_count_stores(bool count) {
  emulation::counting = count;
  emulation::store_bytes = emulation::store_sectors = 0;
}
EXPORTED int64_t emulation_store_bytes() { return emulation::store_bytes; }
EXPORTED int64_t emulation_store_sectors() { return emulation::store_sectors; }
