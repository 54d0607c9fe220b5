// Asking for huge pages under a large output.
//
// A fresh 200 MB tensor is 51,200 page faults of 4 KiB, which cost several times what writing it
// costs. Where the system leaves the choice to the program (transparent_hugepage = madvise, the
// usual setting), one hint before the first write makes it 100 faults. Only for tensors that the C
// library is sure to map on their own (from 32 MiB on): smaller ones come from a heap that is used
// again, where huge pages are split and faulted anew. Only a hint: any failure is harmless and
// ignored.
#ifndef ADADFQ_CPU_HUGE_PAGES_H_
#define ADADFQ_CPU_HUGE_PAGES_H_

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace adadfq {

inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kWorthwhile = 32 << 20;
  static const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + page - 1) & ~(page - 1);
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) & ~(page - 1);
  if (end > begin && end - begin >= kWorthwhile) {
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_HUGE_PAGES_H_
