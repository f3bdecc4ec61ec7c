// The tokens of each group put together, in their order: what ops sort by that add nothing up per token.
#pragma once

#include <cstdint>
#include <vector>

namespace relneuron {

struct RowsByGroup {
  std::vector<int64_t> rows;    // group after group; empty if without ids, where it is all of them
  std::vector<int64_t> begins;  // (G + 1,): of each group in `rows`, and the end

  // `ids` (T,) in [-1, G), -1 = in no group; null = all in group 0.
  RowsByGroup(const int32_t* ids, int64_t T, int64_t G) : begins(static_cast<size_t>(G) + 1) {
    if (!ids) {
      begins.back() = T;
      return;
    }
    std::vector<int64_t> places(static_cast<size_t>(G) + 1);  // of the group before
    for (int64_t t = 0; t < T; ++t) places[static_cast<size_t>(ids[t] + 1)] += 1;
    places[0] = 0;  // of the tokens in no group
    for (size_t group = 1; group < places.size(); ++group) places[group] += places[group - 1];
    begins = places;
    rows.resize(static_cast<size_t>(begins.back()));
    for (int64_t t = 0; t < T; ++t) {
      if (ids[t] >= 0) rows[static_cast<size_t>(places[static_cast<size_t>(ids[t])]++)] = t;
    }
  }
};

}  // namespace relneuron
