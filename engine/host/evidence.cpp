#include "evidence.hpp"

namespace mct {

namespace {

void check_numbers(JsonObject& object, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    object.required(name).number();
  }
}

void check_summary(const Json& json) {
  JsonObject object(json);
  check_numbers(object, {"mean", "p5", "worst"});
  if (const auto interval = object.nullable("interval")) {
    for (const Json& end : interval->array(2)) {
      end.number();
    }
  }
  object.close();
}

void check_fidelity(const Json& json) {
  JsonObject object(json);
  check_summary(object.required("psnr"));
  check_summary(object.required("ssim"));
  object.required("latent_error").number();
  object.close();
}

void check_stability(const Json& json) {
  JsonObject object(json);
  check_numbers(object, {"variation", "correlation", "worst_correlation"});
  object.close();
}

void check_target(const Json& json) {
  JsonObject object(json);
  check_numbers(object, {"psnr", "confidence"});
  maybe(object.required_nullable("percentile"), to_number);
  object.close();
}

}  // namespace

void check_evidence(const Json& json) {
  JsonObject object(json);
  object.required("samples").integer();
  object.required("seconds").number();
  maybe(object.nullable("network_evaluations"), to_integer);
  maybe(object.nullable("candidates"), to_integer);
  maybe(object.nullable("cost"), to_text);
  for (const char* name : {"gamma", "path_cost", "noise_floor"}) {
    maybe(object.nullable(name), to_number);
  }
  if (const auto costs = object.nullable("edge_costs")) {
    list_of(*costs, to_number);
  }
  for (const char* name : {"fidelity", "euler"}) {
    if (const auto fidelity = object.nullable(name)) {
      check_fidelity(*fidelity);
    }
  }
  if (const auto stability = object.nullable("stability")) {
    check_stability(*stability);
  }
  if (const auto target = object.nullable("target")) {
    check_target(*target);
  }
  object.close();
}

}  // namespace mct
