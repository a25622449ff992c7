// What layers are compiled for: the widths of ResNet-32, as constants that templates take, and tensors
// of one type, once with -DVALUE=bf16 and once with -DVALUE=float.

#pragma once

#include <cstdint>
#include <type_traits>

using bf16 = uint16_t;  // the upper half of a float
using Value = VALUE;

template <typename Call>
void for_channels(int channels, const Call& call) {
    if (channels == 16) call(std::integral_constant<int, 16>{});
    if (channels == 32) call(std::integral_constant<int, 32>{});
    if (channels == 64) call(std::integral_constant<int, 64>{});
}
