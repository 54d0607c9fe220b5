// What a quantiser's loops need of every channel.
#ifndef ADADFQ_CPU_CODE_PARAMS_H_
#define ADADFQ_CPU_CODE_PARAMS_H_

#include <cstdint>

#include "../common/quantizer.h"
#include "channelwise.h"

namespace adadfq {

// Scale, smallest and largest x / scale that has a code.
inline ChannelParams<3> code_params(const float* scale, const int32_t* zero_point, int64_t channels,
                                    int bits) {
  ChannelParams<3> params(channels);
  const int32_t qmax = max_code(bits);
  for (int64_t c = 0; c < channels; ++c) {
    const CodeBounds bounds = code_bounds(zero_point[c], qmax);
    params.each[0][c] = scale[c];
    params.each[1][c] = bounds.lo;
    params.each[2][c] = bounds.hi;
  }
  return params;
}

}  // namespace adadfq

#endif  // ADADFQ_CPU_CODE_PARAMS_H_
