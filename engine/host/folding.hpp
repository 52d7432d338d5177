// Methods folded into weights, the mirror of meancache/folding.py and meancache/methods: a schedule
// file of an analytic method is checked against its own fold, and folded again for another grid.
// tests/golden/folds.json is read by both hosts.

#ifndef MEANCACHE_TRT_HOST_FOLDING_HPP
#define MEANCACHE_TRT_HOST_FOLDING_HPP

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace mct {

using Rows = std::vector<std::vector<double>>;
using Nodes = std::vector<std::int64_t>;
using Spans = std::optional<std::vector<std::int64_t>>;

// Every analytic method, in the order of Python's table.
const std::vector<std::string>& method_names();

// B rows of weights; row n is for v_n, v_{n-1}, …, without trailing zeros.
//
// sigmas: T + 1 values. nodes: what check_nodes passes. Throws a schedule error for an unknown
// method, and for spans that are malformed or of no use.
Rows fold(const std::string& method, const std::vector<double>& sigmas, const Nodes& nodes,
          const Spans& spans);

// Whether two tables are the same within 1e-6, zeros behind a row's end included.
bool is_close(const Rows& one, const Rows& other);

// Throws a schedule error unless `nodes` ascend from step 0 and stay below `steps`.
void check_nodes(const Nodes& nodes, std::int64_t steps);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_FOLDING_HPP
