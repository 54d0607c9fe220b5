// Asking for huge pages under a large output.
//
// A fresh 200 MB tensor is 51,200 page faults of 4 KiB, which cost several times what writing it
// costs. Where the system leaves the choice to the program (transparent_hugepage = madvise, the
// usual setting), one hint before the first write makes it 100 faults. Only a hint: any failure is
// harmless and ignored.
#ifndef ADADFQ_CPU_HUGE_PAGES_H_
#define ADADFQ_CPU_HUGE_PAGES_H_

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace adadfq {

inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kWorthwhile = 8 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kPage - 1);
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
