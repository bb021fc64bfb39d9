// Fibers: cooperative threads, each with its own stack. ucontext starts them. Later switches use the compiler's
// setjmp and longjmp builtins, because swapcontext makes a system call for the signal mask each time.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <memory>

namespace fibers {

struct Fiber {
  ucontext_t beginning;
  void* at[5];  // where it left off
  bool begun;
  std::unique_ptr<char[]> stack;
};
inline void* scheduler[5];

// `main` must not return. It ends with a last leave().
inline void prepare(Fiber& fiber, size_t stack_bytes, void (*main)()) {
  fiber.begun = false;
  fiber.stack.reset(new char[stack_bytes]);  // not filled with zeros
  getcontext(&fiber.beginning);
  fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
  fiber.beginning.uc_stack.ss_size = stack_bytes;
  fiber.beginning.uc_link = nullptr;
  makecontext(&fiber.beginning, main, 0);
}

// A separate function, neither inlined nor analysed: the compiler must assume that the function which saved a place
// calls something that may return to it.
[[noreturn, gnu::noinline, gnu::noipa]] inline void jump(void** at) { __builtin_longjmp(at, 1); }

// From the scheduler, until the fiber leaves.
[[gnu::noinline]] inline void enter(Fiber& fiber) {
  if (__builtin_setjmp(scheduler)) return;
  if (fiber.begun) jump(fiber.at);
  fiber.begun = true;
  setcontext(&fiber.beginning);
}

// From within the fiber.
[[gnu::noinline]] inline void leave(Fiber& fiber) {
  if (__builtin_setjmp(fiber.at) == 0) jump(scheduler);
}

}  // namespace fibers
