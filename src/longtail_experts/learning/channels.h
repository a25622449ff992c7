// The widths of ResNet-32 that layers are compiled for, as constants that templates take.

#pragma once

#include <type_traits>

template <typename Call>
void for_channels(int channels, const Call& call) {
    if (channels == 16) call(std::integral_constant<int, 16>{});
    if (channels == 32) call(std::integral_constant<int, 32>{});
    if (channels == 64) call(std::integral_constant<int, 64>{});
}
