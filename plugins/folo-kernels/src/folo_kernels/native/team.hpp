// A team of threads that run one function together and meet at barriers.
//
// The threads are those of the OpenMP runtime that torch has loaded, lent through its entry point: a second pool would
// fight torch's for the same cores. Without one, the caller runs alone.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <sched.h>
#endif

namespace folo {

typedef void (*ParallelEntry)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

struct TeamSettings {
  ParallelEntry entry = nullptr;
  int (*granted)() = nullptr;  // how many threads the runtime gave, which may be fewer than it was asked for
  int threads = 1;
  int num_cpus = 0;  // 0: threads are not bound
  int cpus[256] = {};
};

inline TeamSettings& team_settings() {
  static TeamSettings settings;
  return settings;
}

constexpr int MAX_THREADS = 256;

FOLO_INLINE void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  // Every thread says so, before its first barrier.
  void is_of(int threads) { threads_.store(threads, std::memory_order_relaxed); }

  // Wait until every thread of the team is here.
  void barrier() {
    const int threads = threads_.load(std::memory_order_relaxed);
    if (threads == 1) return next_.store(0, std::memory_order_relaxed);
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < 20000) {
        pause_briefly();
      } else {
        give_way();  // somebody else needs this core, perhaps our own team
      }
    }
  }

  // Take the next `count` items of the present phase; a barrier starts the next phase.
  int64_t take(int64_t count) { return next_.fetch_add(count, std::memory_order_relaxed); }

 private:
  static void give_way() {
#if defined(__linux__)
    sched_yield();
#endif
  }

  std::atomic<int> threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

// Binds the calling thread to one processor while it lives.
class Bound {
 public:
  Bound(int thread, bool is_caller) {
#if defined(__linux__)
    const TeamSettings& settings = team_settings();
    if (settings.num_cpus == 0) return;
    const int cpu = settings.cpus[thread % settings.num_cpus];
    static thread_local int bound_to = -1;
    // The team's own threads stay bound. The caller's is Python's: what it starts would inherit its processor.
    if (!is_caller && bound_to == cpu) return;
    if (is_caller) restores_ = sched_getaffinity(0, sizeof(before_), &before_) == 0;
    bind(cpu);
    if (!is_caller) bound_to = cpu;
#else
    (void)thread, (void)is_caller;
#endif
  }
  ~Bound() {
#if defined(__linux__)
    if (restores_) sched_setaffinity(0, sizeof(before_), &before_);
#endif
  }

 private:
  bool restores_ = false;
#if defined(__linux__)
  static void bind(int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);
  }
  cpu_set_t before_;
#endif
};

// Run function(team, thread) on every thread of a new team, the caller's among them.
template <class Function>
void run_team(Function&& function) {
  const TeamSettings& settings = team_settings();
  const int threads = settings.entry == nullptr || settings.granted == nullptr ? 1 : settings.threads;
  struct Call {
    Function& function;
    Team team;
    std::atomic<int> others{1};
    const void* caller;
  };
  static thread_local char mark;  // its address tells threads apart
  Call call{function, Team(threads), {1}, &mark};
  const auto body = [](void* data) {
    Call& call = *static_cast<Call*>(data);
    const bool is_caller = call.caller == &mark;
    const int thread = is_caller ? 0 : call.others.fetch_add(1);
    if (const auto granted = team_settings().granted) call.team.is_of(granted());
    Bound bound(thread, is_caller);
    call.function(call.team, thread);
  };
  if (threads == 1) return body(&call);
  settings.entry(body, &call, threads, 0);
}

}  // namespace folo
