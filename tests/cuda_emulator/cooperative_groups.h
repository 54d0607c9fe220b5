// The part of cooperative groups that csrc/cuda uses; see cuda_runtime.h.
#ifndef ADADFQ_TESTS_CUDA_EMULATOR_COOPERATIVE_GROUPS_H_
#define ADADFQ_TESTS_CUDA_EMULATOR_COOPERATIVE_GROUPS_H_

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { emulator::wait_for_grid(); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

#endif  // ADADFQ_TESTS_CUDA_EMULATOR_COOPERATIVE_GROUPS_H_
