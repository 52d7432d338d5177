// What was measured when a schedule was made: a host uses none of it, but refuses a file in which
// it is malformed, as the Python host does (meancache/evidence.py).

#ifndef MEANCACHE_TRT_HOST_EVIDENCE_HPP
#define MEANCACHE_TRT_HOST_EVIDENCE_HPP

#include "json.hpp"

namespace mct {

// Throws JsonTypeError.
void check_evidence(const Json& json);

}  // namespace mct

#endif  // MEANCACHE_TRT_HOST_EVIDENCE_HPP
